"""LLaDA2: prompts, padding, its masks, and models that are not as they should be."""

import itertools

import language_models as lm
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

import sparsediff
from sparsediff import LiteAttention, Schedule, SparseD
from sparsediff.adapter import adapter_for
from sparsediff.block_mask import unpack_bits

NOW = Schedule()


@pytest.fixture(autouse=True)
def always_sparse(monkeypatch):
    monkeypatch.setattr("sparsediff.block_attention.CPU_BREAK_EVEN", 2.0)


@pytest.fixture(scope="module")
def pipe():
    return lm.llada2_pipeline()


def ids(tokens=256, seed=0):
    return torch.randint(0, 60, (1, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.filterwarnings("ignore:sparsediff. attention ran dense. .* too few")
@pytest.mark.parametrize(("prompt", "length"), [(192, 64), (200, 120), (31, 129), (0, 160)])
def test_the_prompt_is_told_from_what_is_written(pipe, prompt, length):
    grids = []
    with sparsediff.enable(pipe, SparseD(block=32)) as handle:
        handle.states[0].witness = lambda call: grids.append(call.grid)
        lm.write(pipe, prompt=prompt, length=length, steps=2)
    end = prompt // 32 * 32 + 32
    assert grids[0].spans("prompt") == (((0, prompt),) if prompt else ())
    assert grids[0].grid_span == (prompt, end)
    assert grids[-1].num_tokens == prompt + length
    assert f"{grids[-1].num_tokens - prompt} generated" in str(grids[-1])


def test_a_prompt_with_mask_tokens_inside_ends_where_it_ends(pipe):
    adapter, window = adapter_for(pipe.model), ids(64)
    window[:, 10:12] = lm.MASK
    window[:, 40:] = lm.MASK
    assert adapter.remember({"input_ids": window}) == {"prompt_tokens": 40}
    # of a batch one prompt may end in such tokens, too
    batch = window.repeat(2, 1)
    batch[1, 35:] = lm.MASK
    assert adapter.remember({"input_ids": batch}) == {"prompt_tokens": 40}


def test_embeddings_do_not_tell_the_prompt(pipe):
    model = pipe.model
    with torch.no_grad(), sparsediff.enable(model, SparseD(block=32), schedule=NOW) as handle:
        with pytest.warns(RuntimeWarning, match="called with embeddings"):
            model(inputs_embeds=model.get_input_embeddings()(ids()))
        assert handle.report().density == 1.0


def test_confident_models_finish_blocks_early(pipe):
    """Blocks done in one step do not put the sparse part of the run off for ever."""
    with sparsediff.enable(pipe, SparseD(block=32)) as handle:
        lm.write(pipe, threshold=0.0, editing_threshold=None, steps=8)
        report = handle.report()
    assert [s.step for s in report.steps] == [
        0,
        1,
        8,
        9,
        16,
        17,
        24,
        25,
    ]  # the second looks for edits
    assert report.num_steps == 32
    assert report.dense_calls["schedule: first steps"] == 4  # steps 0 to 6 of 32, in two layers
    assert report.steps[-1].dense_share == 0.0


def test_edits_after_the_last_step_reuse_its_mask(pipe):
    calls = []
    with sparsediff.enable(pipe, SparseD(block=32), schedule=NOW) as handle:
        handle.states[0].witness = calls.append
        lm.write(
            pipe,
            steps=2,
            length=24,
            threshold=0.0,
            editing_threshold=1e-6,
            max_post_steps=3,
            temperature=2.0,
        )
    mine = [c for c in calls if c.layer == calls[0].layer]
    assert len(mine) > 2
    assert [c.step for c in mine] == [0] + [1] * (len(mine) - 1)
    assert [c.dense_reason is None for c in mine] == [False] + [True] * (len(mine) - 1)


def block_causal(tokens, block):
    at = torch.arange(tokens) // block
    return (at[:, None] >= at[None, :])[None, None]


@pytest.mark.parametrize("form", ["bool", "additive"])
def test_a_mask_of_whole_blocks_is_served_exactly(pipe, form):
    model, mask = pipe.model, block_causal(256, 32)
    given = mask
    if form == "additive":
        given = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with torch.no_grad():
        stock = model(ids(), attention_mask=given).logits
        calls = []
        with sparsediff.enable(model, SparseD(select=1.0, block=32), schedule=NOW) as handle:
            first = model(ids(), attention_mask=given).logits
            handle.states[0].witness = calls.append
            second = model(ids(), attention_mask=given).logits
            report = handle.report()
    for out in (first, second):
        assert torch.allclose(out, stock, rtol=0, atol=5e-5 * stock.abs().max().item())
    assert report.dense_calls == {"search: blocks are chosen from exact attention": 2}
    shown = torch.ones(8, 8).tril().bool()
    assert len(calls) == 2
    for call in calls:
        assert torch.equal(unpack_bits(call.bitmap, 8), shown.expand(1, 4, 8, 8))


def test_rows_keep_their_share_of_what_a_mask_shows(pipe):
    model, calls = pipe.model, []
    with torch.no_grad(), sparsediff.enable(model, SparseD(select=0.5, block=32), schedule=NOW):
        handle = sparsediff.patch.handle_of(model)
        handle.states[0].witness = calls.append
        for _ in range(2):
            out = model(ids(), attention_mask=block_causal(256, 32)).logits
        # what comes later must not be seen: change it
        later = ids()
        later[:, 224:] = ids(32, seed=5)
        changed = model(later, attention_mask=block_causal(256, 32)).logits
    kept = unpack_bits(calls[2].bitmap, 8)
    assert calls[2].dense_reason is None
    assert not (kept & ~torch.ones(8, 8).tril().bool()).any()
    # the window is 8 blocks of one segment: half of 1, 2, ... 8 blocks, rounded up
    prompt = calls[2].grid.spans("prompt")
    border = -(-prompt[0][1] // 32) if prompt else 0
    for row in range(8):
        before = min(row + 1, border)
        share = -(-before // 2) + -(-(row + 1 - before) // 2)
        assert (kept[0, :, row].sum(-1) == share).all()
    assert torch.equal(out[:, :224], changed[:, :224])
    assert not torch.equal(out, changed)


def test_blocks_are_chosen_as_published_among_those_that_a_mask_shows(pipe):
    model, calls, mask = pipe.model, [], block_causal(256, 64)
    with torch.no_grad(), sparsediff.enable(model, SparseD(select=0.4, block=32), schedule=NOW):
        handle = sparsediff.patch.handle_of(model)
        handle.states[0].witness = lambda c: calls.append((c, c.query.clone(), c.key.clone()))
        for _ in range(2):
            model(ids(), attention_mask=mask)
    for (_, query, key), (after, _, _) in zip(calls[:2], calls[2:], strict=True):
        kept = unpack_bits(after.bitmap, 8)
        prompt = after.grid.grid_span[0]
        scale = query.shape[-1] ** -0.5
        assert torch.equal(
            kept, lm.published_choice(query, key, 0.4, 32, prompt, scale, visible=mask[0, 0])
        )


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (block_causal(256, 16), "cuts through blocks of 32"),
        (torch.ones(256, 256, dtype=torch.bool).tril()[None, None], "cuts through blocks of 32"),
        (block_causal(256, 32).float(), "weighs keys"),
        ((torch.arange(256) >= 40)[None], "gaps|cuts through blocks"),
        ((torch.arange(256) < 200)[None], "200 keys, where the grid"),
    ],
)
def test_any_other_mask_runs_dense_with_its_reason(pipe, mask, reason):
    model = pipe.model
    with torch.no_grad():
        stock = model(ids(), attention_mask=mask).logits
        with sparsediff.enable(model, SparseD(block=32), schedule=NOW) as handle:
            with pytest.warns(RuntimeWarning, match=reason):
                out = model(ids(), attention_mask=mask).logits
            assert handle.report().density == 1.0
        assert torch.equal(out, stock)


def test_a_mask_that_changes_gets_blocks_of_its_own(pipe):
    model = pipe.model
    masks = [block_causal(256, 32), block_causal(256, 64)]
    method = SparseD(select=1.0, block=32)
    with torch.no_grad():
        stock = [model(ids(), attention_mask=m).logits for m in masks]
        with sparsediff.enable(model, method, schedule=NOW):
            for mask, expected in zip(masks * 2, stock * 2, strict=True):
                out = model(ids(), attention_mask=mask).logits
                assert torch.allclose(out, expected, rtol=0, atol=1e-4)


def test_gradients_run_dense_and_are_counted(pipe):
    model = pipe.model
    with sparsediff.enable(model, SparseD(block=32), schedule=NOW) as handle:
        with pytest.warns(RuntimeWarning, match="gradients are on"):
            model(ids()).logits.sum().backward()
        assert handle.report().dense_calls == {"gradients are on": 2}
    model.zero_grad(set_to_none=True)


def test_other_attention_is_refused_before_and_counted_after():
    eager = lm.llada2_model(attention="eager")
    with pytest.raises(ValueError, match=r"'eager', which cannot be caught.*'sdpa'"):
        sparsediff.enable(eager, "sparse_d", schedule=NOW)
    model = lm.llada2_model()
    with sparsediff.enable(model, SparseD(block=32), schedule=NOW) as handle, torch.no_grad():
        model.set_attn_implementation("eager")
        with pytest.warns(RuntimeWarning, match="no call of scaled_dot_product_attention"):
            model(ids())
        assert handle.report().density == 1.0


def test_modelling_code_of_another_version_is_refused():
    model = lm.llada2_model()
    for layer in model.model.layers:
        layer.self_attn.__class__ = type("LLaDA3Attention", (type(layer.self_attn),), {})
    with pytest.raises(ValueError, match=r"no attention of the classes.*another version"):
        sparsediff.enable(model, "sparse_d", schedule=NOW)
    with sparsediff.enable(model, "sparse_d", schedule=NOW, on_unsupported="dense") as handle:
        assert "another version" in handle.summary()


def test_a_share_of_the_steps_needs_a_pipeline_or_their_number(pipe):
    with pytest.raises(ValueError, match=r"num_steps|enable the pipeline"):
        sparsediff.enable(pipe.model, "sparse_d")
    with sparsediff.enable(pipe.model, SparseD(block=32), num_steps=5) as handle, torch.no_grad():
        for _ in range(5):
            pipe.model(ids())
        report = handle.report()
    assert report.dense_calls["schedule: first steps"] == 2
    assert report.density < 1.0


def test_lite_attention_thins_its_mask():
    pipe = lm.llada2_pipeline()
    with sparsediff.enable(pipe, LiteAttention(threshold=-0.5, tile=(32, 32))) as handle:
        lm.write(pipe, steps=6)
        by_step = [s.density for s in handle.report().steps]
    # every block of text starts anew
    assert [d == 1.0 for d in by_step[::6]] == [True] * 4
    assert all(a >= b for a, b in itertools.pairwise(by_step[18:]))
    assert by_step[-1] < 1.0


@pytest.mark.parametrize("hooked", ["before", "after"])
def test_accelerates_hooks_stay_as_they_are(hooked):
    model = lm.llada2_model()
    attention = model.model.layers[0].self_attn

    def hook():
        add_hook_to_module(attention, AlignDevicesHook("cpu", io_same_device=True))

    with torch.no_grad():
        stock = model(ids()).logits
        if hooked == "before":
            hook()
        before = sorted(vars(attention))
        handle = sparsediff.enable(model, SparseD(select=0.4, block=32), schedule=NOW)
        for _ in range(2):
            sparse = model(ids()).logits
        assert not torch.equal(sparse, stock)
        if hooked == "after":
            hook()
            with pytest.warns(RuntimeWarning, match="forward was replaced"):
                model(ids())
            with pytest.warns(RuntimeWarning, match="self_attn.forward"):
                handle.disable()
        else:
            handle.disable()
            assert sorted(vars(attention)) == before
        assert torch.equal(model(ids()).logits, stock)
        remove_hook_from_module(attention)
        assert torch.equal(model(ids()).logits, stock)
