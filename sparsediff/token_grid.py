"""Where the tokens of one attention call lie in space and time, and which of them share a block.

Pure geometry: nothing here sees a tensor's contents.  Adapters build a `TokenGrid` from the shapes a model is
called with; every mask, window and forced row derives from it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Role = Literal["grid", "text", "image", "audio", "pad"]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A run of tokens with one meaning.

    `shape` is `(frames, height, width)` in latent tokens, for the role `grid` only, with the width running fastest.
    """

    role: Role
    length: int
    shape: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ValueError(f"role must be one of {', '.join(get_args(Role))}, got {self.role!r}")
        if self.length < 0:
            raise ValueError(f"length must be >= 0, got {self.length}")
        if (self.role == "grid") != (self.shape is not None):
            raise ValueError(
                "a grid segment needs shape=(frames, height, width); other roles take none"
            )
        if self.shape is not None and math.prod(self.shape) != self.length:
            raise ValueError(
                f"grid {self.shape} holds {math.prod(self.shape)} tokens, not {self.length}"
            )


@dataclass(frozen=True)
class TokenGrid:
    """The ordered token segments of one attention call, exactly one of them a `(frames, height, width)` grid.

    Sizes are in latent tokens (after the autoencoder and the patch embedding), never pixels.  Hashable: it is the
    key under which masks and permutations are cached.
    """

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        grids = [s for s in self.segments if s.role == "grid"]
        if len(grids) != 1:
            raise ValueError(f"a TokenGrid has exactly one grid segment, got {len(grids)}")
        if not grids[0].length:
            raise ValueError(f"the grid must hold at least one token, got {grids[0].shape}")

    @classmethod
    def video(
        cls, frames: int, height: int, width: int, *, text: int = 0, text_first: bool = False
    ) -> TokenGrid:
        """A video (or image: `frames=1`), optionally in one sequence with `text` tokens."""
        grid = Segment(role="grid", length=frames * height * width, shape=(frames, height, width))
        if not text:
            return cls((grid,))
        words = Segment(role="text", length=text)
        return cls((words, grid) if text_first else (grid, words))

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole sequence, whatever their role."""
        return sum(s.length for s in self.segments)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(frames, height, width)` of the grid segment."""
        return next(s.shape for s in self.segments if s.shape is not None)

    @property
    def grid_span(self) -> tuple[int, int]:
        """`[start, stop)` of the grid segment in the sequence."""
        return next(span for s, span in self._spans() if s.role == "grid")

    def spans(self, *roles: Role) -> tuple[tuple[int, int], ...]:
        """`[start, stop)` of every non-empty segment with one of `roles`."""
        return tuple(span for s, span in self._spans() if s.role in roles and s.length)

    def _spans(self):
        start = 0
        for segment in self.segments:
            yield segment, (start, start + segment.length)
            start += segment.length

    def coordinates(self, device: torch.device | str | None = None) -> Tensor:
        """`int64 [S, 3]`: frame, row and column of each token; -1 outside the grid."""
        f, h, w = self.shape
        out = torch.full((self.num_tokens, 3), -1, dtype=torch.int64, device=device)
        start, stop = self.grid_span
        axes = (torch.arange(n, device=device) for n in (f, h, w))
        out[start:stop] = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        return out

    def __str__(self) -> str:
        parts = (
            "x".join(map(str, s.shape)) if s.shape else f"{s.length} {s.role}"
            for s in self.segments
        )
        return " + ".join(parts)


@dataclass(frozen=True)
class TokenOrder:
    """Which tokens share a block: the grid is walked window by window, `(frames, height, width)` tokens each.

    A list-driven kernel does not care in which order blocks come, only which tokens a block holds, so one window
    shape a head says everything: DraftAttention's 8x16 patches are `(1, 8, 16)`, PAROAttention's axis orders and
    Sparse-vDiT's frame-minor layout are windows one token thick.  `windows` has one entry for all heads, or one a
    head.  Tokens outside the grid (text, audio, ...) come after it, in their own order.  Where a window does not
    divide the grid, the windows at the far edges are smaller and blocks straddle their borders; neighbouring windows
    are walked in a serpentine, so what shares a block is still close by.
    """

    windows: tuple[tuple[int, int, int], ...]

    def __post_init__(self) -> None:
        if not self.windows:
            raise ValueError("windows needs at least one (frames, height, width) entry")
        for window in self.windows:
            if len(window) != 3 or min(window) < 1:
                raise ValueError(
                    f"a window is three sizes >= 1 (frames, height, width), got {window}"
                )

    @classmethod
    def single(cls, frames: int, height: int, width: int) -> TokenOrder:
        """The same window for every head."""
        return cls(((frames, height, width),))

    def permutation(self, grid: TokenGrid, device: torch.device | str | None = None) -> Tensor:
        """`int64 [1 or H, S]`: position `i` of the reordered sequence holds token `permutation[:, i]`."""
        return _permutations(self, grid, str(device or "cpu"))[0]

    def inverse(self, grid: TokenGrid, device: torch.device | str | None = None) -> Tensor:
        """`int64 [1 or H, S]`: where each token went; undoes `permutation`."""
        return _permutations(self, grid, str(device or "cpu"))[1]

    def apply(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """Reorder `x` `[B, S, H, D]` so that the tokens of a window are neighbours."""
        return _gather_tokens(x, self.permutation(grid, x.device))

    def undo(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """The inverse of `apply`, for the output `[B, S, H, D]`."""
        return _gather_tokens(x, self.inverse(grid, x.device))


def _gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    if x.shape[1] != index.shape[1]:
        raise ValueError(f"the grid has {index.shape[1]} tokens, the tensor {x.shape[1]}")
    if index.shape[0] == 1:
        return x.index_select(1, index[0])
    if index.shape[0] != x.shape[2]:
        raise ValueError(f"the order has {index.shape[0]} heads, the tensor {x.shape[2]}")
    return x.gather(1, index.t()[None, :, :, None].expand_as(x))


# Bounded: a run uses a handful of (order, grid, device) triples; each entry holds 16 bytes a token and head.
@functools.lru_cache(maxsize=16)
def _permutations(order: TokenOrder, grid: TokenGrid, device: str) -> tuple[Tensor, Tensor]:
    start, stop = grid.grid_span
    outside = torch.cat([torch.arange(0, start), torch.arange(stop, grid.num_tokens)])
    forward = torch.stack(
        [torch.cat([_window_walk(grid.shape, w) + start, outside]) for w in order.windows]
    )
    return forward.to(device), forward.argsort(-1).to(device)


def _window_walk(shape: tuple[int, int, int], window: tuple[int, int, int]) -> Tensor:
    """Token numbers of a grid in window order; the walk over windows turns round at each edge."""
    tokens = torch.arange(math.prod(shape)).view(shape)
    divides = all(n % w == 0 for n, w in zip(shape, window, strict=True))
    frames, rows, columns = (
        list(axis.split(w)) for axis, w in zip(map(torch.arange, shape), window, strict=True)
    )
    pieces, row_turn, column_turn = [], False, False
    for f in frames:
        for r in rows[::-1] if row_turn else rows:
            band = tokens[f[0] : f[-1] + 1, r[0] : r[-1] + 1]
            walk = columns[::-1] if column_turn else columns
            pieces.extend(band[..., c[0] : c[-1] + 1].flatten() for c in walk)
            # Where windows and blocks coincide the order of windows is free, so it stays the plain one.
            column_turn = column_turn != (not divides)
        row_turn = row_turn != (not divides)
    return torch.cat(pieces)
