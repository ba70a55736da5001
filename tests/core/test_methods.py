"""Which blocks a method keeps, against slow implementations written from the papers' equations."""

import math
import warnings
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import site

from sparsediff import (
    AdaSpa,
    Auto,
    Custom,
    DraftAttention,
    LiteAttention,
    Schedule,
    SparseD,
    TokenGrid,
)
from sparsediff.budget import (
    _kth_by_bisection,
    above_bar,
    head_percentile,
    layer_percentile,
    row_top_k,
)
from sparsediff.methods import METHODS, build_method
from sparsediff.slot import STATE_TARGET_BYTES, Layout, Slots, slot_bytes


def needs_calibration(name):
    return getattr(METHODS[name], "needs_calibration", False)


def queries(tokens, heads=2, dim=16, batch=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, heads, dim, generator=g), torch.randn(
        batch, tokens, heads, dim, generator=g
    )


scores = st.builds(
    lambda shape, seed: torch.randn(1, 2, *shape, generator=torch.Generator().manual_seed(seed)),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.integers(0, 2**31),
)
fractions = st.floats(0.01, 1.0)


@given(scores, fractions)
def test_row_top_k_keeps_the_best_of_every_row(s, density):
    keep = row_top_k(s, density)
    k = max(1, math.ceil(density * s.shape[-1] - 1e-9))
    assert (keep.sum(-1) - k).abs().max() <= 1
    kept, dropped = s.masked_fill(~keep, math.inf).amin(-1), s.masked_fill(keep, -math.inf).amax(-1)
    assert (kept >= dropped).all()


@given(scores, fractions, st.integers(1, 3))
def test_head_percentile_follows_the_published_rule(s, density, minimum):
    keep = head_percentile(s, density, row_minimum=minimum)
    m, n = s.shape[-2:]
    for h in range(2):
        flat = sorted(s[0, h].flatten().tolist())
        k = int((1 - density) * len(flat) + 1e-9)
        for i in range(m):
            best = sorted(s[0, h, i].tolist(), reverse=True)[: min(minimum, n)]
            for j in range(n):
                x = s[0, h, i, j].item()
                assert keep[0, h, i, j] == (k == 0 or x >= flat[k - 1] or x in best)


@given(scores, fractions, st.integers(1, 3))
def test_layer_percentile_ranks_the_blocks_of_all_heads_together(s, density, minimum):
    two = torch.cat([s, 10 * s])  # samples have budgets of their own
    keep = layer_percentile(two, density, row_minimum=minimum)
    alone = [layer_percentile(x[None], density, row_minimum=minimum)[0] for x in two]
    assert torch.equal(keep, torch.stack(alone))
    expected = head_percentile(s.flatten(1, 2)[:, None], density, row_minimum=minimum)
    assert torch.equal(keep[:1].flatten(1, 2)[:, None], expected)


@given(
    st.lists(st.lists(st.floats(width=32, allow_nan=False), min_size=6, max_size=6), min_size=1),
    st.integers(1, 6),
)
def test_numbers_too_many_to_sort_are_counted(lines, k):
    lines = torch.tensor(lines, dtype=torch.float32)
    assert torch.equal(_kth_by_bisection(lines, k), lines.sort(-1).values[:, k - 1])


@given(scores, fractions)
def test_percentiles_are_the_same_whatever_is_sorted_at_once(s, density):
    s = torch.cat([s, s.flip(-1) / 3])
    whole = head_percentile(s, density), layer_percentile(s, density)
    for most in (1, s.shape[-1] * s.shape[-2], 2 * s[0].numel()):
        with mock.patch("sparsediff.budget.MAX_SORTED", most):
            assert torch.equal(head_percentile(s, density), whole[0])
            assert torch.equal(layer_percentile(s, density), whole[1])


@given(scores, st.floats(-3, 3), st.integers(1, 3))
def test_a_bar_keeps_what_reaches_it_and_the_best_of_every_row(s, bar, minimum):
    keep = above_bar(s, torch.tensor([[bar, 2 * bar]]), row_minimum=minimum)
    for h, least in enumerate((bar, 2 * bar)):
        for row, kept in zip(s[0, h].tolist(), keep[0, h].tolist(), strict=True):
            best = sorted(row, reverse=True)[:minimum]
            assert kept == [x >= torch.tensor(least).item() or x in best for x in row]


