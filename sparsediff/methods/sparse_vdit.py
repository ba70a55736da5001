"""Sparse-vDiT: sparse attention patterns for video diffusion transformers (Chen et al., arXiv:2506.03065).

The maps of a head look like one of a few pictures, and which one is the model's doing, not the prompt's.  So each head
gets, for each stretch of steps, one of five modes: dense, skipped, a diagonal window, a window after the frames of a
place have been laid side by side (multi-diagonal), or a fixed set of key columns (vertical stripes).  The choice is made
offline by the error of the output and the cost of the mode (section 3.3).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsediff import calibration_memory as memory
from sparsediff.block_mask import (
    BlockMask,
    forced_blocks,
    pack_bits,
    unpack_bits,
)
from sparsediff.calibration import (
    Calibration,
    Calibrator,
    Call,
    ModelLayout,
    nearest_seen,
    per_calibration,
    pinned,
    step_bin,
)
from sparsediff.kernels.attention import attend_blocks
from sparsediff.kernels.block_scores import block_mass
from sparsediff.methods.base import AttentionSite, StaticMethod
from sparsediff.timing import seconds
from sparsediff.token_grid import TokenGrid, TokenOrder

MODES = ("dense", "skip", "diagonal", "multi-diagonal", "stripe")
DENSE, SKIP, DIAGONAL, MULTI, STRIPE = range(5)
# Tensors of a call that measuring some heads holds at once: three in order, two outputs, and three in float32, which
# count twice in 16 bits.
COPIES = 11
CLOSE_ENOUGH = 0.95  # share of the density asked for below which its user is told
AXIS_ORDERS = ("FHW", "HWF")  # the sequence as it is; all frames of a place side by side


@dataclass(frozen=True, kw_only=True)
class SparseVDiT(StaticMethod):
    """One of five patterns a head and stretch of steps, from `sparsediff calibrate`.

    Attributes:
        density: share of the video's blocks that the search aims at, in the mean over heads: with it a mode costs its
            share of blocks, and the weight of cost against error is the one that just gets there.  What is left then
            goes, step by step, to the head whose error it lessens most, and what a layer cannot spend to the next.
            None uses `lambda_`, `epsilon` and measured time.
        lambda_: weight of a mode's cost, in units of a dense call's time, against the relative squared error of its
            output (published: 0.5, against an absolute error).
        epsilon: a head stays dense if the best sparse mode's error and weighted cost together exceed this.
        window: share of the key blocks that the two windows keep.
        stripes: share of the key blocks that the stripes keep.
        bins: equal stretches of the run, each with modes of its own.
        block: tokens a block.
        costs: time of the five modes relative to a dense call; None measures them on the device, the one thing in a
            calibration on which two runs may differ.

    There is no public code, and window widths and stripes are unpublished: ours are above.  Mended: the error is
    relative, so that one `lambda_` means the same in every head; the cost is the measured time of our kernel, where the
    paper has the share of blocks; the sign of the cost is that of the main text.
    """

    name: ClassVar[str] = "sparse_vdit"
    summary: ClassVar[str] = (
        "one of five patterns by head, searched offline by output error and measured time"
    )
    needs_video: ClassVar[str] = "follows patterns of frames"
    citation: ClassVar[str] = "arXiv:2506.03065"

    tensor_names: ClassVar[tuple[str, ...]] = ("modes", "stripes")

    density: float | None = None
    lambda_: float = 0.05
    epsilon: float = 0.05
    window: float = 0.25
    stripes: float = 0.25
    bins: int = 4
    block: int = 64
    costs: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.density is not None:
            self._require("density", float, lambda x: 0 < x <= 1, "a share in (0, 1] or None")
        for name in ("lambda_", "epsilon"):
            self._require(name, float, lambda x: x >= 0, "a number >= 0")
        for name in ("window", "stripes"):
            self._require(name, float, lambda x: 0 < x <= 1, "a share in (0, 1]")
        self._require("bins", int, lambda x: x >= 1, "a whole number >= 1")
        self._require("block", int, lambda x: x in (64, 128), "64 or 128")
        if self.costs is not None:
            self._require(
                "costs",
                tuple,
                lambda x: (
                    len(x) == len(MODES) and all(isinstance(c, int | float) and c >= 0 for c in x)
                ),
                f"{len(MODES)} numbers >= 0, for {', '.join(MODES)}",
            )

    def block_size(self, grid: TokenGrid) -> tuple[int, int]:
        """Square blocks."""
        return (self.block, self.block)

    def order(self, site: AttentionSite) -> TokenOrder | None:
        """Multi-diagonal heads walk all frames of a place before the next place; without any, nobody moves.

        Blocks were measured with the grid in front, so behind text it has to come forward all the same.
        """
        if self.calibration is None:
            return None
        where = self._bin(site.step, site), self.calibration.row(site.name)
        return _orders(self.calibration, *where, in_front=site.grid.grid_span[0] == 0)

    def keep_blocks(
        self, query: Tensor, key: Tensor, site: AttentionSite, *, lse: Tensor | None = None
    ) -> Tensor:
        """The pattern of each head; heads of all modes run in one launch, by their lists."""
        where = self._bin(site.step, site), self.calibration.row(site.name)
        modes, stripes = (
            pinned(self.calibration, name)[where].to(query.device, non_blocking=True)
            for name in ("modes", "stripes")
        )
        blocks = -(-key.shape[1] // self.block)
        table = patterns(site.grid, self.block, self.window, query.device)
        return kept(table, modes, unpack_bits(stripes, blocks))[None]

    def calibrator(self, layout: ModelLayout) -> Calibrator:
        """One pass, in which every layer already sees what the chosen modes made of the layers before it."""
        return _VDiTCalibrator(self, layout)


@per_calibration
def _orders(
    calibration: Calibration, stretch: int, row: int, *, in_front: bool
) -> TokenOrder | None:
    modes = calibration.tensors["modes"][stretch, row].tolist()
    if in_front and MULTI not in modes:
        return None
    return _walk(modes)


def _walk(modes: Iterable[int]) -> TokenOrder:
    """Heads of the multi-diagonal mode walk frames first."""
    return TokenOrder(AXIS_ORDERS, tuple(int(mode == MULTI) for mode in modes))


def kept(table: Tensor, modes: Tensor, columns: Tensor) -> Tensor:
    """`bool [H, Mq, Nk]`: what `modes` `[H]` keep, from `patterns` and the stripes `columns` `bool [H, Nk]`."""
    keep = table[modes.long().clamp(max=STRIPE - 1)]
    return torch.where((modes == STRIPE)[:, None, None], columns[:, None, :], keep)


@functools.lru_cache(maxsize=8)
def patterns(grid: TokenGrid, block: int, window: float, device: torch.device) -> Tensor:
    """`bool [4, Mq, Nk]`: everything, nothing and twice the band of `window`, over the grid in any order.

    The band keeps at most `window` of the video's blocks, and the diagonal always.
    """
    blocks = -(-grid.num_tokens // block)
    n = grid.whole_blocks(block, reordered=True).stop
    place = torch.arange(blocks, device=device)
    distance = (place[:, None] - place).abs()
    half = max((h for h in range(n) if n + h * (2 * n - h - 1) <= window * n * n), default=0)
    band = distance <= half
    return torch.stack([torch.ones_like(band), torch.zeros_like(band), band, band])


def assign(error: Tensor, cost: Tensor, lambda_: float, epsilon: float) -> Tensor:
    """The mode of each head, `uint8 [H]`, from `error` `[H, 5]` and `cost` `[5]` (section 3.3).

    The sparse mode with the least `error + lambda_ * cost`; dense if that is above `epsilon`.
    """
    loss = error + lambda_ * cost
    best = loss[:, SKIP:].min(-1)
    return torch.where(best.values > epsilon, DENSE, best.indices + SKIP).to(torch.uint8)


def assign_to_density(error: Tensor, densities: Tensor, target: float) -> Tensor:
    """`assign` at the cost of blocks, weighted just enough for the heads' mean density to be at most `target`.

    A head is dense if that is its least loss: the paper's cut-off, at the weighted cost of a dense call.  Heads with
    alike errors change their modes at one weight, so a good part of the target may be left; `spend` gives it out.
    """
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        modes = assign(error, densities, middle, middle)
        low, high = (low, middle) if densities[modes.long()].mean() <= target else (middle, high)
    modes = assign(error, densities, high, high)
    return spend(error, densities, modes, target)


def spend(error: Tensor, densities: Tensor, modes: Tensor, target: float) -> Tensor:
    """Raise modes one at a time while the mean density stays at most `target`, each time where a block saves most error."""
    modes = modes.long()
    while True:
        cost = densities - densities[modes][:, None]  # [H, 5]
        saved = error.gather(1, modes[:, None]) - error
        room = target * len(modes) - densities[modes].sum() + 1e-9
        fits = (cost > 0) & (cost <= room) & (saved > 0)
        if not fits.any():
            return modes.to(torch.uint8)
        best = (saved / cost).where(fits, -torch.inf).argmax().item()
        modes[best // len(densities)] = best % len(densities)


class _VDiTCalibrator(Calibrator):
    def __init__(self, method: SparseVDiT, layout: ModelLayout) -> None:
        self.method, self.rows = method, {name: i for i, name in enumerate(layout.layers)}
        shape = (method.bins, len(layout.layers), layout.heads, len(MODES))
        self.error = torch.zeros(shape, dtype=torch.float64)
        self.calls = torch.zeros(shape[:2], dtype=torch.float64)
        self.columns: dict[str, Tensor] = {}  # "bin row" -> float32 [H, Nk], mass of each key block
        self.cost = (
            None if method.costs is None else torch.tensor(method.costs, dtype=torch.float64)
        )
        self.densities: Tensor | None = None
        self.spent = torch.zeros(shape[:3], dtype=torch.float64)  # density of each head's mode
        self.visual = 0  # blocks that hold nothing but the grid, in front in every order

    def attend(self, call: Call) -> Tensor:
        """The errors of all modes, a few heads at a time; what the best ones give goes on to the next layer."""
        site = call.site
        stretch, row = step_bin(site.step, site.num_steps, self.method.bins), self.rows[site.name]
        table = patterns(site.grid, self.method.block, self.method.window, call.query.device)
        columns = self._columns(call, f"{stretch} {row}")
        groups = list(memory.head_groups(call.query, COPIES))
        if self.densities is None:
            self.densities = self._densities(table, columns)
        if self.cost is None:
            self.cost = self._measure_cost(call, groups[0], table, columns)
        out = call.dense()
        for heads in groups:
            error = self._errors(call, heads, table, columns, out[:, :, heads].float())
            self.error[stretch, row, heads] += error.double().cpu()
        self.calls[stretch, row] += 1
        modes = self._assign(stretch, row)
        for heads in groups:
            if (modes[heads] != DENSE).any():
                chosen = self._output(call, heads, modes[heads], table, columns)
                sparse = (modes[heads] != DENSE).to(out.device)[:, None]
                out[:, :, heads] = chosen.where(sparse, out[:, :, heads])
        return out

    def _errors(
        self, call: Call, heads: slice, table: Tensor, columns: Tensor, dense: Tensor
    ) -> Tensor:
        """Relative squared error of every mode's output, `[heads, 5]`."""
        size = dense.square().sum((0, 1, 3)).clamp_min(1e-20)
        errors = [torch.zeros_like(size)]
        for mode in range(SKIP, len(MODES)):
            modes = torch.full((dense.shape[2],), mode)
            out = self._output(call, heads, modes, table, columns).float()
            errors.append(out.sub_(dense).square_().sum((0, 1, 3)) / size)
        return torch.stack(errors, -1)

    def _assign(self, stretch: int, row: int) -> Tensor:
        method, error = self.method, self.error[stretch, row] / self.calls[stretch, row]
        if method.density is None:
            return assign(error, self.cost, method.lambda_, method.epsilon)
        before = self.spent[stretch, :row][self.calls[stretch, :row] > 0]
        budget = method.density * (before.numel() + len(error)) - before.sum().item()
        modes = assign_to_density(error, self.densities, budget / len(error))
        self.spent[stretch, row] = self.densities[modes.long()]
        return modes

    def _columns(self, call: Call, where: str) -> Tensor:
        """`bool [H, Nk]`: the key blocks with the most mass so far."""
        block, grid = self.method.block, call.site.grid
        if where not in self.columns:
            blocks = -(-grid.num_tokens // block)
            self.columns[where] = torch.zeros(call.query.shape[2], blocks)
        for heads in memory.head_groups(call.query, COPIES):
            mass = block_mass(
                *TokenOrder(("FHW",)).apply(grid, call.query[:, :, heads], call.key[:, :, heads]),
                (block, block),
                scale=call.scale,
                kv_lengths=call.site.kv_lengths,
                chunk_bytes=memory.CHUNK_BYTES // 2,
            )
            self.columns[where][heads] += mass.sum(-2).mean(0).cpu()
        self.visual = grid.whole_blocks(block, reordered=True).stop
        return self._best(self.columns[where]).to(call.query.device)

    def _best(self, columns: Tensor) -> Tensor:
        k = max(1, int(self.method.stripes * self.visual + 1e-9)) if self.visual else 0
        keep = torch.zeros_like(columns, dtype=torch.bool)
        return keep.scatter_(-1, columns[:, : self.visual].topk(k, -1).indices, True)

    def _prepared(
        self, call: Call, heads: slice, modes: Tensor, table: Tensor, columns: Tensor
    ) -> tuple[TokenOrder, functools.partial]:
        """The order of these heads under these modes, and their attention in it, ready to run."""
        grid, size, order = call.site.grid, (self.method.block,) * 2, _walk(modes.tolist())
        keep = kept(table, modes.to(table.device), columns[heads])
        # A skipped head gives zeros, but for the text that stays exact beside a video.
        keep |= forced_blocks(grid, size, device=keep.device, reordered=True)
        mask = BlockMask.from_dense(keep[None], size, (grid.num_tokens, grid.num_tokens))
        tensors = order.apply(grid, *(x[:, :, heads] for x in (call.query, call.key, call.value)))
        return order, functools.partial(
            attend_blocks, *tensors, mask, scale=call.scale, kv_lengths=call.site.kv_lengths
        )

    def _output(self, call: Call, heads: slice, *choice: Tensor) -> Tensor:
        order, attend = self._prepared(call, heads, *choice)
        return order.undo(call.site.grid, attend().out)[0]

    def _measure_cost(self, call: Call, heads: slice, table: Tensor, columns: Tensor) -> Tensor:
        """Time of each mode's attention over a dense call's, by our kernel on this device, at this size."""
        device, all_heads = call.query.device, call.query.shape[2]
        count = len(range(all_heads)[heads])
        times = [seconds(call.dense, device), 0.0]
        for mode in (DIAGONAL, MULTI, STRIPE):
            _, attend = self._prepared(call, heads, torch.full((count,), mode), table, columns)
            times.append(seconds(attend, device) * all_heads / count)
        return torch.tensor(times, dtype=torch.float64) / times[0]

    def _densities(self, table: Tensor, columns: Tensor) -> Tensor:
        """Of the video's blocks; what text adds is no choice of the mode."""
        keep = torch.cat([table, columns[:1, None].expand_as(table[:1])])
        keep = keep[:, : self.visual, : self.visual]
        return keep.double().mean((1, 2)).cpu()

    def tensors(self) -> dict[str, Tensor]:
        """`modes` `uint8 [bins, L, H]`, `stripes` `uint8 [bins, L, H, ceil(Nk / 8)]`, `errors`, `costs`."""
        bins, layers, heads, _ = self.error.shape
        width = next(iter(self.columns.values())).shape[-1]
        modes = torch.zeros(bins, layers, heads, dtype=torch.uint8)
        chosen = {
            where: self._assign(*map(int, where.split()))
            for where in sorted(self.columns, key=lambda at: tuple(map(int, at.split())))
        }
        stripes = torch.zeros(bins, layers, heads, -(-width // 8), dtype=torch.uint8)
        for where, seen in nearest_seen(self.columns, bins, self.rows).items():
            stretch, row = map(int, where.split())
            modes[stretch, row] = chosen[seen]
            stripes[stretch, row] = pack_bits(self._best(self.columns[seen]))
        self._tell_shortfall(modes)
        errors = self.error / self.calls.clamp_min(1)[..., None, None]
        return {
            "modes": modes,
            "stripes": stripes,
            "errors": errors.float(),
            "costs": self.cost.float(),
        }

    def _tell_shortfall(self, modes: Tensor) -> None:
        """Warn where modes of these sizes do not add up to the density asked for."""
        asked = self.method.density
        reached = asked if asked is None else self.densities[modes.long()].mean().item()
        if asked is None or reached >= CLOSE_ENOUGH * asked:
            return
        sizes = ", ".join(
            f"{name} {size:.3f}" for name, size in zip(MODES, self.densities.tolist(), strict=True)
        )
        warnings.warn(
            f"sparse_vdit reached a density of {reached:.3f} of the video's blocks, and {asked:g} was asked for: modes "
            f"of these sizes come no nearer, or save no error ({sizes}); ask for one of these sizes, or change them "
            "with window= and stripes=",
            RuntimeWarning,
            stacklevel=2,
        )

    def state(self) -> dict[str, object]:
        """Sums, and the costs once measured."""
        return {
            "error": self.error,
            "calls": self.calls,
            "columns": self.columns,
            "cost": self.cost,
            "densities": self.densities,
            "visual": self.visual,
            "spent": self.spent,
        }

    def load_state(self, state: dict[str, object]) -> None:
        """Go on adding."""
        self.error, self.calls, self.columns = state["error"], state["calls"], state["columns"]
        self.cost, self.densities = state["cost"], state["densities"]
        self.visual, self.spent = state["visual"], state["spent"]
