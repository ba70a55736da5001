"""PAROAttention: pattern-aware reordering for sparse attention (Zhao et al., arXiv:2506.16054, NeurIPS 2025).

Attention between video tokens is local along some axis of the grid; which one differs from head to head.  Walking the
grid in the right order of its axes turns scattered stripes into dense blocks, and those are so much the model's own that
one prompt shows where they are for all: order and blocks are measured once, offline, and only looked up in a run.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsediff import calibration_memory as memory
from sparsediff.block_mask import pack_bits, unpack_bits
from sparsediff.budget import head_percentile
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
from sparsediff.kernels.block_scores import block_mass
from sparsediff.methods.base import AttentionSite, StaticMethod
from sparsediff.token_grid import TokenGrid, TokenOrder

ORDERS = tuple("".join(axes) for axes in itertools.permutations("FHW"))


@dataclass(frozen=True, kw_only=True)
class PAROAttention(StaticMethod):
    """One of six axis orders a head, and static blocks a stretch of steps, from `sparsediff calibrate`.

    Attributes:
        density: share of a head's blocks that are kept (published: 0.5, 0.3, 0.2).
        bins: equal stretches of the run, each with blocks of its own.  (Published: one a step in the first half, one
            for the second; its plans for long videos have 4 in all.)
        block: tokens a block.
        alpha: weight of sparseness against even blocks in the choice of an order.
        sigma: a block is nearly empty if at least this share of its entries is small ...
        epsilon: ... which is below this multiple of the uniform weight, one over the number of tokens.
        sampled_blocks: query blocks of each head and call that orders are judged by.
        int8: 8-bit logits (Hopper, head size 128, `block=128`).

    There is no public calibration code; `sigma`, `epsilon` and `alpha` are unpublished, so ours are stated above.  Mended:
    the published metric is to be minimised and counts nearly empty blocks, which is the wrong way round; the share of
    the others is taken.  No row of blocks is left empty.
    """

    name: ClassVar[str] = "paro_attention"
    summary: ClassVar[str] = (
        "axis order by head and static blocks by stretch of steps, calibrated offline"
    )
    needs_video: ClassVar[str] = "reorders frames, rows and columns"
    citation: ClassVar[str] = "arXiv:2506.16054"
    run_time: ClassVar[frozenset[str]] = frozenset({"int8"})

    tensor_names: ClassVar[tuple[str, ...]] = ("orders", "masks")

    density: float = 0.5
    bins: int = 4
    block: int = 64
    alpha: float = 0.5
    sigma: float = 0.9
    epsilon: float = 0.1
    sampled_blocks: int = 16
    int8: bool = False

    def __post_init__(self) -> None:
        self._require("density", float, lambda x: 0 < x <= 1, "a share in (0, 1]")
        self._require("block", int, lambda x: x in (64, 128), "64 or 128")
        for name in ("bins", "sampled_blocks"):
            self._require(name, int, lambda x: x >= 1, "a whole number >= 1")
        for name in ("alpha", "sigma"):
            self._require(name, float, lambda x: 0 <= x <= 1, "a share in [0, 1]")
        self._require("epsilon", float, lambda x: x > 0, "above 0")
        self._require("int8", bool)

    @property
    def backend(self) -> str:
        """8-bit logits are a kernel of their own."""
        return "gluon_int8" if self.int8 else "auto"

    def block_size(self, grid: TokenGrid) -> tuple[int, int]:
        """Square blocks."""
        return (self.block, self.block)

    def order(self, site: AttentionSite) -> TokenOrder | None:
        """The axis order of each head; the same at all steps."""
        if self.calibration is None:
            return None
        return _orders(self.calibration, self.calibration.row(site.name))

    def keep_blocks(
        self, query: Tensor, key: Tensor, site: AttentionSite, *, lse: Tensor | None = None
    ) -> Tensor:
        """What was measured for this layer and stretch: one copy of packed bits to the device."""
        bits = pinned(self.calibration, "masks")[
            self._bin(site.step, site), self.calibration.row(site.name)
        ]
        return unpack_bits(
            bits.to(query.device, non_blocking=True), -(-key.shape[1] // self.block)
        )[None]

    def calibrator(self, layout: ModelLayout) -> Calibrator:
        """Two passes: orders, then blocks in those orders."""
        return _PAROCalibrator(self, layout)


@per_calibration
def _orders(calibration: Calibration, row: int) -> TokenOrder:
    heads = calibration.tensors["orders"][row].tolist()
    return TokenOrder(ORDERS, tuple(heads))


def concentration(
    weights: Tensor, block: int, epsilon: float, sigma: float
) -> tuple[Tensor, Tensor]:
    """How sparse and how even attention weights `[..., m * block, n * block]` are in blocks (section 4.1).

    Returns the share of blocks that are not nearly empty, and the mean over the blocks of the largest weight over the
    mean weight (incoherence); both `[...]`, lower is better.
    """
    tiles = weights.unflatten(-1, (-1, block)).unflatten(-3, (-1, block))
    # counted, not averaged: that would take a float for every weight
    small = (tiles < epsilon).sum((-3, -1)) / block**2
    incoherence = tiles.amax((-3, -1)) / tiles.mean((-3, -1)).clamp_min(1e-20)
    return (small < sigma).float().mean((-1, -2)), incoherence.mean((-1, -2))


class _PAROCalibrator(Calibrator):
    passes = 2

    def __init__(self, method: PAROAttention, layout: ModelLayout) -> None:
        self.method, self.rows = method, {name: i for i, name in enumerate(layout.layers)}
        shape = (len(layout.layers), layout.heads, len(ORDERS))
        self.dense = torch.zeros(shape, dtype=torch.float64)
        self.incoherence = torch.zeros(shape, dtype=torch.float64)
        self.mass: dict[str, Tensor] = {}  # "bin row" -> float32 [H, Mq, Nk]
        self.visual = 0  # blocks that hold nothing but the grid, in front in every order

    def attend(self, call: Call) -> Tensor:
        """Judge orders in the first pass, add up block mass in the second."""
        row = self.rows[call.site.name]
        if self.number == 0:
            self._judge(call, row)
        else:
            self._measure(call, row)
        return call.dense()

    def _judge(self, call: Call, row: int) -> None:
        method, block = self.method, self.method.block
        start, stop = call.site.grid.grid_span
        blocks = (stop - start) // block  # whole ones
        stride = max(1, blocks // method.sampled_blocks)
        self._require_host_memory(call)
        chosen = torch.arange(call.site.step % stride, blocks, stride, device=call.query.device)
        # Scores, their softmax, that in another order, and what compares it, of one block of queries.
        step = memory.how_many_fit(4 * 4 * call.query.shape[0] * block * call.key.shape[1])
        sums = torch.zeros_like(self.dense[row], device=call.query.device).expand(2, -1, -1).clone()
        for head in range(call.query.shape[2]):
            keys = call.key[:, :, head].float().mT  # [B, D, S]
            for i, axes in enumerate(ORDERS):
                walk = TokenOrder((axes,)).permutation(call.site.grid, keys.device)
                walk = walk[0, : blocks * block].long()
                for part in chosen.split(step):
                    tokens = walk.view(blocks, block)[part].flatten()
                    weights = self._weights(call, head, tokens, keys)[..., walk]
                    dense, incoherence = concentration(
                        weights, block, method.epsilon / keys.shape[-1], method.sigma
                    )
                    share = len(part) / len(chosen)
                    sums[0, head, i] += share * dense.double().mean()
                    sums[1, head, i] += share * incoherence.double().mean()
        dense, incoherence = sums.cpu()
        self.dense[row] += dense
        self.incoherence[row] += incoherence

    @staticmethod
    def _weights(call: Call, head: int, tokens: Tensor, keys: Tensor) -> Tensor:
        """What these query tokens of a head attend to, `float32 [B, tokens, S]`; `keys` are `[B, D, S]`."""
        logits = (call.query[:, tokens, head].float() * call.scale) @ keys
        if (lengths := call.site.kv_lengths) is not None:
            places = torch.arange(keys.shape[-1], device=keys.device)
            logits.masked_fill_((places >= lengths[:, None])[:, None], -torch.inf)
        return logits.softmax(-1)

    def _measure(self, call: Call, row: int) -> None:
        grid, size = call.site.grid, (self.method.block,) * 2
        where = f"{step_bin(call.site.step, call.site.num_steps, self.method.bins)} {row}"
        if where not in self.mass:
            blocks = -(-grid.num_tokens // self.method.block)
            self.mass[where] = torch.zeros(call.query.shape[2], blocks, blocks)
        # Queries and keys in order, and room for the mass of their blocks.
        for heads in memory.head_groups(call.query, copies=4):
            order = TokenOrder(ORDERS, tuple(self.orders[row, heads].tolist()))
            query, key = order.apply(grid, call.query[:, :, heads], call.key[:, :, heads])
            mass = block_mass(
                query,
                key,
                size,
                scale=call.scale,
                kv_lengths=call.site.kv_lengths,
                chunk_bytes=memory.CHUNK_BYTES // 2,
            )
            self.mass[where][heads] += mass.mean(0).cpu()
        self.visual = grid.whole_blocks(self.method.block, reordered=True).stop

    def _require_host_memory(self, call: Call) -> None:
        """Sums of every stretch and layer stay until the last prompt, and their blocks are stored."""
        blocks = -(-call.key.shape[1] // self.method.block)
        masks = self.method.bins * len(self.rows) * call.key.shape[2] * blocks * blocks
        memory.require_host_memory(
            4 * masks + masks // 8,
            f"measuring paro_attention at {call.key.shape[1]:,} tokens",
            "block=128 takes a quarter of it, fewer bins less",
        )

    @property
    def orders(self) -> Tensor:
        """`uint8 [layers, H]`: the order with the least weighted sum of both measures, each relative to its total."""
        alpha = self.method.alpha
        cost = alpha * _shares(self.dense) + (1 - alpha) * _shares(self.incoherence)
        return cost.argmin(-1).to(torch.uint8)

    def tensors(self) -> dict[str, Tensor]:
        """`orders` `uint8 [L, H]` and `masks` `uint8 [bins, L, H, Mq, ceil(Nk / 8)]`."""
        shape = next(iter(self.mass.values())).shape
        visual = slice(self.visual)
        masks = torch.zeros(
            self.method.bins, len(self.rows), *shape[:2], math.ceil(shape[2] / 8), dtype=torch.uint8
        )
        for where, seen in nearest_seen(self.mass, self.method.bins, self.rows).items():
            stretch, row = map(int, where.split())
            keep = torch.ones(shape, dtype=torch.bool)
            keep[:, visual, visual] = head_percentile(
                self.mass[seen][None, :, visual, visual], self.method.density
            )[0]
            masks[stretch, row] = pack_bits(keep)
        return {"orders": self.orders, "masks": masks}

    def state(self) -> dict[str, object]:
        """Sums of both passes."""
        return {
            "dense": self.dense,
            "incoherence": self.incoherence,
            "mass": self.mass,
            "visual": self.visual,
        }

    def load_state(self, state: dict[str, object]) -> None:
        """Go on adding."""
        self.dense, self.incoherence = state["dense"], state["incoherence"]
        self.mass, self.visual = state["mass"], state["visual"]


def _shares(x: Tensor) -> Tensor:
    return x / x.sum(-1, keepdim=True).clamp_min(1e-20)