@given(
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(1, 40),
    st.integers(0, 40),
    st.floats(0.0, 0.95),
    st.integers(0, 99),
)
def test_draft_attention_against_its_equations(f, h, w, text, sparsity, seed):
    grid = TokenGrid.video(f, h, w, text=text)
    method = DraftAttention(sparsity=sparsity)
    q, k = queries(grid.num_tokens, seed=seed)
    order = method.order(site(grid))
    keep = method.keep_blocks(*order.apply(grid, q, k), site(grid))
    n, video = grid.num_tokens, f * h * w
    blocks = -(-n // 128)
    assert keep.shape == (1, 2, blocks, blocks)
    permuted = order.permutation(grid)[0]
    pooled_q, pooled_k = (
        torch.stack([x[0, permuted[i : i + 128]].double().mean(0) for i in range(0, n, 128)])
        for x in (q, k)
    )
    visual = -(-video // 128)
    for head in range(2):
        logits = pooled_q[:visual, head] @ pooled_k[:visual, head].T / math.sqrt(16)
        draft = logits.softmax(-1)
        dropped = int(sparsity * visual * visual + 1e-9)
        threshold = draft.flatten().sort().values[dropped - 1] if dropped else -math.inf
        expected = (draft >= threshold - 1e-9) | (draft >= draft.amax(-1, keepdim=True) - 1e-9)
        assert torch.equal(keep[0, head, :visual, :visual], expected)
    assert keep[..., visual:, :].all()
    assert keep[..., :, visual:].all()


@pytest.mark.parametrize(("grid", "parts"), [((3, 16, 16), 4), ((3, 10, 11), 2), ((1, 9, 16), 8)])
def test_draft_attention_scores_sub_blocks_by_their_log_sum_exp(grid, parts):
    grid = TokenGrid.video(*grid)
    method = DraftAttention(sub_blocks=parts, pool_h=8, pool_w=8)
    q, k = queries(grid.num_tokens)
    logits = method._logits(q, k, (64, 64), site(grid))
    run, n = 64 // parts, grid.num_tokens
    means = [
        torch.stack([x[0, i : i + run].double().mean(0) for i in range(0, n, run)]) for x in (q, k)
    ]
    for head in range(2):
        fine = (means[0][:, head] @ means[1][:, head].T / 4).exp()
        for i in range(logits.shape[2]):
            for j in range(logits.shape[3]):
                part = fine[i * parts : (i + 1) * parts, j * parts : (j + 1) * parts]
                assert logits[0, head, i, j].item() == pytest.approx(
                    part.sum().log().item(), abs=1e-4
                )


def test_auto_keeps_the_heaviest_blocks_of_each_row_and_then_of_the_layer():
    grid = TokenGrid.video(4, 8, 12)
    q, k = queries(grid.num_tokens)
    q[:, :192] *= 6  # the first rows are sharp, the others look everywhere
    keep = Auto(density=0.5, block=64).keep_blocks(q, k, site(grid))[0]
    exact = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()).div(4).softmax(-1)
    mass = exact.view(2, 6, 64, 6, 64).sum((2, 4))
    own = row_top_k(mass[None], 0.25)[0]  # half of the budget
    assert (own.sum(-1) == 2).all()
    assert (own <= keep).all()
    assert keep.sum() in (36, 37), "half of the blocks of both heads"
    assert mass[keep & ~own].min() >= mass[~keep].max()
    assert keep.sum(-1).unique().numel() > 1, "rows spend unevenly"


def test_auto_chooses_again_at_half_of_a_long_run():
    grid = TokenGrid.video(4, 8, 8)

    def chooses(method, steps, first=4):
        sites = [replace(site(grid, step=s), num_steps=steps) for s in range(first, steps or 50)]
        last, chosen = None, []
        for at in sites:
            if method.refreshes(at, last):
                last = at.step
                chosen.append(last)
        return chosen

    assert chooses(Auto(), 50) == [4, 25]
    assert chooses(Auto(), 20) == [4, 10]
    assert chooses(Auto(), 19) == chooses(Auto(), None) == [4], "short, or nobody knows"
    assert chooses(Auto(), 50, first=30) == [30], "the first choice came later"
    assert chooses(Auto(), 20, first=9) == [9, 13], "not right after the first choice"
    assert chooses(Auto(refresh=()), 50) == [4]
    assert chooses(Auto(refresh=(0.4, 0.7)), 10) == [4, 7]
    assert not Auto().needs_step_count, "a bare transformer runs with one choice"


def test_a_hybrid_looks_again_as_told():
    grid = TokenGrid.video(4, 8, 8)
    assert Custom().refreshes(site(grid, step=3), None)
    assert not Custom().refreshes(site(grid, step=9), 3)
    assert not Custom(refresh=4).refreshes(site(grid, step=6), 3)
    assert Custom(refresh=4).refreshes(site(grid, step=7), 3)
    shares = Custom(refresh=(0.2, 0.6))
    assert [shares.refreshes(site(grid, step=s), 2) for s in range(2, 8)] == [False] * 4 + [
        True
    ] * 2


@pytest.mark.parametrize("method", [Auto, AdaSpa, Custom, SparseD])
def test_blocks_are_coarser_for_long_sequences_unless_told_otherwise(method):
    short, border, long = (TokenGrid.video(n, 16, 16) for n in (9, 64, 65))
    assert border.num_tokens == 16_384
    assert [method().block_size(grid) for grid in (short, border, long)] == [
        (64, 64),
        (64, 64),
        (128, 128),
    ]
    for block in (32, 64, 128):
        assert method(block=block).block_size(long) == (block, block)
    for wrong in (96, 0, 64.0, True):
        with pytest.raises(ValueError, match="block must be 32, 64, 128 or None"):
            method(block=wrong)


@pytest.mark.parametrize("name", [n for n in METHODS if not needs_calibration(n)])
def test_masks_of_wan_14b_at_720p_stay_under_their_target(name):
    """40 layers of 40 heads, two guidance branches; by arithmetic."""
    grid, method = TokenGrid.video(21, 45, 80), build_method(name)
    lengths = (grid.num_tokens, grid.num_tokens)
    size = method.block_size(grid)
    masks, lse = slot_bytes(1, 40, lengths, size, keeps_lse=True)
    assert size == (128, 128)
    assert masks * 40 * 2 == 40 * 591 * 74 * 80 <= STATE_TARGET_BYTES
    # AdaSpa's log-sum-exp would take more, so that its second search finds its own.
    assert lse == 40 * 75_600 * 2
    layout = Layout(
        grid=grid, block_size=size, order=None, batch=1, heads=40, device=torch.device("cpu")
    )
    assert not Slots(40, name, warnings.warn).has_room_for_lse(layout)
    assert Slots(7, name, warnings.warn).has_room_for_lse(layout)
    published = slot_bytes(1, 40, lengths, (64, 64), keeps_lse=False)[0]
    assert published * 40 * 2 > 3.9 * masks * 40 * 2


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("video", [(1, 1, 1), (1, 5, 6), (2, 8, 8)])
@pytest.mark.parametrize(
    "method",
    [
        Auto(),
        *(Custom(budget=x) for x in ("row_top_k", "row_top_p", "head_adaptive", "head_percentile")),
        Custom(budget="layer_percentile", row_share=0.5),
        Custom(budget="model_percentile"),
        AdaSpa(),
        AdaSpa(head_adaptive=False),
        SparseD(),
        DraftAttention(),
    ],
    ids=str,
)
def test_a_video_smaller_than_a_block_leaves_nothing_to_choose(method, video, text_first):
    """Beside long text there is one: all blocks touch the text, and the caller keeps them."""
    grid = TokenGrid.video(*video, text=300, text_first=text_first)
    q, k = queries(grid.num_tokens)
    here, order = site(grid), method.order(site(grid))
    if order is not None:
        chosen = order.chosen_at_run_time
        heads = method.choose_windows(q, k, here, None) if chosen else None
        q, k = order.apply(grid, q, k, heads=heads)
    keep = method.keep_blocks(q, k, here)
    whole = grid.whole_blocks(method.block_size(grid)[0], reordered=order is not None)
    if isinstance(method, AdaSpa | Custom):
        assert keep.sum() == keep[..., whole, whole].sum()
    if method.shared_density is not None:
        scores, _ = method.sample_scores(q, k, here)
        assert len(scores) == len(q)


def test_adaspa_keeps_its_log_sum_exp_while_a_search_is_to_come():
    method = AdaSpa(search=(0.2, 0.5, 0.9))
    for steps, last in ((10, 8), (4, 1), (1, -1), (None, -1)):
        for step in range(steps or 3):
            here = site(TokenGrid.video(1, 16, 16), step=step, num_steps=steps)
            assert method.keeps_lse(here) == (step <= last)
            assert not AdaSpa(search=(0.2,)).keeps_lse(here)


def test_lists_are_cached_only_while_all_layers_together_are_small():
    for tokens in range(1_000, 80_000, 1_000):
        for block in (64, 128):
            masks, _ = slot_bytes(1, 40, (tokens, tokens), (block, block), keeps_lse=False)
            rows = math.ceil(tokens / block)
            bitmap = 40 * rows * math.ceil(rows / 8)
            assert (masks - bitmap) * 40 * 2 <= 90_000_000


def test_lite_attention_starts_from_everything_once():
    grid = TokenGrid.video(3, 10, 10)
    method = LiteAttention()
    q, k = queries(300, batch=2)
    assert method.keep_blocks(q, k, site(grid)).shape == (2, 2, 3, 3)
    assert method.keep_blocks(q, k, site(grid)).all()
    assert method.refreshes(site(grid), None)
    assert not method.refreshes(site(grid, step=5), 0)
    assert method.vote_threshold(site(grid)) == -10.0


@pytest.mark.parametrize("name", METHODS)
def test_every_method_describes_itself(name):
    method = build_method(name)
    assert method.name == name
    assert method.summary
    assert method.citation
    assert str(method).startswith(name)
    assert isinstance(method.default_schedule(), Schedule)
    with pytest.raises(AttributeError):
        method.name = "other"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LiteAttention(threshold=0.5), "log2 units below 0"),
        (lambda: LiteAttention(tile=(8, 128)), "two sizes >= 16"),
        (lambda: DraftAttention(sparsity=1.0), r"in \[0, 1\)"),
        (lambda: DraftAttention(pool_h=3), "must be 64 or 128"),
        (lambda: DraftAttention(sub_blocks=3), "divides pool_h"),
        (lambda: DraftAttention(row_minimum=0), "row_minimum must be a whole number >= 1"),
        (lambda: Auto(density=0.0), r"density must be a share in \(0, 1\]"),
        (lambda: Auto(block=96), "block must be 32, 64, 128 or None"),
        (lambda: Auto(block=0), "block must be 32, 64, 128 or None, got 0"),
        (lambda: Custom(block=0), "block must be 32, 64, 128 or None, got 0"),
        (lambda: Auto(refresh=0), "refresh must be None, a number of steps >= 1"),
        (lambda: DraftAttention(pool_h=8.0), "pool_h must be a whole number"),
        (lambda: LiteAttention(tile=(64.0, 64.0)), "two sizes >= 16"),
        (lambda: LiteAttention(tile=64), "two sizes >= 16"),
        (lambda: Auto(density="abc"), "density must be a share"),
        (lambda: Auto(density=True), "density must be a share"),
        (lambda: Auto(refresh=2.5), "refresh must be None, a number of steps"),
        (lambda: Custom(row_share=1.5), r"row_share must be a share in \[0, 1\]"),
        (lambda: Custom(stride=3), "stride must be 1, 2, 4 or None"),
        (lambda: build_method("lite"), "did you mean 'lite_attention'"),
        (lambda: build_method("draft_attention", sparsty=0.5), "did you mean 'sparsity'"),
        (lambda: row_top_k(torch.zeros(1, 1, 2, 2), 0.0), r"density must be in \(0, 1\]"),
    ],
)
def test_impossible_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def _bad_numbers():
    """Every number of every method's parameters, set to what is no number; those in tuples too."""
    for name, cls in METHODS.items():
        method = cls()
        examples = {"costs": (1.0,) * 5, "refresh": (0.5,), "windows": ((1, 8, 8),)}
        for field in method.parameters():
            value = getattr(method, field)
            value = examples.get(field, value)
            for bad in (math.nan, math.inf, -math.inf):
                if isinstance(value, tuple) and value:
                    inside = value[0]
                    nested = (bad, *inside[1:]) if isinstance(inside, tuple) else bad
                    yield name, field, (nested, *value[1:])
                if field != "windows" and not isinstance(value, str | bool):
                    yield name, field, bad


@pytest.mark.parametrize(("name", "field", "bad"), list(_bad_numbers()))
def test_what_is_not_finite_is_refused_everywhere(name, field, bad):
    with pytest.raises(ValueError, match=rf"{field}|a window is three sizes"):
        build_method(name, **{field: bad})


def test_parameters_beside_a_ready_method_are_refused():
    with pytest.raises(TypeError, match="already configured"):
        build_method(LiteAttention(), threshold=-3.0)
    with pytest.raises(TypeError, match=r"make one: LiteAttention\(...\)"):
        build_method(LiteAttention)
    with pytest.raises(TypeError, match="a name or a Method"):
        build_method(7)
