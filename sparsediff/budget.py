"""From block scores to bits: how many blocks stay, and which.

Pure functions of `float32 [B, H, Mq, Nk]` scores, higher is more important; all return `bool` of the same shape and
never leave a row empty.  Scores stay float32: ties of bfloat16 scores would favour early blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_top_k(scores: Tensor, density: float) -> Tensor:
    """Keep the `ceil(density * Nk)` best blocks of every row, at least one (AdaSpa, section 3.2)."""
    _check_fraction("density", density)
    n = scores.shape[-1]
    k = max(1, min(n, -int(-density * n // 1)))
    keep = torch.zeros_like(scores, dtype=torch.bool)
    return keep.scatter_(-1, scores.topk(k, dim=-1).indices, True)


def head_percentile(scores: Tensor, density: float, *, row_minimum: int = 1) -> Tensor:
    """Keep the best `density` of all blocks of a head, wherever they lie (DraftAttention, section 3.3).

    The published rule: with `k = int((1 - density) * Mq * Nk)`, the threshold is the k-th smallest score, ties stay.
    A diffuse query row can lose every block that way; the `row_minimum` best blocks of each row are kept as well.
    """
    _check_fraction("density", density)
    flat = scores.flatten(-2)
    k = int((1.0 - density) * flat.shape[-1] + 1e-9)
    if k == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = flat.sort(dim=-1).values[..., k - 1]
    keep = scores >= threshold[..., None, None]
    best = scores.topk(min(row_minimum, scores.shape[-1]), dim=-1).indices
    return keep.scatter_(-1, best, True)


def _check_fraction(name: str, value: float) -> None:
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must be in (0, 1], got {value}")
