"""What families share whose pipelines pack the video: the transformer sees a list of tokens, and is told where each lies."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparsediff.token_grid import Segment, TokenGrid

# Pipelines pass the same tensor in every step: its values come to the host once a generation.
_volumes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def video_amid(shape: tuple[int, int, int], before: int, after: int) -> TokenGrid:
    """A video with so many tokens of reference frames before and after it, which stay exact."""
    first, last = (Segment(role="image", length=n) for n in (before, after))
    return TokenGrid.amid(shape, first, last)


def volume_beside(coordinates: Tensor) -> TokenGrid:
    """The largest regular video among tokens of known place; what stands before or after it are reference frames.

    Args:
        coordinates: time, row and column of each token, alike in a batch: `[B, 3, S]`, `[B, 3, S, 2]` (start and end) or
            `[S, 3]`.

    Raises:
        ValueError: no two frames walk the same rows and columns one after the other.
    """
    if coordinates not in _volumes:
        places = coordinates.detach()
        if places.ndim == 2:
            places = places.T
        else:
            places = places[0] if places.ndim == 3 else places[0, ..., 0]
        _volumes[coordinates] = _largest_volume(places.cpu())
    return _volumes[coordinates]


def _largest_volume(places: Tensor) -> TokenGrid:
    """`places` `[3, S]`."""
    best = (0, 0, 0)  # tokens, first token, frames
    first, frames, before = 0, 0, None
    for start, stop in _walks(places):
        frame = places[1:, start:stop]
        follows = (
            before is not None
            and torch.equal(frame, before[1])
            and bool(places[0, start] > before[0])
        )
        first, frames = (first, frames + 1) if follows else (start, 1)
        before = (places[0, start], frame)
        # Of two that are alike the later one: references come before what is made after them.
        best = max((stop - first, first, frames), best, key=lambda found: found[0])
    tokens, first, frames = best
    frame = places[1:, first : first + tokens // frames]
    rows = len(runs(frame[0]))
    columns = frame.shape[1] // rows
    walks = rows * columns == frame.shape[1] and torch.equal(
        frame,
        torch.stack(
            [frame[0, ::columns].repeat_interleave(columns), frame[1, :columns].repeat(rows)]
        ),
    )
    if not walks:
        raise ValueError(
            f"{places.shape[1]} tokens whose coordinates are no video walked row by row"
        )
    return video_amid((frames, rows, columns), first, places.shape[1] - first - tokens)


def _walks(places: Tensor) -> list[tuple[int, int]]:
    """`[start, stop)` of what goes on row by row, column by column, without a step in time."""
    time, row, column = places.diff()
    again = (time != 0) | (row < 0) | ((row == 0) & (column <= 0))
    return _between(again, places.shape[1])


def runs(values: Tensor) -> list[tuple[int, int]]:
    """`[start, stop)` of every run of equal neighbours."""
    return _between(values.diff() != 0, len(values)) if len(values) else []


def _between(edges: Tensor, length: int) -> list[tuple[int, int]]:
    """The stretches that `edges` `bool [length - 1]` leave."""
    starts = edges.nonzero()[:, 0] + 1
    return list(itertools.pairwise([0, *starts.tolist(), length]))
