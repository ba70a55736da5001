"""When each method looks, what it keeps and what it reports, on a real Wan pipeline at a tiny random size."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import BRANCHES, LAYERS, SMALL, generate

import sparsediff
from sparsediff import (
    AdaSpa,
    AttentionSite,
    Auto,
    Custom,
    DraftAttention,
    LiteAttention,
    PAROAttention,
    Schedule,
    Segment,
    SparseD,
    SparseVDiT,
    TokenGrid,
)
from sparsediff.api import watch
from sparsediff.pipelines.wan import WanAdapter
from sparsediff.slot import slot_bytes
from sparsediff.testing import random_wan_pipeline

SEARCH = "search: blocks are chosen from exact attention"
COSTS = (1.0, 0.0, 0.3, 0.35, 0.4)
WINDOWS = ((1, 8, 8), "HWF", (3, 5, 7))


@pytest.fixture
def pipe(monkeypatch):
    monkeypatch.setattr("sparsediff.block_attention.CPU_BREAK_EVEN", 2.0)
    return random_wan_pipeline()


@functools.cache
def calibration(method):
    return sparsediff.calibrate(
        random_wan_pipeline(),
        method,
        ["a small red circle moves left"],
        call={**SMALL, "num_inference_steps": 3, "guidance_scale": 3.0},
        progress=False,
    )


def ready(method):
    """The method with what it needs."""
    if isinstance(method, PAROAttention | SparseVDiT):
        return method.calibrated(calibration(method))
    return method


@pytest.fixture
def looks(monkeypatch):
    """`(layer, step, whether a log-sum-exp came along)` of every choice of blocks in the "cond" branch."""
    seen = []
    for cls in (Custom, SparseD, AdaSpa):
        real = cls.keep_blocks

        def look(self, query, key, site, *, lse=None, real=real):
            if site.branch == "cond":
                seen.append((site.layer, site.step, lse is not None))
            return real(self, query, key, site, lse=lse)

        monkeypatch.setattr(cls, "keep_blocks", look)
    return seen


def dense_shares(report):
    return [step.dense_share for step in report.steps]


# -- when -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Auto(), Custom(windows=WINDOWS, block=64)], ids=str)
@pytest.mark.parametrize(
    ("schedule", "dense"),
    [
        (Schedule(dense_steps=2), 2),
        (Schedule(dense_steps=0.5), 3),
        (Schedule(dense_above_sigma=0.9), 2),  # 5 steps at a shift of 3: 1, 0.92, 0.82, ...
        (Schedule(dense_steps=1, dense_above_sigma=0.9), 2),
    ],
    ids=str,
)
def test_blocks_are_chosen_in_the_last_dense_step(pipe, looks, method, schedule, dense):
    with sparsediff.enable(pipe, method, schedule=schedule) as handle:
        generate(pipe, steps=5)
        report = handle.report()
    assert looks == [(layer, dense - 1, True) for layer in range(LAYERS)]
    assert dense_shares(report) == [1.0] * dense + [0.0] * (5 - dense)
    assert sum(report.dense_calls.values()) == dense * LAYERS * BRANCHES
    assert all(reason.startswith("schedule:") for reason in report.dense_calls)


def test_looking_ahead_leaves_the_dense_steps_exact(pipe):
    """Up to rounding: the call that looks runs our kernel, which also returns the log-sum-exp."""
    stock = generate(pipe, steps=3)
    with sparsediff.enable(pipe, Auto(), schedule=Schedule(dense_steps=3)):
        assert torch.equal(generate(pipe, steps=3), stock), "no sparse step follows: nobody looks"
    taken = []
    with sparsediff.enable(pipe, Auto(), schedule=Schedule(dense_steps=2)):

        def take(pipe, step, timestep, kwargs):
            taken.append(kwargs["latents"].clone())
            return kwargs

        generate(pipe, steps=3, callback_on_step_end=take)
    plain = []
    generate(pipe, steps=3, callback_on_step_end=lambda p, i, t, k: plain.append(k["latents"]) or k)
    assert torch.equal(taken[0], plain[0])
    assert torch.allclose(taken[1], plain[1], rtol=0, atol=1e-5 * plain[1].abs().max().item())
    assert not torch.allclose(taken[2], plain[2], rtol=0, atol=1e-5 * plain[2].abs().max().item())


def test_layers_that_stay_dense_never_look(pipe, looks):
    schedule = Schedule(dense_steps=1, dense_layers=1)
    with sparsediff.enable(pipe, Auto(), schedule=schedule) as handle:
        generate(pipe, steps=4)
        report = handle.report()
    assert looks == [(1, 0, True)]
    assert report.dense_calls == {"schedule: first steps": 4, "schedule: first layers": 6}


@pytest.mark.parametrize(
    ("search", "schedule", "expected", "dense"),
    [
        ("ahead", Schedule(dense_steps=1), [(0, True)], [1, 0, 0, 0]),
        ("ahead", Schedule(), [(0, False)], [0, 0, 0, 0]),
        ("dense", Schedule(dense_steps=1), [(1, True)], [1, 1, 0, 0]),
        ("dense", Schedule(), [(0, True)], [1, 0, 0, 0]),
        ("sparse", Schedule(dense_steps=1), [(1, False)], [1, 0, 0, 0]),
        ("sparse", Schedule(), [(0, False)], [0, 0, 0, 0]),
    ],
)
def test_how_a_hybrid_looks_first(pipe, looks, search, schedule, expected, dense):
    with sparsediff.enable(pipe, Custom(search=search), schedule=schedule) as handle:
        generate(pipe, steps=4)
        report = handle.report()
    assert looks == [(layer, *look) for look in expected for layer in range(LAYERS)]
    assert dense_shares(report) == dense
    searched = report.dense_calls.get(SEARCH, 0)
    assert searched == (LAYERS * BRANCHES if search == "dense" else 0)


@pytest.mark.parametrize("refresh", [2, (0.2, 0.6)])
@pytest.mark.parametrize("windows", [(), WINDOWS])
def test_a_hybrid_looks_again_sparsely(pipe, looks, refresh, windows):
    method = Custom(refresh=refresh, windows=windows)
    with sparsediff.enable(pipe, method, schedule=Schedule(dense_steps=1)) as handle:
        generate(pipe, steps=5)
        assert dense_shares(handle.report()) == [1, 0, 0, 0, 0]
    again = [2, 4] if refresh == 2 else [1, 3]
    assert looks == [(0, 0, True), (1, 0, True)] + [(i, s, False) for s in again for i in (0, 1)]


def test_sparse_d_makes_its_mask_in_one_more_dense_step(pipe, looks):
    with sparsediff.enable(pipe, SparseD(skip=0.4, block=64)) as handle:
        generate(pipe, steps=5)
        report = handle.report()
    assert looks == [(0, 2, True), (1, 2, True)]
    assert dense_shares(report) == [1, 1, 1, 0, 0]
    assert report.dense_calls == {
        "schedule: first steps": 2 * LAYERS * BRANCHES,
        SEARCH: LAYERS * BRANCHES,
    }
    assert report.steps[3].density == report.steps[4].density


def simulate(method, num_steps):
    """`(dense steps, steps that choose blocks)` of one layer."""
    grid, schedule = TokenGrid.video(5, 8, 8), method.default_schedule()
    dense, chosen, last = [], [], None
    for step in range(num_steps):
        site = AttentionSite(
            layer=0, num_layers=1, step=step, num_steps=num_steps, sigma=0.5, branch="c", grid=grid
        )  # fmt: skip
        if schedule.dense_reason(site):
            dense.append(step)
            continue
        if method.refreshes(site, last):
            if method.searches_dense(site, last):
                dense.append(step)
            chosen.append(step)
            last = step
    return dense, chosen


@pytest.mark.parametrize(
    ("num_steps", "first", "second"),
    [(5, 1, 3), (10, 2, 6), (50, 10, 30)],
)
def test_adaspa_searches_twice(num_steps, first, second):
    assert simulate(AdaSpa(), num_steps) == (list(range(first + 1)), [first, second])


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7, 30])
def test_adaspa_searches_at_most_twice_however_few_steps(num_steps):
    dense, chosen = simulate(AdaSpa(), num_steps)
    assert len(chosen) <= 2
    assert dense == list(range(len(dense)))


def test_adaspa_in_a_run(pipe, looks):
    """The second search is sparse, and uses the log-sum-exp of the first."""
    with sparsediff.enable(pipe, AdaSpa()) as handle:
        generate(pipe, steps=5)
        report = handle.report()
    assert looks == [(layer, step, True) for step in (1, 3) for layer in range(LAYERS)]
    assert dense_shares(report) == [1, 1, 0, 0, 0]
    assert report.dense_calls == {"schedule: first steps": 4, SEARCH: 4}


def test_calibrated_methods_look_up_at_every_stretch(pipe):
    for method in (PAROAttention(bins=3), SparseVDiT(bins=3, costs=COSTS)):
        with sparsediff.enable(pipe, ready(method)) as handle:
            at = []

            def note(pipe, step, timestep, kwargs, handle=handle, at=at):
                at.append([slot.refreshed_at for slot in handle.states[0]._slots["cond"]])
                return kwargs

            generate(pipe, steps=6, callback_on_step_end=note)
        assert at == [[s - s % 2] * LAYERS for s in range(6)]


# -- what is kept ---------------------------------------------------------------------------------------------------


def test_the_vote_thins_between_looks_and_a_look_brings_back(pipe):
    method = Custom(density=0.6, vote_threshold_log2=-0.5, refresh=3, search="sparse")
    with sparsediff.enable(pipe, method, schedule=Schedule()) as handle:
        kept = []

        def note(pipe, step, timestep, kwargs):
            slot = handle.states[0]._slots["cond"][0]
            kept.append(slot.mask((64, 64), 320).to_dense())
            return kwargs

        generate(pipe, steps=5, callback_on_step_end=note)
        report = handle.report()
    for before, after in ((0, 1), (1, 2), (3, 4)):
        assert (kept[after] <= kept[before]).all()
    density = [step.density for step in report.steps]
    assert density[0] == density[3] > density[2]


def kept_by(pipe, method, steps=5):
    """`(bytes of state, its log-sum-exps)` after every step."""
    after = []
    with sparsediff.enable(pipe, method) as handle:
        state = handle.states[0]

        def note(pipe, step, timestep, kwargs):
            kept = [slot.lse for layers in state._slots.values() for slot in layers if slot]
            after.append((state.state_bytes(), [x for x in kept if x is not None]))
            return kwargs

        generate(pipe, steps=steps, callback_on_step_end=note)
        assert "kept between steps" in handle.summary()
    return after


def test_state_bytes_count_masks_and_log_sum_exp(pipe):
    """Five rows of one byte and 40 bytes of index lists a head; 2 bytes a token for the log-sum-exp, until the last search."""
    once, twice = (kept_by(pipe, AdaSpa(search=searches)) for searches in ((0.2,), (0.2, 0.6)))
    masks = LAYERS * BRANCHES * 2 * (5 + 5 * 5 * 4)
    assert [held for held, _ in once] == [0] + [masks] * 4
    assert [len(kept) for _, kept in once] == [0] * 5
    lse = LAYERS * BRANCHES * 2 * 320 * 2
    assert [held for held, _ in twice] == [0] + [masks + lse] * 2 + [masks] * 2
    assert {(x.dtype, tuple(x.shape)) for x in twice[1][1]} == {(torch.float16, (1, 2, 320))}


def test_what_is_too_large_to_keep_is_found_again(pipe, looks, monkeypatch):
    """A log-sum-exp that would take the state over its target: nobody is warned, and the second search does without."""
    of_layer = sum(slot_bytes(1, 2, (320, 320), (64, 64), keeps_lse=True))
    monkeypatch.setattr("sparsediff.slot.STATE_TARGET_BYTES", LAYERS * BRANCHES * of_layer - 1)
    after = kept_by(pipe, AdaSpa())
    assert [kept for _, kept in after] == [[]] * 5
    assert [(step, known) for layer, step, known in looks if layer == 0] == [(1, True), (3, False)]
    # Two clips at once decide as each of them would alone.
    looks.clear()
    monkeypatch.setattr("sparsediff.slot.STATE_TARGET_BYTES", LAYERS * BRANCHES * of_layer)
    told = pytest.warns(RuntimeWarning, match="MB of log-sum-exps between steps")
    with sparsediff.enable(pipe, AdaSpa()), told:
        generate(pipe, steps=5, num_videos_per_prompt=2)
    assert [(step, known) for layer, step, known in looks if layer == 0] == [(1, True), (3, True)]


def test_more_memory_than_a_run_should_keep_is_told_once(pipe, monkeypatch):
    """Both guidance branches count, and what is told beforehand is what is kept."""
    of_layer, _ = slot_bytes(1, 2, (320, 320), (64, 64), keeps_lse=False)
    with sparsediff.enable(pipe, SparseD()) as handle:
        generate(pipe)
        assert handle.states[0].state_bytes() == LAYERS * BRANCHES * of_layer
    said = "blocks of 64 x 64 tokens between steps, for each guidance branch; blocks of 128"
    monkeypatch.setattr("sparsediff.slot.STATE_TARGET_BYTES", LAYERS * BRANCHES * of_layer - 1)
    with sparsediff.enable(pipe, SparseD()):
        with pytest.warns(RuntimeWarning, match=said) as told:
            generate(pipe)
        assert len(told) == 1
        generate(pipe)


def test_more_branches_than_are_kept_are_told_once(pipe, monkeypatch):
    monkeypatch.setattr("sparsediff.slot.MAX_BRANCHES", 1)
    with sparsediff.enable(pipe, Custom(block=64), schedule=Schedule()) as handle:
        with pytest.warns(RuntimeWarning, match="more than 1 guidance branches") as told:
            generate(pipe)
        assert len(told) == 1
        assert set(handle.states[0]._slots) == {"uncond"}


EVERY_METHOD = [
    Auto(),
    Custom(windows=WINDOWS, refresh=2, search="sparse"),
    LiteAttention(threshold=-2.0, tile=(64, 64), must_keep=((0, 10),), must_skip=((64, 128),)),
    DraftAttention(pool_h=8, pool_w=8),
    SparseD(block=64),
    AdaSpa(),
    PAROAttention(bins=3),
    SparseVDiT(bins=3, costs=COSTS, epsilon=1.0),
]


@pytest.mark.parametrize("method", EVERY_METHOD, ids=lambda m: m.name)
def test_a_second_generation_equals_a_fresh_pipeline(pipe, method):
    """Of another seed, size or number of steps before it nothing is left."""
    method = ready(method)
    bound = getattr(method, "calibration", None) is not None
    with sparsediff.enable(pipe, method) as handle:
        generate(pipe, seed=1, steps=5, **({} if bound else {"height": 96}))
        second = generate(pipe)
        report = handle.report()
    fresh = random_wan_pipeline()
    with sparsediff.enable(fresh, method) as handle:
        first = generate(fresh)
        again = handle.report()
    assert torch.equal(first, second)
    assert report.density == again.density < 1
    assert report.dense_calls == again.dense_calls


def test_second_generations_equal_fresh_processes(pipe, tmp_path):
    """Of all methods, calibrations included, in the opposite order: no cache of the process changes a bit."""
    code = f"""
