"""What families of image models share: the grid of text, one image and its references, and sizes read from ids.

Flux packs its images in the pipeline, so the transformer sees a list of tokens and the position of each.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparsediff.token_grid import Segment, TokenGrid

# Pipelines pass the same tensor in every step: its values come to the host once a generation.
_sizes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def one_image(shape: tuple[int, int, int], *, text: int = 0, references: int = 0) -> TokenGrid:
    """`text` tokens, then the image that is made, `(frames, height, width)`, then `references` tokens of other images."""
    words, others = Segment(role="text", length=text), Segment(role="image", length=references)
    return TokenGrid.amid(shape, words, others)


def size_from_ids(ids: Tensor) -> tuple[int, int]:
    """`(height, width)` in tokens of the first image.

    Args:
        ids: `[S, 3 or more]` or `[B, S, 3 or more]`: image, row and column of each token, image by image.

    Raises:
        ValueError: the tokens of the first image do not walk a rectangle row by row.
    """
    if ids not in _sizes:
        _sizes[ids] = _first_rectangle((ids[0] if ids.ndim == 3 else ids).detach().cpu())
    return _sizes[ids]


def _first_rectangle(ids: Tensor) -> tuple[int, int]:
    image, rows, columns = ids[:, 0], ids[:, 1], ids[:, 2]
    tokens = _run(image)
    rows, columns = rows[:tokens], columns[:tokens]
    # Not the largest row or column: in bfloat16, which ids come in, numbers beyond 256 are rounded.
    width = _run(rows)
    height = tokens // width
    walk = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(ids.dtype)
    if height * width != tokens or not torch.equal(walk, torch.stack([rows, columns], -1)):
        raise ValueError(f"the ids of {tokens} image tokens do not walk a rectangle row by row")
    return height, width


def _run(values: Tensor) -> int:
    """How many leading values are equal to the first."""
    changes = (values != values[0]).nonzero()
    return int(changes[0]) if len(changes) else len(values)
