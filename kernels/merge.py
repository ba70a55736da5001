"""Attention in parts: each over some of the keys, put together by their log-sum-exp.

    lse = log sum_p exp(lse_p)        out = sum_p exp(lse_p - lse) out_p

exact for any split of the keys: text beside video, or the shards of a sequence (LiteAttention, arXiv 2511.11062; ring
attention).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Put together what the same queries make of disjoint sets of keys.

    Args:
        outs: of each part, `[B, Sq, H, D]`.
        lses: of each part, `float32 [B, H, Sq]`, as `block_sparse_attention(..., return_lse=True)` returns them.

    Returns:
        `(out, lse)` of all keys, in the first part's dtype and float32.  A row that no part attends with gives zeros
        and -inf.

    Raises:
        ValueError: no parts, or parts that do not belong together.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"as many outputs as log-sum-exps and at least one are needed, got {len(outs)} and {len(lses)}"
        )
    batch, tokens, heads, _ = outs[0].shape
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != outs[0].shape or lse.shape != (batch, heads, tokens):
            raise ValueError(
                f"every part must be {list(outs[0].shape)} with log-sum-exp {[batch, heads, tokens]}, got "
                f"{list(out.shape)} and {list(lse.shape)}"
            )
    parts = torch.stack([lse.float() for lse in lses])
    lse = parts.logsumexp(0)
    # A row without keys has -inf everywhere, and -inf - -inf is NaN.
    weights = (parts - lse.nan_to_num(neginf=0.0)).exp().transpose(-1, -2)[..., None]
    out = sum(weight * part.to(weights.dtype) for weight, part in zip(weights, outs, strict=True))
    return out.to(outs[0].dtype), lse
