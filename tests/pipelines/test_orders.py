"""Token orders that differ by head and by layer, through a real Wan pipeline at a tiny random size."""

import contextlib
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from families import hunyuan_video

import sparsediff
from sparsediff import (
    LiteAttention,
    Schedule,
    Segment,
    TokenGrid,
    TokenOrder,
    block_attention,
    token_grid,
)
from sparsediff.kernels.block_scores import block_mass
from sparsediff.methods import Method
from sparsediff.pipelines.wan import WanAdapter
from sparsediff.testing import random_wan_pipeline

# Two heads of each of two layers, all with windows of their own; the last ones divide no grid.
WINDOWS = (((1, 8, 8), (4, 4, 4)), ((1, 1, 64), (3, 5, 7)))


@dataclass(frozen=True, kw_only=True)
class PerHead(Method):
    """Keeps blocks above a share of the mean block mass, in another order in every head and layer."""

    name: ClassVar[str] = "per_head"
    summary: ClassVar[str] = "for tests"
    citation: ClassVar[str] = "none"

    above: float = 0.0
    turns: bool = False  # whether the heads change places after the first step

    def block_size(self, grid):
        return (64, 64)

    def order(self, site):
        windows = WINDOWS[site.layer]
        return TokenOrder.per_head(windows[::-1] if self.turns and site.step else windows)

    def keep_blocks(self, query, key, site, *, lse=None):
        mass = block_mass(query, key, (64, 64))
        return mass >= self.above * mass.mean((-1, -2), keepdim=True)


def generate(pipe, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt="a small red circle moves left",
        height=128,
        width=128,
        num_frames=17,
        num_inference_steps=3,
        guidance_scale=3.0,
        max_sequence_length=16,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **kwargs,
    ).frames


@pytest.fixture
def pipe(monkeypatch):
    monkeypatch.setattr("sparsediff.block_attention.CPU_BREAK_EVEN", 2.0)
    return random_wan_pipeline()


def masks(handle, branch="cond"):
    return [slot.mask((64, 64), 320).to_dense() for slot in handle.states[0]._slots[branch]]


@pytest.mark.parametrize("turns", [False, True])
def test_keeping_every_block_changes_nothing(pipe, turns):
    stock = generate(pipe)
    with sparsediff.enable(pipe, PerHead(turns=turns), schedule=Schedule()) as handle:
        out = generate(pipe)
        report = handle.report()
    assert report.dense_calls == {}, "the sparse kernel must have run"
    assert report.density == 1.0
    assert torch.allclose(out, stock, rtol=0, atol=2e-5 * stock.abs().max().item())


def test_a_mask_is_not_used_under_another_order(pipe):
    """The same window in the other head: blocks are chosen afresh at step 1, though nothing asked for a refresh."""
    refreshed = []
    for turns in (False, True):
        with sparsediff.enable(pipe, PerHead(above=0.5, turns=turns), schedule=Schedule()) as run:
            generate(pipe)
            slots = run.states[0]._slots["cond"]
            refreshed.append([slot.refreshed_at for slot in slots])
    assert refreshed == [[0, 0], [1, 1]]


def test_heads_choose_in_their_own_order(pipe):
    """A head whose neighbours in its window attend to each other keeps its diagonal; so does the other."""
    with sparsediff.enable(pipe, PerHead(above=1.0), schedule=Schedule()) as handle:
        generate(pipe)
        kept = masks(handle)
    assert not torch.equal(kept[0][:, 0], kept[0][:, 1])


def test_above_break_even_a_cpu_does_not_move_tokens(monkeypatch):
    """What runs dense leaves the tokens where they are; choosing blocks takes queries and keys alone."""
    moved, real = [], token_grid.gather_tokens

    def count(tensors, *rest):
        moved.append(len(tensors))
        return real(tensors, *rest)

    monkeypatch.setattr(token_grid, "gather_tokens", count)
    for above, expected in ((0.0, [2] * 4), (1.2, [2, 1, 1] * 4 + [3, 1] * 8)):
        pipe = random_wan_pipeline()
        moved.clear()
        with sparsediff.enable(pipe, PerHead(above=above), schedule=Schedule()) as handle:
            with maybe_dense(above == 0.0):
                generate(pipe)
            density = handle.report().density
        # Two layers in two branches choose at the first of three steps.
        assert moved == expected
        assert (density == 1.0) == (above == 0.0)


