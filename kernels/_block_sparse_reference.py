"""Block-sparse attention, slow and obvious: what every other backend must compute.

Loops over query blocks, scores all keys, throws away what the mask drops.  Runs on any device without a host
synchronisation; costs what dense attention costs, and more.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsediff.block_mask import BlockMask

LOG2E = 1.4426950408889634


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    scale: float,
    kv_lengths: Tensor | None = None,
    vote_threshold: float | None = None,
    lse_prev: Tensor | None = None,
    want_lse: bool = False,
    want_mass: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Attention over the kept blocks: `(out, lse, vote, mass)` as `attend_blocks` describes them.

    Arithmetic is float64 for float64 inputs and float32 otherwise; `out` and `lse` come back in that precision's
    natural type (`lse` float64 for float64 inputs), so that tests can take this as the exact answer.
    """
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, seq_q, heads, _ = query.shape
    seq_k = key.shape[1]
    (bq, bk), (mq, nk) = mask.block_size, mask.num_blocks
    q, k, v = (x.transpose(1, 2).to(compute) for x in (query, key, value))  # [B, H, S, D]

    lengths = torch.full((batch,), seq_k, device=query.device) if kv_lengths is None else kv_lengths
    visible = torch.arange(seq_k, device=query.device) < lengths[:, None]  # [B, Sk]
    v = torch.where(
        visible[:, None, :, None], v, 0
    )  # 0 * NaN is NaN: what is not attended must not leak
    reachable = torch.arange(nk, device=query.device) * bk < lengths[:, None]  # [B, Nk]
    kept = (mask.to_dense() & reachable[:, None, None]).expand(batch, heads, mq, nk)

    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], -math.inf, dtype=compute, device=query.device)
    vote = torch.zeros(batch, heads, mq, nk, dtype=torch.bool, device=query.device)
    mass = torch.zeros(batch, heads, mq, nk, dtype=torch.float32, device=query.device)
    for m in range(mq):
        rows = slice(m * bq, min((m + 1) * bq, seq_q))
        tokens = (
            kept[:, :, m].repeat_interleave(bk, -1)[..., :seq_k] & visible[:, None]
        )  # [B, H, Sk]
        scores = (q[:, :, rows] @ k.mT * scale).masked_fill(~tokens[:, :, None], -math.inf)
        row_lse = scores.logsumexp(-1)
        # A row that attends to nothing has lse -inf, and -inf - -inf is NaN.
        probabilities = (scores - row_lse[..., None].nan_to_num(neginf=0.0)).exp()
        out[:, :, rows] = probabilities @ v
        lse[:, :, rows] = row_lse
        if vote_threshold is not None:
            lists = mask.kv_indices[:, :, m], mask.kv_num_blocks[:, :, m]
            vote[:, :, m] = _vote(scores, kept[:, :, m], lists, bk, vote_threshold)
        if want_mass:
            norm = row_lse if lse_prev is None else lse_prev[:, :, rows]
            mass[:, :, m] = _mass(scores, norm, bk)

    return (
        out.to(query.dtype).transpose(1, 2).contiguous(),
        lse if want_lse else None,
        vote if vote_threshold is not None else None,
        mass if want_mass else None,
    )


def _vote(
    scores: Tensor, kept: Tensor, lists: tuple[Tensor, Tensor], block: int, threshold: float
) -> Tensor:
    """LiteAttention's running-max vote of one query block: `bool [B, H, Nk]` (arXiv 2511.11062 and its code).

    `scores` `[B, H, rows, Sk]` hold -inf where nothing is attended; blocks are visited from the end of their list, of
    `lists` `int32 [B|1, H|1, Nk]` and counts, to its start.
    """
    indices, counts = (x.expand(*kept.shape[:2], *x.shape[2:]) for x in lists)
    padded = torch.nn.functional.pad(scores, (0, -scores.shape[-1] % block), value=-math.inf)
    best = padded.unflatten(-1, (-1, block)).amax(-1)  # [B, H, rows, Nk]
    keep = torch.zeros_like(kept)
    running = torch.full_like(scores[..., 0], -math.inf)
    for visited in range(kept.shape[-1]):
        place = (counts - 1 - visited)[..., None]
        # What a list holds past its count is arbitrary.
        j = indices.gather(-1, place.clamp(min=0).long()).where(place >= 0, 0).long()
        local = best.gather(-1, j[..., None].expand(*running.shape, 1))[..., 0]
        local = local.where(place >= 0, -math.inf)
        # The first visited block compares with -inf and always stays; a block past the length gives NaN or -inf.
        wanted = ((local - running) * LOG2E > threshold).any(-1, keepdim=True) & (place >= 0)
        keep |= torch.zeros_like(kept).scatter(-1, j, wanted) & kept
        running = torch.maximum(running, local)
    return keep


def _mass(scores: Tensor, norm: Tensor, block: int) -> Tensor:
    """Softmax mass of each key block under the log-normaliser `norm` `[B, H, rows]`, summed over rows."""
    # A row that had nothing to attend to has no softmax: it contributes nothing.
    weights = (scores - norm[..., None].nan_to_num(neginf=math.inf)).exp()
    padded = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % block))
    return padded.unflatten(-1, (-1, block)).sum((-3, -1)).float()
