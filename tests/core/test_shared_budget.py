"""One budget of blocks for all layers: what a block must score is found one step early."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import BRANCHES, LAYERS, generate, site

import sparsediff
from sparsediff import Auto, Custom, Schedule, TokenGrid
from sparsediff.block_attention import ALONE, SHARED
from sparsediff.budget import layer_percentile, row_top_k
from sparsediff.kernels.block_scores import block_mass
from sparsediff.shared_budget import BINS_AN_OCTAVE, ScoreCounts
from sparsediff.testing import random_wan_pipeline

GRID = TokenGrid.video(1, 1, 300)


# -- counting -------------------------------------------------------------------------------------------------------


def draw(seed, layers, batch=2, blocks=300):
    """Scores of several layers, like shares of a softmax: many small ones, few large."""
    g = torch.Generator().manual_seed(seed)
    spread = 1 + 3 * torch.rand(layers, batch, 1, generator=g)
    return (spread * torch.randn(layers, batch, blocks, generator=g) - 6).exp().clamp(max=1)


@given(st.integers(0, 999), st.integers(1, 5), st.floats(0.01, 0.99))
def test_the_bar_is_the_quantile_over_all_layers_of_each_sample(seed, layers, density):
    counts, scores = ScoreCounts(), draw(seed, layers)
    for layer in scores:
        counts.add(site(GRID, step=3), layer)
    bar = counts.bar(site(GRID, step=4), 2, density)
    assert bar.shape == (2,)
    for sample, least in enumerate(bar):
        every = scores[:, sample].flatten()
        exact = every.sort(descending=True).values[int(density * len(every))]
        assert abs(least.log2() - exact.log2()) < 2 / BINS_AN_OCTAVE + 0.5


@given(st.integers(0, 999), st.floats(0.05, 0.95))
def test_what_reaches_the_bar_is_the_share_asked_for(seed, density):
    counts, scores = ScoreCounts(), draw(seed, 4, blocks=2000)
    for layer in scores:
        counts.add(site(GRID), layer)
    bar = counts.bar(site(GRID, step=1), 2, density)
    kept = (scores >= bar[:, None]).float().mean((0, 2))
    assert (kept - density).abs().max() < 0.01


def test_whoever_wants_everything_gets_it():
    counts, scores = ScoreCounts(), torch.tensor([[0.0, 1e-30, 0.5, 1.0]])
    counts.add(site(GRID), scores)
    assert (scores >= counts.bar(site(GRID, step=1), 1, 1.0)).all()


def test_the_latest_step_before_counts_and_branches_are_apart():
    counts = ScoreCounts()
    low, high = torch.full((1, 8), 2.0**-9), torch.full((1, 8), 2.0**-3)

    def bar(step, branch="cond"):
        return counts.bar(site(GRID, step=step, branch=branch), 1, 0.5)

    assert bar(5) is None
    counts.add(site(GRID, step=1), low)
    counts.add(site(GRID, step=1, branch="uncond"), high)
    assert bar(1) is None, "of this very step, whose later layers nobody has seen"
    assert bar(2) < 2**-8 < bar(2, "uncond")
    counts.add(site(GRID, step=2), high)
    assert bar(2) < 2**-8 < bar(3)
    counts.add(site(GRID, step=3), low)
    assert bar(2) is None, "only the last two steps are kept"
    counts.clear()
    assert bar(9) is None


def test_other_tokens_and_another_batch_have_no_bar():
    counts, other = ScoreCounts(), TokenGrid.video(2, 10, 10)
    counts.add(site(GRID, name="a"), torch.full((2, 8), 0.5))
    counts.add(site(other, name="b"), torch.full((2, 8), 0.5))
    for name, grid, batch, known in (
        ("a", GRID, 2, True),
        ("b", other, 2, True),
        ("a", GRID, 1, False),
        ("a", other, 2, False),
        ("never sampled", other, 2, False),
    ):
        bar = counts.bar(site(grid, name=name, step=1), batch, 0.5)
        assert (bar is not None) == known, name


def test_a_step_that_a_cache_left_layers_out_of_speaks_for_those_it_had():
    counts = ScoreCounts()
    low, high = torch.full((1, 8), 2.0**-9), torch.full((1, 8), 2.0**-3)

    def bar(name, step):
        return counts.bar(site(GRID, name=name, step=step), 1, 0.5)

    counts.add(site(GRID, name="a", step=1), high)
    assert bar("a", 2) > 2**-4
    assert bar("b", 2) is None, "its scores may be of another size altogether"
    counts.clear()
    for name in "ab":
        counts.add(site(GRID, name=name, step=1), low)
    counts.add(site(GRID, name="a", step=9), high)
    assert bar("a", 10) < 2**-8, "of both layers"
    assert bar("b", 10) < 2**-8
    counts.add(site(GRID, name="b", step=9), high)
    assert bar("a", 10) > 2**-4, "the latest of steps alike"


def test_what_stands_for_more_rows_weighs_more():
    counts = ScoreCounts()
    counts.add(site(GRID), torch.full((1, 100), 2.0**-3), rows=3)
    counts.add(site(GRID), torch.full((1, 100), 2.0**-9))
    assert counts.bar(site(GRID, step=1), 1, 0.74) > 2**-4
    assert counts.bar(site(GRID, step=1), 1, 0.76) < 2**-8


def test_scores_that_are_no_numbers_are_counted_as_the_lowest():
    """A run in too low a precision must go on to its own bad end, not die in an index."""
    counts = ScoreCounts()
    counts.add(site(GRID), torch.tensor([[torch.nan, 0.5, 0.5, 0.5]]))
    assert 2**-2 < counts.bar(site(GRID, step=1), 1, 0.7) <= 0.5 * 2 ** (1 / BINS_AN_OCTAVE)


# -- choosing -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 99), st.integers(40, 333), st.integers(0, 40), st.floats(0.001, 0.3))
def test_a_bar_is_held_against_the_share_of_each_row(seed, video, text, bar):
    """Also in a ragged last row of blocks, and with text beside the video."""
    grid = TokenGrid.video(1, 1, video, text=text)
    g = torch.Generator().manual_seed(seed)
    q, k = (2 * torch.randn(2, grid.num_tokens, 2, 16, generator=g) for _ in range(2))
    method = Custom(budget="model_percentile", block=32)
    bars = torch.tensor([bar, 2 * bar])
    keep = method.keep_blocks(q, k, site(grid, score_bar=bars))
    mass, whole = block_mass(q, k, (32, 32)), grid.whole_blocks(32)
    rows = mass.sum(-1, keepdim=True)  # tokens of each row of blocks
    visual = (mass / rows)[..., whole, whole]
    expected = (visual >= bars[:, None, None, None]) | (visual == visual.amax(-1, keepdim=True))
    near = (visual - bars[:, None, None, None]).abs() < 1e-6
    assert ((keep[..., whole, whole] == expected) | near).all()
    assert not keep[..., whole.stop :, :].any()
    assert not keep[..., whole.stop :].any()


@given(st.integers(0, 99), st.integers(130, 400), st.sampled_from([2, 4]), st.booleans())
def test_a_stride_scores_by_some_of_the_tokens(seed, video, stride, given_lse):
    grid = TokenGrid.video(1, 1, video)
    g = torch.Generator().manual_seed(seed)
    q, k = (2 * torch.randn(1, video, 2, 16, generator=g) for _ in range(2))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / 4
    lse = logits.logsumexp(-1) if given_lse else None
    method = Custom(stride=stride, block=128)
    blocks = -(-video // 128)
    scores = method._scores(q, k, site(grid), slice(0, blocks), lse=lse)
    weights = logits.softmax(-1)[:, :, ::stride]
    for i in range(blocks):
        rows = weights[:, :, i * 128 // stride : (i + 1) * 128 // stride]
        for j in range(blocks):
            share = rows[..., j * 128 : (j + 1) * 128].sum(-1).mean(-1)
            torch.testing.assert_close(scores[:, :, i, j], share, rtol=1e-4, atol=1e-6)


def test_of_a_small_block_all_tokens_count():
    grid = TokenGrid.video(5, 8, 8)
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 320, 2, 16, generator=g) for _ in range(2))
    for block, stride, same in (
        (32, 4, 1),
        (64, 4, 2),
        (32, None, 1),
        (64, None, 1),
        (128, None, 2),
    ):
        kept = [Custom(block=block, stride=s).keep_blocks(q, k, site(grid)) for s in (stride, same)]
        assert torch.equal(*kept)


@given(st.integers(0, 99), st.floats(0.1, 0.9), st.floats(0.1, 1.0))
def test_a_row_has_its_share_of_a_wider_budget_to_itself(seed, density, row_share):
    grid = TokenGrid.video(10, 8, 8)
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, 640, 2, 16, generator=g) for _ in range(2))
    q *= torch.linspace(0, 6, 640)[:, None, None]  # the first rows look everywhere
    method = Custom(budget="layer_percentile", density=density, row_share=row_share, block=64)
    keep = method.keep_blocks(q, k, site(grid))
    mass = block_mass(q, k, (64, 64))
    own = row_top_k(mass, row_share * density)
    assert (own <= keep).all()
    asked = max(int(own.sum()), density * keep.numel())
    assert asked - 1 < keep.sum() <= asked + 2, "the published percentile keeps one block more"
    extra = keep & ~own
    if extra.any() and not keep.all():
        assert mass[extra].min() >= mass[~keep].max() - 1e-4


@pytest.mark.parametrize("budget", ["row_top_k", "row_top_p", "head_adaptive"])
def test_a_row_that_shares_nothing_has_its_budget_to_itself_anyway(budget):
    grid = TokenGrid.video(5, 8, 8)
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 320, 2, 16, generator=g) for _ in range(2))
    kept = [Custom(budget=budget, row_share=s).keep_blocks(q, k, site(grid)) for s in (0.0, 0.5)]
    assert torch.equal(*kept)


def test_without_samples_each_layer_has_its_own_budget():
    grid = TokenGrid.video(5, 8, 8)
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 320, 2, 16, generator=g) for _ in range(2))
    keep = Custom(budget="model_percentile").keep_blocks(q, k, site(grid))
    assert torch.equal(keep, layer_percentile(block_mass(q, k, (64, 64)), 0.3))


@pytest.mark.parametrize("producer", ["mass", "pooled"])
@pytest.mark.parametrize("windows", [(), ((1, 8, 8),), ((1, 8, 8), "HWF")])
def test_samples_are_rows_of_what_is_chosen_from(producer, windows):
    grid = TokenGrid.video(5, 8, 8, text=10)
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, grid.num_tokens, 2, 16, generator=g) for _ in range(2))
    method = Custom(budget="model_percentile", producer=producer, windows=windows)
    sampled, rows = method.sample_scores(q, k, site(grid))
    order = method.order(site(grid))
    if order is not None:
        chosen = order.chosen_at_run_time
        heads = method.choose_windows(q, k, site(grid), None) if chosen else None
        q, k = order.apply(grid, q, k, heads=heads)
    every = method._scores(q, k, site(grid), slice(0, 5))[..., :5, :].flatten(1)
    # Of five rows of blocks all are sampled.
    assert rows == 1
    torch.testing.assert_close(sampled, every)


# -- in a run -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe(monkeypatch):
    monkeypatch.setattr("sparsediff.block_attention.CPU_BREAK_EVEN", 2.0)
    return random_wan_pipeline()


@pytest.fixture
def samples(monkeypatch):
    """`(layer, step)` of every sampling, and `(layer, step, whether there was a bar)` of every choice, "cond" alone."""
    sampled, chosen = [], []
    sample, keep = Custom.sample_scores, Custom.keep_blocks

    def look(self, query, key, site):
        if site.branch == "cond":
            sampled.append((site.layer, site.step))
        return sample(self, query, key, site)

    def choose(self, query, key, site, *, lse=None):
        if site.branch == "cond":
            chosen.append((site.layer, site.step, site.score_bar is not None))
        return keep(self, query, key, site, lse=lse)

    monkeypatch.setattr(Custom, "sample_scores", look)
    monkeypatch.setattr(Custom, "keep_blocks", choose)
    return sampled, chosen


@pytest.mark.parametrize(
    ("changes", "dense", "sampled", "chosen"),
    [
        ({}, 3, [1], {2: True}),
        ({}, 2, [0], {1: True}),
        ({}, 1, [], {0: False}),  # nothing comes before the step that chooses
        ({"search": "sparse"}, 2, [1], {2: True}),
        ({"search": "dense"}, 2, [1], {2: True}),
        ({}, 0, [], {0: False}),
        ({"refresh": 2}, 2, [0, 2, 4], {1: True, 3: True, 5: True}),
        ({"refresh": (0.7,)}, 2, [0, 3], {1: True, 4: True}),
        ({"stride": 2, "row_share": 0.5}, 2, [0], {1: True}),
        ({"refresh": 1}, 2, [0, 1, 2, 3, 4], {1: True, 2: True, 3: True, 4: True, 5: True}),
    ],
    ids=str,
)
def test_scores_are_sampled_one_step_before_blocks_are_chosen(
    pipe, samples, changes, dense, sampled, chosen
):
    method = Auto(budget="model_percentile", **changes)
    with sparsediff.enable(pipe, method, schedule=Schedule(dense_steps=dense)):
        generate(pipe, steps=6)
    assert samples[0] == [(layer, step) for step in sampled for layer in range(LAYERS)]
    assert samples[1] == [(layer, *x) for x in chosen.items() for layer in range(LAYERS)]


@pytest.mark.parametrize(("dense", "whose"), [(2, SHARED), (1, ALONE)])
def test_the_report_says_whose_budget_it_was(pipe, dense, whose):
    with sparsediff.enable(pipe, Auto(), schedule=Schedule(dense_steps=dense)) as handle:
        generate(pipe, steps=3)
        report = handle.report()
        assert report.budgets == {whose: LAYERS * BRANCHES}
        assert f"budget    {whose}: 4 choices of blocks" in str(report)
    with sparsediff.enable(pipe, Custom(), schedule=Schedule(dense_steps=dense)) as handle:
        generate(pipe, steps=3)
        assert handle.report().budgets == {}, "rows share nothing"


def test_layers_that_stay_dense_take_no_part(pipe, samples):
    schedule = Schedule(dense_steps=2, dense_layers=1)
    with sparsediff.enable(pipe, Auto(budget="model_percentile"), schedule=schedule):
        generate(pipe, steps=4)
    assert samples == ([(1, 0)], [(1, 1, True)])


@pytest.mark.parametrize("density", [0.3, 0.6])
def test_layers_differ_and_together_keep_what_was_asked_for(pipe, density):
    """Nearly: the bar is that of the step before, and every row keeps its best."""
    # One layer looks everywhere, the other at few tokens.
    pipe.transformer.blocks[0].attn1.norm_q.weight.data.mul_(0.05)
    with sparsediff.enable(
        pipe, Auto(density=density, budget="model_percentile"), schedule=Schedule(dense_steps=2)
    ) as handle:
        generate(pipe, steps=4, height=192, width=192, num_frames=33)
        layers = handle.report().layers
    shares = [2 * layer.density - 1 for layer in layers]  # two of the four steps are dense
    assert abs(sum(shares) / LAYERS - density) < 0.08
    assert max(shares) - min(shares) > 0.1


def test_layers_that_a_cache_left_out_keep_what_was_asked_for(monkeypatch):
    """Scores are sampled in a step in which first-block caching runs the first layer alone."""
    import diffusers

    monkeypatch.setattr("sparsediff.block_attention.CPU_BREAK_EVEN", 2.0)
    pipe = random_wan_pipeline(layers=3)
    # A first layer that looks at few tokens would lower the bar for the others.
    pipe.transformer.blocks[0].attn1.norm_q.weight.data.mul_(8.0)
    for block in pipe.transformer.blocks[1:]:
        block.attn1.norm_q.weight.data.mul_(0.05)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.2))
    with sparsediff.enable(pipe, Auto(row_share=0.0), schedule=Schedule(dense_steps=3)) as handle:
        generate(pipe, steps=8, height=192, width=192, num_frames=33)
        report = handle.report()
    first, *others = report.layers
    assert others[0].steps[1] is None, "left out of the step that samples"
    assert first.steps[1] is not None
    assert report.budgets[ALONE] == 2 * BRANCHES
    for layer in others:
        assert abs(layer.steps[-1] - 0.3) < 0.06


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_a_clip_does_not_depend_on_what_it_is_made_beside(pipe):
    method, schedule = Auto(budget="model_percentile", refresh=2), Schedule(dense_steps=2)
    prompts = ["a small red circle moves left", "two stars"]
    with sparsediff.enable(pipe, method, schedule=schedule):
        both = generate(pipe, steps=4, prompt=prompts, generator=seeded(0, 1))
        second = generate(pipe, steps=4, prompt=prompts[1], generator=seeded(1))
        again = generate(pipe, steps=4, prompt=prompts, generator=seeded(0, 1))
    assert torch.equal(both, again), "nothing is left of the run before"
    assert torch.allclose(both[1], second[0], rtol=0, atol=1e-4 * second.abs().max().item())


def test_steps_that_only_sample_stay_exact(pipe):
    stock = []
    generate(pipe, steps=4, callback_on_step_end=lambda p, i, t, k: stock.append(k["latents"]) or k)
    seen = []
    with sparsediff.enable(pipe, Auto(budget="model_percentile"), schedule=Schedule(dense_steps=3)):
        generate(
            pipe, steps=4, callback_on_step_end=lambda p, i, t, k: seen.append(k["latents"]) or k
        )
    assert torch.equal(torch.stack(seen[:2]), torch.stack(stock[:2]))
    assert not torch.equal(seen[3], stock[3])
