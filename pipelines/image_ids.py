"""What families of image models share: the grid of text, one image and its references, and sizes read from ids.

Flux packs its images in the pipeline, so the transformer sees a list of tokens and the position of each.
"""

from __future__ import annotations

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
        ids: `[S, 3 or more]` or `[B, S, 3 or more]`: image, row and column of each token, image by image; rows and columns
            may be scaled (Flux.3).

    Raises:
        ValueError: the tokens of the first image do not walk a rectangle row by row.
    """
    if ids not in _sizes:
        _sizes[ids] = _first_rectangle((ids[0] if ids.ndim == 3 else ids).detach().cpu())
    return _sizes[ids]


def _first_rectangle(ids: Tensor) -> tuple[int, int]:
    image, rows, columns = ids[:, 0], ids[:, 1], ids[:, 2]
    tokens = _run(image)
    width = _run(rows[:tokens])
    height = tokens // width
    if height * width != tokens or not _walks(
        *(x[:tokens].view(height, width) for x in (rows, columns))
    ):
        raise ValueError(f"the ids of {tokens} image tokens do not walk a rectangle row by row")
    return height, width


def _walks(rows: Tensor, columns: Tensor) -> bool:
    """Whether `[height, width]` numbers rise from row to row and from column to column, by whatever step.

    In bfloat16, which ids come in, numbers beyond 256 are rounded: neighbours may be equal there, but not all of them.
    """
    down, right = rows[:, 0], columns[0]
    same = bool((rows == down[:, None]).all()) and bool((columns == right).all())
    return same and all(
        bool((x.diff() >= 0).all()) and (len(x) == 1 or bool(x[-1] > x[0])) for x in (down, right)
    )


def _run(values: Tensor) -> int:
    """How many leading values are equal to the first."""
    changes = (values != values[0]).nonzero()
    return int(changes[0]) if len(changes) else len(values)
