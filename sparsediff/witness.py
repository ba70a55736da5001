"""What somebody who looks on sees of an attention call; without one, nothing here runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sparsediff.token_grid import TokenGrid, TokenOrder


@dataclass(frozen=True, kw_only=True, eq=False)
class WitnessedCall:
    """One attention call as it is about to run; tensors belong to the run and change after `Witness` returns.

    Attributes:
        generation: number of the generation it belongs to; None where nobody knows.
        layer: its name, as `component.module`.
        step, num_steps, sigma, branch: where in the generation; `num_steps` and `sigma` None if unknown.
        grid: its tokens, as `query` and `key` have them before `order`; None if the adapter could not tell.
        dense_reason: why it runs dense; None for a sparse call.
        block_size: `(query, key/value)` tokens a block; None without a grid.
        query, key: `[B, S, H, D]` after RoPE; of a sparse call in the order of its mask, else in the model's own.
        scale: of the logits; None for `1 / sqrt(D)`.
        kv_lengths: `int32 [B]`, keys at or past it are padding; None if there is none, or nobody looked (dense calls).
        bitmap: `uint8 [B|1, H|1, Mq, ceil(Nk / 8)]`, the blocks that a sparse call reads; None for a dense one.
        order: which tokens share a block; None if the sequence keeps its own order.
        windows: `int32 [B, H]`, the window of `order` that each head walks, where they were chosen in the run.
    """

    generation: int | None
    layer: str
    step: int
    num_steps: int | None
    sigma: float | None
    branch: str
    grid: TokenGrid | None
    dense_reason: str | None
    block_size: tuple[int, int] | None
    query: Tensor
    key: Tensor
    scale: float | None
    kv_lengths: Tensor | None = None
    bitmap: Tensor | None = None
    order: TokenOrder | None = None
    windows: Tensor | None = None


Witness = Callable[[WitnessedCall], None]
