"""Diffusion language models: what `enable` must and must not change, as for video."""

import copy
import pickle

import language_models as lm
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import sparsediff
from sparsediff import LiteAttention, Schedule, SparseD
from sparsediff.block_mask import unpack_bits

KINDS = ("bidirectional", "mixture", "direct", "gemma", "gemma-static")
DENSE = Schedule(dense_steps=1.0)
HALF = SparseD(select=0.4, block=32)
EVERYTHING = SparseD(select=1.0, block=32)


def make(kind):
    return lm.gemma_pipeline() if kind.startswith("gemma") else lm.llada2_pipeline(kind)


def write(pipe, kind, **call):
    if kind == "gemma-static":
        call["cache_implementation"] = "static"
    return lm.write(pipe, **call)


@pytest.fixture(autouse=True)
def always_sparse(monkeypatch):
    monkeypatch.setattr("sparsediff.block_attention.CPU_BREAK_EVEN", 2.0)


@pytest.fixture(scope="module", params=KINDS)
def family(request):
    pipe = make(request.param)
    return pipe, request.param, write(pipe, request.param)


def logits_of(pipe, kind):
    """The logits of every model call of one generation."""
    seen = []
    hook = pipe.model.register_forward_hook(lambda m, a, out: seen.append(out.logits.clone()))
    write(pipe, kind)
    hook.remove()
    return seen


def attention_modules(pipe):
    return [m for m in pipe.model.modules() if type(m).__name__.endswith("Attention")]


def fingerprint(pipe):
    hooks = (len(pipe.model._forward_pre_hooks), len(pipe.model._forward_hooks))
    return [sorted(vars(m)) for m in attention_modules(pipe)] + [hooks, sorted(vars(pipe))]


def test_a_dense_schedule_is_bit_identical(family):
    pipe, kind, stock = family
    with sparsediff.enable(pipe, HALF, schedule=DENSE) as handle:
        assert torch.equal(write(pipe, kind), stock)
        report = handle.report()
    assert report.density == 1.0
    assert report.calls
    assert report.dense_calls == {"schedule: every step": report.calls}


def test_keeping_every_block_is_within_rounding(family):
    pipe, kind, _ = family
    stock = logits_of(pipe, kind)
    with sparsediff.enable(pipe, EVERYTHING, schedule=Schedule()) as handle:
        ours = logits_of(pipe, kind)
        report = handle.report()
    blocks = 2 if kind.startswith("gemma") else 4
    assert report.dense_calls == {"search: blocks are chosen from exact attention": 2 * blocks}
    assert "cpu" in report.backends
    for a, b in zip(ours, stock, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=5e-5 * b.abs().max().item())


def test_fewer_blocks_change_the_logits_and_are_counted(family):
    pipe, kind, _ = family
    stock = logits_of(pipe, kind)
    with sparsediff.enable(pipe, HALF) as handle:
        ours = logits_of(pipe, kind)
        report = handle.report()
    assert all(x.isfinite().all() for x in ours)
    assert not torch.equal(ours[-1], stock[-1])
    sparse = [s.density for s in report.steps if s.dense_share == 0]
    # ceil() of 0.4 of the blocks of either side
    assert sparse
    assert all(0.39 < density < 0.6 for density in sparse)
    assert "generated" in handle.summary()


def test_disable_leaves_no_trace(family):
    pipe, kind, stock = family
    before = fingerprint(pipe)
    handle = sparsediff.enable(pipe, HALF)
    write(pipe, kind)
    assert fingerprint(pipe) != before
    handle.disable()
    assert fingerprint(pipe) == before
    assert torch.equal(write(pipe, kind), stock)


@pytest.mark.parametrize("method", [HALF, LiteAttention(threshold=-1.0, tile=(32, 32))])
def test_a_second_generation_equals_a_fresh_pipeline(family, method):
    pipe, kind, _ = family
    with sparsediff.enable(pipe, method):
        write(pipe, kind, prompt=232, seed=1)
        second = write(pipe, kind)
    fresh = make(kind)
    with sparsediff.enable(fresh, method) as handle:
        assert torch.equal(write(fresh, kind), second)
        assert handle.report().density < 1.0


def test_an_interrupted_generation_leaves_nothing_behind(family):
    pipe, kind, _ = family

    def stop(*_):
        raise KeyboardInterrupt

    with sparsediff.enable(pipe, HALF) as handle:
        first = write(pipe, kind)
        with pytest.raises(KeyboardInterrupt):
            write(pipe, kind, callback_on_step_end=stop)
        assert torch.equal(write(pipe, kind), first)
        # whatever stopped inside a layer, nothing is caught outside of one
        handle.disable()
        assert torch.overrides._get_current_function_mode() is None


