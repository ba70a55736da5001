"""Queries, keys and values in 8 bits, as in SageAttention (arXiv 2410.02367) and SageAttention2 (arXiv 2411.10958).

Keys lose their mean over tokens first: it shifts all logits of a query alike, which softmax does not see, and it is
most of what outlier channels are made of.  Any vector would do for the shift, so the mean is taken over a sample.
Queries get a scale a token, keys a scale a block of the mask, both in integers.  Values are in e4m3, which rounds a
number by at most 1/16 of itself whatever its size, with a scale a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsediff.kernels.block_scores import block_means
from sparsediff.kernels.launcher import aligned, launch_kernel

MEAN_TOKENS = 4096  # at least as many keys make the mean, where there are as many
MEAN_BLOCK = 64  # tokens of the sample that are summed together
# Position of a token among 32 in transposed values: the order in which a thread of the tensor cores holds its
# probabilities, four to a register.  Position p holds token PV_ORDER[p].
PV_ORDER = tuple(16 * (p // 16) + 8 * (p // 2 % 2) + 2 * (p // 4 % 4) + p % 2 for p in range(32))
QUERY_BLOCK = 128  # tokens a program
# Three programs share a multiprocessor: while one computes, two have their loads under way.
PAIR_OPTIONS = {"num_warps": 8, "maxnreg": 80}
VALUES_OPTIONS = {"num_warps": 4}
P_BITS = 8  # probabilities reach 2**8 in e4m3, whose largest number is 448


class QuantizedPair(NamedTuple):
    """8-bit query and key with what turns their product back into logits: `q_scale * k_scale * (q . k)`.

    Attributes:
        query: `int8 [B, Sq, H, D]`.
        key: `int8 [B, Sk, H, D]`, without its mean.
        query_scale: `float32 [B, H, Sq]`.
        key_scale: `float32 [B, H, Nk]`.
        shift: `float32 [B, H, Sq]`, query times the key mean: what every logit of a query lacks before scaling; None if
            not asked for.
        error: `float32 [B, H, Sq]`, standard error of a query's logits before scaling, if rounding is as random as it
            looks; None if not asked for.
    """

    query: Tensor
    key: Tensor
    query_scale: Tensor
    key_scale: Tensor
    shift: Tensor | None
    error: Tensor | None


class QuantizedValues(NamedTuple):
    """8-bit values for the second product.

    Attributes:
        value: `float8_e4m3fn [B, H, D, Nk * block]`, transposed, tokens of every 32 in `PV_ORDER`, zeros past the end.
        scale: `float32 [B, H, Nk + 1]`: for every block what it adds to the base-2 exponents of its probabilities;
            then what the sum of products is multiplied by.
    """

    value: Tensor
    scale: Tensor


def quantize_pair(
    query: Tensor, key: Tensor, key_block: int, *, with_shift: bool = True, with_error: bool = True
) -> QuantizedPair:
    """Quantise `[B, S, H, D]` query and key; on CUDA one pass over both."""
    run = quantize_pair_triton if query.is_cuda else quantize_pair_reference
    return run(query, key, key_block, with_shift=with_shift, with_error=with_error)


def quantize_values(value: Tensor, block: int) -> QuantizedValues:
    """Quantise `[B, S, H, D]` values in blocks of a multiple of 32 tokens; on CUDA one pass."""
    run = quantize_values_triton if value.is_cuda else quantize_values_reference
    return run(value, block)


# -- references -----------------------------------------------------------------------------------------------------


def quantize_pair_reference(
    query: Tensor, key: Tensor, key_block: int, *, with_shift: bool = True, with_error: bool = True
) -> QuantizedPair:
    """`quantize_pair` in plain torch."""
    q, k = (x.float().transpose(1, 2) for x in (query, key))  # [B, H, S, D]
    mean = _sample(key).float().mean(1)[:, :, None]
    q_scale = q.abs().amax(-1).clamp_min(1e-6) / 127
    k = k - mean
    padded = torch.nn.functional.pad(k, (0, 0, 0, -k.shape[2] % key_block)).unflatten(
        2, (-1, key_block)
    )
    k_scale = padded.abs().amax((-1, -2)).clamp_min(1e-6) / 127
    spread = k_scale.repeat_interleave(key_block, -1)[..., : k.shape[2], None]
    q8, k8 = (q / q_scale[..., None]).round().to(torch.int8), (k / spread).round().to(torch.int8)
    return QuantizedPair(
        q8.transpose(1, 2).contiguous(),
        k8.transpose(1, 2).contiguous(),
        q_scale,
        k_scale,
        (q * mean).sum(-1) if with_shift else None,
        _standard_error(q_scale, q.norm(dim=-1), k_scale, k.norm(dim=-1)) if with_error else None,
    )


def quantize_values_reference(value: Tensor, block: int) -> QuantizedValues:
    """`quantize_values` in plain torch."""
    v = value.float().permute(0, 2, 3, 1)  # [B, H, D, S]
    v = torch.nn.functional.pad(v, (0, -v.shape[-1] % block)).unflatten(-1, (-1, block))
    top = v.abs().amax((2, 4)).clamp_min(1e-20)  # [B, H, Nk]
    v8 = (v * (448 / top)[:, :, None, :, None]).to(torch.float8_e4m3fn).flatten(-2)
    v8 = v8.view(torch.uint8).unflatten(-1, (-1, 32))[..., list(PV_ORDER)].flatten(-2)
    return QuantizedValues(v8.contiguous().view(torch.float8_e4m3fn), _value_scale(top))


# -- launchers ------------------------------------------------------------------------------------------------------


def quantize_pair_triton(
    query: Tensor, key: Tensor, key_block: int, *, with_shift: bool = True, with_error: bool = True
) -> QuantizedPair:
    """`quantize_pair` by a kernel."""
    from sparsediff.kernels import _quantize_fwd

    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    (batch, seq_q, heads, dim), seq_k = query.shape, key.shape[1]
    blocks = -(-seq_k // key_block)
    mean = block_means(_sample(key), MEAN_BLOCK).mean(2)
    q8, k8 = (torch.empty(x.shape, dtype=torch.int8, device=x.device) for x in (query, key))

    def room(tokens: int, wanted: bool = True) -> Tensor | None:
        return torch.empty(batch, heads, tokens, device=query.device) if wanted else None

    q_scale, k_scale, shift = room(seq_q), room(blocks), room(seq_q, with_shift)
    q_norm, k_norm = room(seq_q, with_error), room(blocks, with_error)
    if q8.numel() + k8.numel():
        launch_kernel(
            _quantize_fwd.quantize_pair,
            (batch * heads, blocks + -(-seq_q // QUERY_BLOCK)),
            (
                (
                    query.device,
                    query.dtype,
                    query.stride(),
                    key.dtype,
                    key.stride(),
                    dim,
                    key_block,
                ),
                (with_shift, with_error, aligned(query, key)),
            ),
            (
                query,
                key,
                mean,
                q8,
                k8,
                q_scale,
                k_scale,
                *(mean if x is None else x for x in (shift, q_norm, k_norm)),
                *query.stride()[:3],
                *key.stride()[:3],
                heads,
                seq_q,
                seq_k,
                blocks,
            ),
            Q_BLOCK=QUERY_BLOCK,
            K_BLOCK=key_block,
            HEAD_DIM=dim,
            BLOCK_D=1 << (dim - 1).bit_length(),
            WITH_SHIFT=with_shift,
            WITH_NORMS=with_error,
            **PAIR_OPTIONS,
        )
    error = _standard_error(q_scale, q_norm, k_scale, k_norm) if with_error else None
    return QuantizedPair(q8, k8, q_scale, k_scale, shift, error)


def quantize_values_triton(value: Tensor, block: int) -> QuantizedValues:
    """`quantize_values` by a kernel; `D` must be a power of 2."""
    from sparsediff.kernels import _quantize_fwd

    value = value if value.stride(-1) == 1 else value.contiguous()
    batch, seq, heads, dim = value.shape
    blocks, device = -(-seq // block), value.device
    v8 = torch.empty(batch, heads, dim, blocks * block, dtype=torch.float8_e4m3fn, device=device)
    top = torch.empty(batch, heads, blocks, device=device)
    if v8.numel():
        _quantize_fwd.quantize_values[(batch * heads, blocks)](
            value, v8, top, *value.stride()[:3], heads, seq, blocks,
            BLOCK=block, HEAD_DIM=dim, **VALUES_OPTIONS,
        )  # fmt: skip
    return QuantizedValues(v8, _value_scale(top))


def _sample(key: Tensor) -> Tensor:
    """Keys that make the mean: whole `MEAN_BLOCK`s, so that all block means weigh the same, or one that is not whole."""
    key = key[:, :: max(1, key.shape[1] // MEAN_TOKENS)]
    tokens = key.shape[1]
    return key[:, : max(tokens // MEAN_BLOCK * MEAN_BLOCK, min(tokens, MEAN_BLOCK))]


def _standard_error(q_scale: Tensor, q_norm: Tensor, k_scale: Tensor, k_norm: Tensor) -> Tensor:
    """`QuantizedPair.error` from the scales and norms of query tokens, and those of key blocks or tokens."""
    if k_norm.shape[-1] == 0:  # no keys, no logits
        return torch.zeros_like(q_scale)
    step_error = 12**-0.5  # of rounding, in steps
    from_query = q_scale * (step_error * k_norm.amax(-1, keepdim=True))
    from_key = q_norm * (step_error * k_scale.amax(-1, keepdim=True))
    return torch.hypot(from_query, from_key)


def _value_scale(top: Tensor) -> Tensor:
    """`QuantizedValues.scale` from the largest magnitude of every block, `[B, H, Nk]`."""
    best = top.amax(-1, keepdim=True)
    # A block 2**60 times smaller than another adds nothing that float32 could show.
    exponent = P_BITS + (top / best).log2().clamp_min(-60)
    return torch.cat([exponent, best / 448 * 2.0**-P_BITS], -1)
