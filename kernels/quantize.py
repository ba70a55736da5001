"""Queries and keys in 8 bits, as in SageAttention (arXiv 2411.10958).

Keys lose their mean over tokens first: it shifts all logits of a query alike, which softmax does not see, and it is
most of what outlier channels are made of.  Queries get a scale a token, keys a scale a block of the mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsediff.kernels.block_scores import block_means


class QuantizedPair(NamedTuple):
    """8-bit query and key with what turns their product back into logits: `q_scale * k_scale * (q . k)`.

    Attributes:
        query: `int8 [B, Sq, H, D]`.
        key: `int8 [B, Sk, H, D]`, without its mean.
        query_scale: `float32 [B, H, Sq]`.
        key_scale: `float32 [B, H, Nk]`.
        shift: `float32 [B, H, Sq]`, query times the key mean: what every logit of a query lacks before scaling.
    """

    query: Tensor
    key: Tensor
    query_scale: Tensor
    key_scale: Tensor
    shift: Tensor


def quantize_pair(query: Tensor, key: Tensor, key_block: int) -> QuantizedPair:
    """Quantise `[B, S, H, D]` query and key; on CUDA three passes without copies."""
    return (
        quantize_triton(query, key, key_block)
        if query.is_cuda
        else quantize_reference(query, key, key_block)
    )


def quantize_reference(query: Tensor, key: Tensor, key_block: int) -> QuantizedPair:
    """`quantize_pair` in plain torch."""
    q, k = (x.float().transpose(1, 2) for x in (query, key))  # [B, H, S, D]
    mean = k.mean(2, keepdim=True)
    shift = (q * mean).sum(-1)
    q_scale = q.abs().amax(-1).clamp_min(1e-6) / 127
    k = k - mean
    padded = torch.nn.functional.pad(k, (0, 0, 0, -k.shape[2] % key_block)).unflatten(
        2, (-1, key_block)
    )
    k_scale = padded.abs().amax((-1, -2)).clamp_min(1e-6) / 127
    spread = k_scale.repeat_interleave(key_block, -1)[..., : k.shape[2], None]
    q8, k8 = _away_from_zero(q / q_scale[..., None]), _away_from_zero(k / spread)
    return QuantizedPair(
        q8.transpose(1, 2).contiguous(), k8.transpose(1, 2).contiguous(), q_scale, k_scale, shift
    )


def quantize_triton(query: Tensor, key: Tensor, key_block: int) -> QuantizedPair:
    """`quantize_pair` by kernels."""
    from sparsediff.kernels._quantize_fwd import quantize_block

    batch, seq_k, heads, dim = key.shape
    blocks = -(-seq_k // key_block)
    tokens = (
        seq_k - torch.arange(0, seq_k, key_block, device=key.device, dtype=torch.float32)
    ).clamp(max=key_block)
    mean = (block_means(key, key_block) * tokens[:, None]).sum(2) / seq_k  # [B, H, D]
    pair = []
    for x, block, per_row in ((query, 64, True), (key, key_block, False)):
        x = x if x.stride(-1) == 1 else x.contiguous()
        seq = x.shape[1]
        count = -(-seq // block)
        out = torch.empty(batch, seq, heads, dim, dtype=torch.int8, device=x.device)
        scale = torch.empty(batch, heads, seq if per_row else blocks, device=x.device)
        shift = torch.empty(batch, heads, seq, device=x.device) if per_row else scale
        if out.numel():
            quantize_block[(count, batch * heads)](
                x, mean, out, scale, shift, *x.stride()[:3], heads, seq, count,
                BLOCK=block, HEAD_DIM=dim, BLOCK_D=1 << (dim - 1).bit_length(), PER_ROW=per_row, num_warps=4,
            )  # fmt: skip
        pair.append((out, scale, shift))
    (q8, q_scale, shift), (k8, k_scale, _) = pair
    return QuantizedPair(q8, k8, q_scale, k_scale, shift)


def _away_from_zero(x: Tensor) -> Tensor:
    return (x + torch.where(x >= 0, 0.5, -0.5)).trunc().to(torch.int8)
