"""Moves tokens: the same permutation for every head, or another one for each.

A copy of rows of `head_dim` elements, bound by memory alone: every byte is read once and written once, and query, key
and value go in one launch because they share the index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsediff.kernels.launcher import aligned, launch_kernel

MAX_TENSORS = 3  # query, key and value
# Bytes of each tensor that one program moves, two loads of 16 bytes a thread: the best of 4 to 16 KB on an H200.
TILE_BYTES = 4096


def gather_tokens(
    tensors: tuple[Tensor, ...], index: Tensor, heads: Tensor | None = None
) -> tuple[Tensor, ...]:
    """`y[b, i, h] = x[b, index[heads[b, h], i], h]` for every `x`, as contiguous tensors.

    Args:
        tensors: one to three of one shape `[B, S, H, D]`, any strides.
        index: `int32 [orders, S]`, each row a permutation of the tokens.
        heads: `int32 [H]` or `[B, H]`, which row of `index` each head follows; left out, all follow the first.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    _check(tensors, index, heads)
    if tensors[0].is_cuda:
        return gather_tokens_triton(tensors, index, heads)
    return gather_tokens_reference(tensors, index, heads)


def gather_tokens_reference(
    tensors: tuple[Tensor, ...], index: Tensor, heads: Tensor | None = None
) -> tuple[Tensor, ...]:
    """`gather_tokens` in plain torch."""
    if heads is None:
        return tuple(x.index_select(1, index[0]) for x in tensors)
    places = index[heads.expand(tensors[0].shape[0], -1)].long().transpose(1, 2)  # [B, S, H]
    return tuple(x.gather(1, places[..., None].expand(x.shape)) for x in tensors)


def gather_tokens_triton(
    tensors: tuple[Tensor, ...], index: Tensor, heads: Tensor | None = None
) -> tuple[Tensor, ...]:
    """`gather_tokens` in one launch."""
    from sparsediff.kernels._token_order_fwd import gather_rows

    tensors = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)
    heads = heads if heads is None else heads.contiguous()
    batch, seq, num_heads, dim = tensors[0].shape
    outputs = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors)
    if outputs[0].numel():
        # A pointer that COUNT switches off still has to be a tensor.
        spare = MAX_TENSORS - len(tensors)
        sources = (*tensors, *tensors[:1] * spare)
        targets = (*outputs, *outputs[:1] * spare)
        block_d = 1 << (dim - 1).bit_length()
        rows = max(1, TILE_BYTES // (block_d * tensors[0].element_size()))
        launch_kernel(
            gather_rows,
            (-(-seq * num_heads // rows), batch),
            (
                index.device,
                tuple((x.dtype, x.shape, x.stride()) for x in tensors),
                None if heads is None else heads.ndim,
                aligned(*sources, index, *(() if heads is None else (heads,))),
            ),
            (
                *sources,
                *targets,
                index,
                index if heads is None else heads,
                *(step for x in sources for step in x.stride()[:3]),
                seq,
                num_heads,
                num_heads if heads is not None and heads.ndim == 2 else 0,
            ),
            COUNT=len(tensors),
            PER_HEAD=heads is not None,
            HEAD_DIM=dim,
            BLOCK_D=block_d,
            ROWS=rows,
            num_warps=4,
        )
    return outputs


def _check(tensors: tuple[Tensor, ...], index: Tensor, heads: Tensor | None) -> None:
    first = tensors[0]
    if not 1 <= len(tensors) <= MAX_TENSORS or first.ndim != 4:
        raise ValueError(f"one to {MAX_TENSORS} tensors [B, S, H, D] move together")
    for x in tensors:
        if x.shape != first.shape:
            raise ValueError(
                f"tensors that move together share a shape, got {list(first.shape)} and {list(x.shape)}"
            )
    _, seq, num_heads, _ = first.shape
    if index.shape[-1] != seq:
        raise ValueError(f"the order is made for {index.shape[-1]} tokens, the tensor has {seq}")
    if heads is not None and heads.shape[-1] != num_heads:
        raise ValueError(
            f"the order is made for {heads.shape[-1]} heads, the tensor has {num_heads}"
        )
    if heads is not None and heads.ndim == 2 and len(heads) != len(first):
        raise ValueError(
            f"the order is made for a batch of {len(heads)}, the tensor has {len(first)}"
        )