def test_steps_are_counted_through_the_blocks(family):
    pipe, kind, _ = family
    calls = []
    with sparsediff.enable(pipe, HALF) as handle:
        handle.states[0].witness = calls.append
        write(pipe, kind)
        report = handle.report()
    blocks = 2 if kind.startswith("gemma") else 4
    assert {c.num_steps for c in calls} == {4 * blocks}
    assert [c.step for c in calls if c.layer == calls[0].layer] == list(range(4 * blocks))
    assert {c.generation for c in calls} == {0}
    assert {c.branch for c in calls} == {"text"}
    prefix = [s.step for s in report.steps if s.dense_share == 1.0]
    first = -(-4 * blocks // 5)  # a fifth of all steps, rounded up
    searches = {b * 4 for b in range(blocks) if b * 4 >= first} | {first}
    assert set(prefix) == set(range(first)) | searches
    layer = calls[0].layer
    windows = [c.grid.num_tokens for c in calls if c.layer == layer]
    growth = 64 if kind.startswith("gemma") else 32
    assert windows == [windows[0] + growth * (i // 4) for i in range(4 * blocks)]
    spans = {c.grid.spans("prompt") for c in calls}
    assert spans == {((0, 200),)}


def test_blocks_are_chosen_as_published(family):
    pipe, kind, _ = family
    calls = []
    with sparsediff.enable(pipe, SparseD(select=0.4, block=32)) as handle:
        handle.states[0].witness = lambda c: calls.append(
            (c, c.query.clone(), c.key.clone(), None if c.bitmap is None else c.bitmap.clone())
        )
        write(pipe, kind)
    by_layer, checked = {}, 0
    for call, query, key, bitmap in calls:
        last = by_layer.get(call.layer)
        if bitmap is not None and last is not None and last[3] is None:
            columns = -(-call.grid.num_tokens // 32)
            expected = lm.published_choice(
                last[1], last[2], 0.4, 32, 200, last[0].scale or query.shape[-1] ** -0.5
            )
            assert torch.equal(unpack_bits(bitmap, columns), expected)
            checked += 1
        by_layer[call.layer] = (call, query, key, bitmap)
    assert checked >= 4


@pytest.mark.parametrize(
    ("method", "what"),
    [
        ("draft_attention", "pools patches of frames"),
        ("paro_attention", "reorders frames"),
        ("sparse_vdit", "patterns of frames"),
        ("adaspa", "blocks of frames"),
        ("custom", "blocks of frames"),
    ],
)
def test_methods_for_video_are_refused(family, method, what):
    pipe, _, _ = family
    before = fingerprint(pipe)
    with pytest.raises(ValueError, match=f"{method} .*{what}.*'sparse_d'"):
        sparsediff.enable(pipe, method)
    assert fingerprint(pipe) == before


def test_auto_is_sparse_d(family):
    pipe, _, _ = family
    with sparsediff.enable(pipe) as handle:
        assert handle.method == SparseD(select=0.3)
        assert handle.schedule == Schedule(dense_steps=0.2)
    with sparsediff.enable(pipe, density=0.5, block=32) as handle:
        assert handle.method == SparseD(select=0.5, block=32)
    with pytest.raises(ValueError, match=r"auto is sparse_d on a language model.*windows"):
        sparsediff.enable(pipe, windows=((1, 4, 4),))


def test_calibrating_is_refused(family):
    pipe, _, _ = family
    with pytest.raises(ValueError, match="is a language model"):
        sparsediff.calibrate(pipe, LiteAttention(), ["a prompt"])


def test_short_sequences_run_dense_and_say_so(family):
    pipe, kind, stock = family
    with sparsediff.enable(pipe, SparseD(block=128), schedule=Schedule()) as handle:
        with pytest.warns(RuntimeWarning, match="too few"):
            out = write(pipe, kind)
        assert handle.report().density == 1.0
    assert torch.equal(out, stock)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_an_enabled_model_run_stock(how):
    pipe = lm.gemma_pipeline()
    stock = lm.write(pipe)
    with sparsediff.enable(pipe, HALF):
        sparse = lm.write(pipe)
        twin = copy.deepcopy(pipe.model) if how == "deepcopy" else pickled(pipe.model)
        other = type(pipe)(twin, pipe.scheduler, pipe.processor)
        other.set_progress_bar_config(disable=True)
        assert torch.equal(lm.write(other), stock)
        assert torch.equal(lm.write(pipe), sparse)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("first", ["compiled", "enabled"])
def test_a_compiled_decoder_stays_whole(first):
    pipe = lm.gemma_pipeline(
        layer_types=["sliding_attention", "full_attention"], num_hidden_layers=2
    )
    pipe.model.set_experts_implementation("batched_mm")
    stock = write(pipe, "gemma-static", length=64)
    with sparsediff.enable(pipe, HALF):
        expected = write(pipe, "gemma-static", length=64)
    counter, decoder = CompileCounter(), pipe.model.model.decoder

    def compile_it():
        torch._dynamo.reset()
        pipe.model.model.decoder = torch.compile(decoder, backend=counter, fullgraph=True)

    if first == "compiled":
        compile_it()
        assert torch.equal(write(pipe, "gemma-static", length=64), stock)
    stock_graphs = counter.frame_count
    with sparsediff.enable(pipe, HALF) as handle:
        if first == "enabled":
            compile_it()
        assert torch.equal(write(pipe, "gemma-static", length=64), expected)
        assert handle.report().density < 1.0
    # without and with logits to condition on, whatever the layers and steps
    assert counter.frame_count - stock_graphs == 2
    assert torch.equal(write(pipe, "gemma-static", length=64), stock)