def maybe_dense(expected):
    """That running dense is said to the user, where it is expected."""
    if expected:
        return pytest.warns(RuntimeWarning, match="mask density above 0.65")
    return contextlib.nullcontext()


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("descending", ["descending"] * 3),
        ("alternate", ["descending", "ascending", "descending"]),
        ("centre-out", ["centre-out"] * 3),
    ],
)
def test_blocks_are_visited_in_the_order_asked_for(pipe, monkeypatch, order, expected):
    """In every call, the first of a generation as well; a mask only ever shrinks."""
    seen, real = [], block_attention.run_backend

    def look(name, query, key, value, mask, **options):
        seen.append((mask.visits, mask.to_dense(), mask.kv_indices, mask.kv_num_blocks))
        return real(name, query, key, value, mask, **options)

    monkeypatch.setattr(block_attention, "run_backend", look)
    method = LiteAttention(threshold=-1.0, tile=(64, 64), visiting_order=order)
    with sparsediff.enable(pipe, method, schedule=Schedule()):
        generate(pipe)
    calls = [seen[i : i + 4] for i in range(0, 12, 4)]  # two branches of two layers a step
    assert [{visits for visits, *_ in step} for step in calls] == [{e} for e in expected]
    for before, after in pairwise(calls):
        assert all((new[1] <= old[1]).all() for old, new in zip(before, after, strict=True))
    assert not calls[-1][0][1].all(), "something is to be skipped"
    for step, visits in zip(calls, expected, strict=True):
        _, _, lists, counts = step[0]
        kept = lists[0, 0, 0, : counts[0, 0, 0]].tolist()
        first = {"descending": max(kept), "ascending": min(kept), "centre-out": 0}
        assert kept[-1] == first[visits]


def test_calls_with_padded_keys_are_visited_descending(monkeypatch):
    """Kernels count the blocks before a key length by a search in ascending lists."""
    seen, real = [], block_attention.run_backend

    def look(name, query, key, value, mask, **options):
        seen.append((mask.visits, options["kv_lengths"] is not None))
        return real(name, query, key, value, mask, **options)

    monkeypatch.setattr(block_attention, "run_backend", look)
    pipe = hunyuan_video.build()
    pipe.set_progress_bar_config(disable=True)
    method = LiteAttention(threshold=-1.0, tile=(16, 16), visiting_order="centre-out")
    with sparsediff.enable(pipe, method, schedule=Schedule()) as handle:
        hunyuan_video.call(pipe, (128, 128, 5), guidance="off")
        assert handle.report().density < 1
    assert set(seen) == {("descending", True)}


def test_tokens_outside_the_grid_are_exact_in_every_head(pipe, monkeypatch):
    """The last latent frame plays text in front: after the reordering it is the last block, whole, in each head."""
    real = WanAdapter.token_grid

    def with_text(self, model, arguments):
        f, h, w = real(self, model, arguments).shape
        grid = Segment(role="grid", length=(f - 1) * h * w, shape=(f - 1, h, w))
        return TokenGrid((Segment(role="text", length=h * w), grid))

    stock = generate(pipe)
    monkeypatch.setattr(WanAdapter, "token_grid", with_text)
    with sparsediff.enable(pipe, PerHead(above=1.2), schedule=Schedule()) as handle:
        generate(pipe)
        kept = masks(handle)
    for keep in kept:
        assert keep[..., 4, :].all()
        assert keep[..., :, 4].all()
        assert not keep[..., :4, :4].all()
    with sparsediff.enable(pipe, PerHead(), schedule=Schedule()):
        out = generate(pipe)
    assert torch.allclose(out, stock, rtol=0, atol=2e-5 * stock.abs().max().item())