import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]!r}
import torch, sparsediff.block_attention, test_state_machine as t
torch.set_num_threads({torch.get_num_threads()})
sparsediff.block_attention.CPU_BREAK_EVEN = 2.0
outs = {{}}
for method in t.EVERY_METHOD[::-1]:
    pipe = t.random_wan_pipeline()
    with sparsediff.enable(pipe, t.ready(method)):
        outs[method.name] = t.generate(pipe)
torch.save(outs, {str(tmp_path / "fresh.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    fresh = torch.load(tmp_path / "fresh.pt")
    for method in EVERY_METHOD:
        with sparsediff.enable(pipe, ready(method)):
            generate(pipe, seed=1)
            assert torch.equal(generate(pipe), fresh[method.name]), method.name


# -- windows chosen while the run goes on ---------------------------------------------------------------------------


def text_in_front(real, rows):
    def token_grid(self, model, arguments):
        f, h, w = real(self, model, arguments).shape
        grid = Segment(role="grid", length=(f - 1) * h * w, shape=(f - 1, h, w))
        words = Segment(role="text", length=rows)
        return TokenGrid((words, grid, Segment(role="image", length=h * w - rows)))

    return token_grid


KEEP_ALL = [
    Auto(density=1.0),
    Auto(density=1.0, search="sparse", refresh=1),
    Auto(density=1.0, budget="model_percentile", row_share=0.5, stride=2, refresh=1),
    Custom(density=1.0, windows=WINDOWS),
    Custom(density=1.0, windows=WINDOWS, search="dense", producer="pooled"),
    Custom(density=1.0, windows=((4, 4, 4),), budget="head_percentile", search="sparse"),
    Custom(density=1.0, budget="row_top_p", vote_threshold_log2=-1e9),
    AdaSpa(sparsity=0.0),
    SparseD(select=1.0, block=64),
]


@pytest.mark.parametrize("text", [0, 20, 64])
@pytest.mark.parametrize("method", KEEP_ALL, ids=str)
def test_keeping_everything_changes_nothing(pipe, method, text, monkeypatch):
    """Query, key and value move together and the output back, also beside text before and after the grid."""
    stock = generate(pipe)
    if text:
        monkeypatch.setattr(WanAdapter, "token_grid", text_in_front(WanAdapter.token_grid, text))
    with sparsediff.enable(pipe, method, schedule=Schedule(dense_steps=1)) as handle:
        out = generate(pipe)
        report = handle.report()
    assert sum(report.dense_calls.values()) < report.calls
    assert report.density == 1.0
    assert torch.allclose(out, stock, rtol=0, atol=3e-5 * stock.abs().max().item())


def test_heads_choose_windows_of_their_own(pipe, monkeypatch):
    """What was chosen stays until the next look, in every branch and layer."""
    picked = iter([[0, 1], [2, 0], [1, 1], [0, 2]])

    def choose(self, query, key, site, lse):
        assert lse is not None
        return torch.tensor(next(picked), dtype=torch.int32)

    monkeypatch.setattr(Custom, "choose_windows", choose)
    stock = generate(pipe)
    method = Custom(density=1.0, windows=WINDOWS)
    with sparsediff.enable(pipe, method, schedule=Schedule(dense_steps=1)) as handle:
        out = generate(pipe, steps=3)
        slots = handle.states[0]._slots
        heads = [slot.heads.tolist() for layers in slots.values() for slot in layers]
    assert heads == [[0, 1], [2, 0], [1, 1], [0, 2]]
    assert torch.allclose(out, stock, rtol=0, atol=3e-5 * stock.abs().max().item())


@pytest.mark.parametrize("text", [0, 20])
@pytest.mark.parametrize(
    "method",
    [Auto(density=0.5), Custom(windows=WINDOWS, density=0.5), AdaSpa(), SparseD(block=64)],
    ids=lambda m: m.name,
)
def test_the_log_sum_exp_of_a_dense_search_is_that_of_its_rows(pipe, method, text, monkeypatch):
    """In the order that the rows have by then: with it the choice is the one that is made without."""
    differ, real = [], type(method).keep_blocks

    def look(self, query, key, site, *, lse=None):
        keep = real(self, query, key, site, lse=lse)
        if lse is not None:
            fresh = real(self, query, key, site)
            differ.append((keep != fresh).float().mean().item())
        return keep

    monkeypatch.setattr(type(method), "keep_blocks", look)
    if text:
        monkeypatch.setattr(WanAdapter, "token_grid", text_in_front(WanAdapter.token_grid, text))
    once = AdaSpa(search=(0.2,)) if isinstance(method, AdaSpa) else method
    with sparsediff.enable(pipe, once, schedule=Schedule(dense_steps=1)):
        generate(pipe)
    assert differ == [0.0] * (LAYERS * BRANCHES)


def test_a_window_is_chosen_by_the_mass_it_holds():
    """One head attends within patches of a frame, the other to its place in all frames."""
    grid = TokenGrid.video(8, 8, 16)
    where = grid.coordinates()
    patch = torch.nn.functional.one_hot(where[:, 0] * 2 + where[:, 2] // 8, 16).float()
    place = torch.nn.functional.one_hot(where[:, 1] * 16 + where[:, 2], 128).float()
    q = torch.zeros(1, 1024, 2, 128)
    q[0, :, 0, :16], q[0, :, 1] = patch * 12, place * 12
    site = AttentionSite(
        layer=0, num_layers=1, step=0, num_steps=3, sigma=1.0, branch="c", grid=grid
    )
    method = Auto(density=0.1, block=64)
    windows = method.order(site).windows
    lse = torch.einsum("bihd,bjhd->bhij", q, q).div(128**0.5).logsumexp(-1)
    for known in (None, lse):
        heads = method.choose_windows(q, q, site, known)
        assert [windows[i] for i in heads[0].tolist()] == [(1, 8, 8), (8, 2, 4)]


# -- modes by head --------------------------------------------------------------------------------------------------


def test_vdit_heads_of_all_modes_run_in_one_launch(pipe, monkeypatch):
    """Skipped heads give zeros, dense ones the exact output, in one kernel call a layer."""
    import dataclasses

    from sparsediff import block_attention

    method = SparseVDiT(bins=1, costs=COSTS)
    measured = calibration(method)
    modes = torch.tensor([[[0, 1], [3, 4]]], dtype=torch.uint8)
    tensors = {**measured.tensors, "modes": modes}
    method = method.calibrated(dataclasses.replace(measured, tensors=tensors))
    launches, real = [], block_attention.run_backend
    monkeypatch.setattr(
        block_attention, "run_backend", lambda *a, **k: launches.append(a[0]) or real(*a, **k)
    )
    errors = []

    def look(call):
        dense, (sparse, _) = call.dense(), call.sparse()
        if call.site.layer == 0:
            assert (sparse[:, :, 1] == 0).all()
            errors.append((sparse - dense)[:, :, 0].abs().max() / dense.abs().max())
        return sparse

    with watch(pipe, look, method=method):
        generate(pipe)
    assert len(launches) == 3 * LAYERS * BRANCHES
    assert max(errors) < 1e-5


@pytest.mark.parametrize("method", [Auto(density=0.4, block=64), AdaSpa(sparsity=0.6)])
def test_a_clip_does_not_depend_on_what_it_is_generated_beside(pipe, method):
    prompts, seeds = ["a small red circle moves left", "a large green square turns"], (3, 8)
    with sparsediff.enable(pipe, method, schedule=Schedule(dense_steps=1)):
        both = generate(
            pipe, prompt=prompts, generator=[torch.Generator().manual_seed(s) for s in seeds]
        )
        for prompt, seed, clip in zip(prompts, seeds, both, strict=True):
            alone = generate(pipe, prompt=prompt, seed=seed)[0]
            assert torch.allclose(clip, alone, rtol=0, atol=1e-4 * alone.abs().max().item())


def test_who_watches_sees_the_search_where_it_is(pipe, looks):
    flags = []

    def watcher(call):
        if call.sparse is None:
            return call.dense()
        out, sparse = call.sparse()
        flags.append((call.site.step, sparse))
        return out

    with watch(pipe, watcher, method=Auto(block=64), schedule=Schedule(dense_steps=2)):
        generate(pipe)
    assert {step for _, step, lse in looks if lse} == {1}
    assert {step for step, sparse in flags if not sparse} == {1}
    assert {step for step, sparse in flags if sparse} == {2}
