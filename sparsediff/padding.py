"""Padded keys of one attention call: which there are, and how they come to stand last.

Kernels hide keys past a length, one for each sample of the batch.  So the tokens that an attention mask leaves must be
the front of the sequence: where they are not, the tokens are moved before the call and back after it.  Nothing here
reads a mask back to the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsediff.kernels.token_order import gather_tokens
from sparsediff.token_grid import Segment, TokenGrid

PaddingMask = Literal["keys", "pairs"]


def valid_keys(attn_mask: Tensor, kind: PaddingMask) -> Tensor | None:
    """Which keys a mask leaves, `bool [B|1, S]`, without a copy; None if it is no mask of this kind.

    Args:
        attn_mask: `[B|1, S]` or `[B|1, 1, 1, S]` for `"keys"`: the same for every query.  `[B|1, 1, S, S]` for `"pairs"`:
            true where both tokens are valid, so that the diagonal tells it all.
        kind: what the model's masks are.
    """
    if attn_mask.dtype != torch.bool:
        return None
    shape = attn_mask.shape
    if kind == "keys" and attn_mask.ndim == 2:
        return attn_mask
    if attn_mask.ndim != 4 or shape[1] != 1:
        return None
    if kind == "keys":
        return attn_mask[:, 0, 0] if shape[2] == 1 else None
    return attn_mask[:, 0].diagonal(dim1=-2, dim2=-1) if shape[2] == shape[3] else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Packing:
    """Where the tokens of a call stand while it runs.

    Attributes:
        grid: of the sequence as it then is.
        lengths: `int32 [B]`, keys at or past it are padding; None if there is none.
        index: `int32 [B, S]`, which token stands at each place; None if they stand where they stood.
    """

    grid: TokenGrid
    lengths: Tensor | None = None
    index: Tensor | None = None

    def pack(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Up to three tensors `[B, S, H, D]`, padding last."""
        if self.index is None:
            return tensors
        return gather_tokens(tensors, self.index, self._rows(tensors[0]))

    def unpack(self, out: Tensor) -> Tensor:
        """The output `[B, S, H, D]`, in the model's own order."""
        if self.index is None:
            return out
        places = self.index.argsort(-1).to(torch.int32)
        return gather_tokens((out,), places, self._rows(out))[0]

    @staticmethod
    def _rows(x: Tensor) -> Tensor:
        batch, _, heads, _ = x.shape
        each = torch.arange(batch, dtype=torch.int32, device=x.device)
        return each[:, None].expand(batch, heads)


def pack_padding(grid: TokenGrid, valid: Tensor, batch: int, *, last: bool = False) -> Packing:
    """The grid in front, then the valid tokens beside it in their own order, then the padding.

    Args:
        grid: of the sequence; all of its `grid` segment is valid.
        valid: `bool [B|1, S]`.
        batch: samples of the call.
        last: that the padding is always the end of the sequence, so that nothing need move.
    """
    valid = valid.expand(batch, -1)
    lengths = valid.sum(-1, dtype=torch.int32)
    if last:
        return Packing(grid=grid, lengths=lengths)
    start, stop = grid.grid_span
    turn = (~valid).to(torch.uint8) + 1
    turn[:, start:stop] = 0
    index = turn.argsort(dim=-1, stable=True).to(torch.int32)
    inside = next(s for s in grid.segments if s.role == "grid")
    # Which roles the tokens beside the grid have no longer shows; all of them stay exact.
    beside = Segment(role="text", length=grid.num_tokens - inside.length)
    return Packing(grid=TokenGrid((inside, beside)), lengths=lengths, index=index)
