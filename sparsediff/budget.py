"""From block scores to bits: how many blocks stay, and which.

Pure functions of `float32 [B, H, Mq, Nk]` scores, higher is more important; all return `bool` of the same shape and
never leave a row empty.  Scores stay float32: ties of bfloat16 scores would favour early blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_SORTED = 1 << 23  # scores sorted at once
INFINITE_BITS = 0x7F800000  # of float32
ROUNDING = 1e-4  # a budget is rounded up, but not for the last digit of a product such as 0.3 * 10


def row_top_k(scores: Tensor, density: float | Tensor) -> Tensor:
    """Keep the `ceil(density * Nk)` best blocks of every row, at least one (AdaSpa, section 3.2).

    `density` is one number, or `float32 [B, H]` for a budget a head.
    """
    n = scores.shape[-1]
    keep = torch.zeros_like(scores, dtype=torch.bool)
    if keep.numel() == 0:
        return keep  # a grid smaller than a block
    if not isinstance(density, Tensor):
        _check_fraction("density", density)
        return keep.scatter_(-1, scores.topk(_round_up(density * n), dim=-1).indices, True)
    k = (density * n - ROUNDING).ceil().clamp(min=1)[..., None, None]
    rank = torch.arange(n, device=scores.device)
    # A few heads at a time: places are int64, and at 64-token blocks a long video has a million blocks a head.
    heads = max(1, MAX_SORTED // scores[:, 0].numel())
    for kept, part, budget in zip(*(x.split(heads, dim=1) for x in (keep, scores, k)), strict=True):
        best = part.argsort(dim=-1, descending=True)
        kept.scatter_(-1, best, rank.expand_as(best) < budget)
    return keep


def row_top_p(scores: Tensor, share: float, *, minimum: int = 1) -> Tensor:
    """Keep the fewest blocks of every row that together hold `share` of its mass (top-p), at least `minimum`."""
    _check_fraction("share", share)
    values, best = scores.clamp(min=0).sort(dim=-1, descending=True, stable=True)
    before = values.cumsum(-1) - values
    kept = before < share * values.sum(-1, keepdim=True)
    kept[..., :minimum] = True
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, kept)


def segment_top_k(
    scores: Tensor, density: float, segments: Sequence[slice], visible: Tensor | None = None
) -> Tensor:
    """`row_top_k` in each run of columns on its own (SparseD, section 4.2: isolated selection).

    `visible`, `bool [B|1, H|1, Mq, Nk]`, names the blocks that there are to choose from: a row keeps a share of what it
    sees, and nothing of a run that it does not see.
    """
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for columns in segments:
        run = scores[..., columns]
        if visible is None:
            keep[..., columns] = row_top_k(run, density)
            continue
        seen = visible[..., columns].expand(run.shape)
        best = run.masked_fill(~seen, -torch.inf).argsort(dim=-1, descending=True)
        budget = (density * seen.sum(-1, keepdim=True) - ROUNDING).ceil()
        rank = torch.arange(run.shape[-1], device=run.device)
        keep[..., columns] = torch.zeros_like(seen).scatter_(-1, best, rank < budget)
    return keep


def recall(scores: Tensor, keep: Tensor) -> Tensor:
    """Share of the scores (softmax mass) that a choice keeps (AdaSpa, section 3.2): `float32 [B, H]`."""
    return (scores * keep).sum((-1, -2)) / scores.sum((-1, -2)).clamp_min(1e-20)


def head_adaptive_density(recall: Tensor, density: float, *, limit: float = 0.8) -> Tensor:
    """A budget a head with the mean of `density` (AdaSpa, section 3.4): `float32 [B, H]` from `recall` `[B, H]`.

    With `n` heads above `limit`, the `n` best recalled heads give half of their budget away and the `n` worst take
    it.  Clamped where the paper is silent: `n` is at most half the heads, and nobody gets more than everything.
    """
    heads = recall.shape[-1]
    n = (recall > limit).sum(-1, keepdim=True).clamp(max=heads // 2)
    rank = recall.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    shift = min(density / 2, 1.0 - density)
    return density + shift * ((rank >= heads - n).float() - (rank < n).float())


def head_adaptive_top_k(scores: Tensor, density: float, *, limit: float = 0.8) -> Tensor:
    """`row_top_k` with the budgets that `head_adaptive_density` makes of what a uniform one recalls."""
    kept = recall(scores, row_top_k(scores, density))
    return row_top_k(scores, head_adaptive_density(kept, density, limit=limit))


def head_percentile(scores: Tensor, density: float, *, row_minimum: int = 1) -> Tensor:
    """Keep the best `density` of all blocks of a head, wherever they lie (DraftAttention, section 3.3).

    The published rule: with `k = int((1 - density) * Mq * Nk)`, the threshold is the k-th smallest score, ties stay.
    A diffuse query row can lose every block that way; the `row_minimum` best blocks of each row are kept as well.
    """
    return above_bar(scores, _percentile(scores.flatten(-2), density), row_minimum=row_minimum)


def layer_percentile(scores: Tensor, density: float, *, row_minimum: int = 1) -> Tensor:
    """Keep the best `density` of all blocks of a layer, whichever head and row they are of.

    Scores must mean the same in every row, as shares of its softmax do.  Ties and the minimum as in `head_percentile`.
    """
    bar = _percentile(scores.flatten(1), density)
    return above_bar(scores, bar[:, None], row_minimum=row_minimum)


def above_bar(scores: Tensor, bar: Tensor, *, row_minimum: int = 1) -> Tensor:
    """Keep blocks that score at least `bar` (`[B, H]` or `[B, 1]`), and the `row_minimum` best of each row."""
    keep = scores >= bar[..., None, None]
    best = scores.topk(min(row_minimum, scores.shape[-1]), dim=-1).indices
    return keep.scatter_(-1, best, True)


def _percentile(flat: Tensor, density: float) -> Tensor:
    """The score above which lies `density` of the last dimension; -inf where that is everything."""
    _check_fraction("density", density)
    k = int((1.0 - density) * flat.shape[-1] + 1e-9)
    if k == 0:
        return flat.new_full(flat.shape[:-1], -torch.inf)
    lines = flat.reshape(-1, flat.shape[-1])
    if lines.shape[-1] > MAX_SORTED:
        return _kth_by_bisection(lines, k).view(flat.shape[:-1])
    # Sorting makes places of 8 bytes beside the values, and of all heads of a long video they would fill a third of a GB.
    parts = lines.split(max(1, MAX_SORTED // lines.shape[-1]))
    return torch.cat([x.sort(dim=-1).values[:, k - 1] for x in parts]).view(flat.shape[:-1])


def _kth_by_bisection(lines: Tensor, k: int) -> Tensor:
    """The k-th smallest number of each line, `float32 [N]` of `[N, n]`, found by counting: nothing is sorted or copied.

    Floats in their order are whole numbers in theirs, so 32 halvings end at the number itself.
    """
    low = lines.new_full((len(lines),), -INFINITE_BITS, dtype=torch.int64)
    high = -low
    for _ in range(32):
        middle = (low + high + 1) // 2
        below = (lines < _float_of(middle)[:, None]).sum(-1)
        low, high = torch.where(below < k, middle, low), torch.where(below < k, high, middle - 1)
    return _float_of(low)


def _float_of(rank: Tensor) -> Tensor:
    """The float whose size has the bits of the rank's, and its sign."""
    size = rank.abs().to(torch.int32).view(torch.float32)
    return torch.where(rank < 0, -size, size)


def _round_up(k: float) -> int:
    return max(1, math.ceil(k - ROUNDING))


def _check_fraction(name: str, value: float) -> None:
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must be in (0, 1], got {value}")
