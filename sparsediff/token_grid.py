"""Where the tokens of one attention call lie in space and time, and which of them share a block.

Pure geometry: nothing here sees a tensor's contents.  Adapters build a `TokenGrid` from the shapes a model is
called with; every mask, window and forced row derives from it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from sparsediff.kernels.token_order import gather_tokens

Role = Literal["grid", "prompt", "text", "image", "audio", "pad"]
AXES = "FHW"
Window = (
    tuple[int, int, int] | str
)  # (frames, height, width), or an order of the axes, slowest first


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

    Attributes:
        segments: what the keys are.
        queries: the last so many tokens ask, where a model reads the others from a cache; None if all do.
    """

    segments: tuple[Segment, ...]
    queries: int | None = None

    def __post_init__(self) -> None:
        grids = [s for s in self.segments if s.role == "grid"]
        if len(grids) != 1:
            raise ValueError(f"a TokenGrid has exactly one grid segment, got {len(grids)}")
        if not grids[0].length:
            raise ValueError(f"the grid must hold at least one token, got {grids[0].shape}")
        if self.queries is not None and not 0 < self.queries <= self.num_tokens:
            raise ValueError(f"queries must be 1 to {self.num_tokens} tokens, got {self.queries}")

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

    @classmethod
    def line(cls, prompt: int, generation: int, *, queries: int | None = None) -> TokenGrid:
        """What a language model reads and what it writes: one row of `generation` tokens after the `prompt`."""
        words = Segment(role="prompt", length=prompt)
        written = Segment(role="grid", length=generation, shape=(1, 1, generation))
        return cls((words, written) if prompt else (written,), queries)

    @classmethod
    def amid(cls, shape: tuple[int, int, int], before: Segment, after: Segment) -> TokenGrid:
        """A video (or image) between two other segments; an empty one is left out."""
        grid = Segment(role="grid", length=math.prod(shape), shape=shape)
        return cls(tuple(s for s in (before, grid, after) if s.length))

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole sequence, whatever their role."""
        return sum(s.length for s in self.segments)

    @property
    def num_queries(self) -> int:
        """Tokens that ask: all of them, unless `queries` says otherwise."""
        return self.num_tokens if self.queries is None else self.queries

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(frames, height, width)` of the grid segment."""
        return next(s.shape for s in self.segments if s.shape is not None)

    @property
    def grid_span(self) -> tuple[int, int]:
        """`[start, stop)` of the grid segment in the sequence."""
        return next(span for s, span in self._spans() if s.role == "grid")

    def whole_blocks(self, block: int, *, reordered: bool = False) -> slice:
        """The blocks of `block` tokens that hold nothing but grid; the last may be short if the sequence ends there.

        `reordered` says that a `TokenOrder` has moved the grid to the front.
        """
        start, stop = self.grid_span
        if reordered:
            start, stop = 0, stop - start
        first = -(-start // block)
        last = -(-stop // block) if stop == self.num_tokens else stop // block
        return slice(first, max(first, last))

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
        line = any(s.role == "prompt" for s in self.segments) or self.shape[:2] == (1, 1)
        parts = (
            f"{s.length} generated"
            if s.shape and line
            else "x".join(map(str, s.shape))
            if s.shape
            else f"{s.length} {s.role}"
            for s in self.segments
        )
        asking = "" if self.queries is None else f", the last {self.queries} asking"
        return " + ".join(parts) + asking


@dataclass(frozen=True)
class TokenOrder:
    """Which tokens share a block: the grid is walked window by window, `(frames, height, width)` tokens each.

    A list-driven kernel does not care in which order blocks come, only which tokens a block holds, so one window
    shape a head says everything: DraftAttention's 8x16 patches are `(1, 8, 16)`, PAROAttention's axis orders and
    Sparse-vDiT's frame-minor layout are windows one token thick.  Tokens outside the grid (text, audio, ...) come
    after it, in their own order, whatever the window: what is forced for them is the same in every head.  Where a
    window does not divide the grid, the windows at the far edges are smaller and blocks straddle their borders;
    neighbouring windows are walked in a serpentine, so what shares a block is still close by.

    Attributes:
        windows: the windows in use.
        heads: for each head which of `windows` it walks; left out, all heads walk the one there is, or what `apply`
            and `undo` are told.  Layers that choose differently among the same `windows` share one set of permutations.
    """

    windows: tuple[Window, ...]
    heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.windows:
            raise ValueError("windows needs at least one (frames, height, width) entry")
        for window in self.windows:
            axes = isinstance(window, str)
            if sorted(window) != sorted(AXES) if axes else not _is_box(window):
                raise ValueError(
                    "a window is three sizes >= 1 (frames, height, width) or an order of the axes such as 'HWF', "
                    f"got {window!r}"
                )
        for window in self.heads or ():
            if not 0 <= window < len(self.windows):
                raise ValueError(f"heads name windows 0 to {len(self.windows) - 1}, got {window}")

    @classmethod
    def single(cls, frames: int, height: int, width: int) -> TokenOrder:
        """The same window for every head."""
        return cls(((frames, height, width),))

    @classmethod
    def per_head(cls, windows: Sequence[Window]) -> TokenOrder:
        """One window a head, in the order of the heads; equal ones are kept once."""
        distinct = tuple(dict.fromkeys(windows))
        return cls(distinct, tuple(distinct.index(window) for window in windows))

    @property
    def chosen_at_run_time(self) -> bool:
        """Whether the window of each head is left open."""
        return self.heads is None and len(self.windows) > 1

    def permutation(self, grid: TokenGrid, device: torch.device | str | None = None) -> Tensor:
        """`int32 [windows, S]`: position `i` of a reordered sequence holds token `permutation[:, i]`."""
        return _permutations(self.windows, grid, str(device or "cpu"))[0]

    def inverse(self, grid: TokenGrid, device: torch.device | str | None = None) -> Tensor:
        """`int32 [windows, S]`: where each token went; undoes `permutation`."""
        return _permutations(self.windows, grid, str(device or "cpu"))[1]

    def apply(
        self, grid: TokenGrid, *tensors: Tensor, heads: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Reorder tensors `[B, S, H, D]`, up to three at once, so that the tokens of a window are neighbours.

        `heads`, `int32 [H]` or `[B, H]` on the tensors' device, stands in for the field of that name.
        """
        index = self.permutation(grid, tensors[0].device)
        return gather_tokens(tensors, index, self._rows(heads, tensors[0].device))

    def undo(
        self, grid: TokenGrid, *tensors: Tensor, heads: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The inverse of `apply`, for the output `[B, S, H, D]`."""
        index = self.inverse(grid, tensors[0].device)
        return gather_tokens(tensors, index, self._rows(heads, tensors[0].device))

    def apply_rows(self, grid: TokenGrid, rows: Tensor, heads: Tensor | None = None) -> Tensor:
        """Reorder one number a token, `[B, H, S]`, as `apply` does the tokens."""
        index = self.permutation(grid, rows.device).long()
        heads = self._rows(heads, rows.device)
        index = index[0] if heads is None else index[heads.long()]  # [S], [H, S] or [B, H, S]
        return rows.gather(-1, index.expand(rows.shape))

    def _rows(self, heads: Tensor | None, device: torch.device) -> Tensor | None:
        if heads is None and self.chosen_at_run_time:
            raise ValueError(
                f"{len(self.windows)} windows need heads=..., the number of each head's window; "
                "TokenOrder.per_head() takes one window a head"
            )
        return _head_rows(self.heads, str(device)) if heads is None else heads


# Bounded: a run uses a handful of (windows, grid, device) triples; each entry holds 8 bytes a token and window.
@functools.lru_cache(maxsize=16)
def _permutations(
    windows: tuple[Window, ...], grid: TokenGrid, device: str
) -> tuple[Tensor, Tensor]:
    start, stop = grid.grid_span
    outside = torch.cat([torch.arange(0, start), torch.arange(stop, grid.num_tokens)])
    forward = torch.stack(
        [torch.cat([_window_walk(grid.shape, w) + start, outside]) for w in windows]
    )
    return (forward.to(device, torch.int32), forward.argsort(-1).to(device, torch.int32))


# One small entry for each choice of windows, of which a model has one a layer.
@functools.lru_cache(maxsize=256)
def _head_rows(heads: tuple[int, ...] | None, device: str) -> Tensor | None:
    return None if heads is None else torch.tensor(heads, dtype=torch.int32, device=device)


def _is_box(window: object) -> bool:
    sizes = window if isinstance(window, tuple) else ()  # hashable: orders are keys of caches
    return len(sizes) == 3 and all(isinstance(n, int) and n >= 1 for n in sizes)


def _window_walk(shape: tuple[int, int, int], window: Window) -> Tensor:
    """Token numbers of a grid in window order; the walk over windows turns round at each edge."""
    tokens = torch.arange(math.prod(shape)).view(shape)
    if isinstance(window, str):
        return tokens.permute([AXES.index(axis) for axis in window]).flatten()
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
