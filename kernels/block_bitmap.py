"""What is kept of a mask between denoising steps: a bitmap 32 times smaller than the lists, and its density.

Bitmaps evolve in place: a vote is thinner than the mask it was taken under, and one program owns a query block's row,
so there is no second buffer and no phase bit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparsediff.block_mask import area_density, pack_bits
from sparsediff.kernels.block_lists import lists_from_dense
from sparsediff.kernels.launcher import aligned, launch_kernel


class PackedMask(NamedTuple):
    """One mask as it is stored.

    Attributes:
        bitmap: `uint8 [B, H, Mq, ceil(Nk / 8)]`, block `j` in bit `j % 8` of byte `j // 8`.
        density: `float32 [H]`, kept share of the token area, averaged over the batch.
        lists: `(kv_num_blocks, kv_indices)` of a `BlockMask`, or None if not asked for.
    """

    bitmap: Tensor
    density: Tensor
    lists: tuple[Tensor, Tensor] | None


def pack_mask(
    keep: Tensor,
    forced: Tensor,
    block_size: tuple[int, int],
    seq_lengths: tuple[int, int],
    *,
    bitmap: Tensor | None = None,
    want_lists: bool = True,
) -> PackedMask:
    """Store `keep | forced`.  No host synchronisation; on CUDA one launch and a sum.

    Args:
        keep: `bool [B, H, Mq, Nk]`.
        forced: `bool [Mq, Nk]`, kept in every head.
        block_size: `(query, key)` tokens a block.
        seq_lengths: `(query, key)` tokens; the last block of either side may be ragged.
        bitmap: written in place of a new one, if given.
        want_lists: whether to make `lists` too.
    """
    if keep.ndim != 4 or keep.dtype != torch.bool or forced.shape != keep.shape[2:]:
        raise ValueError(
            f"keep must be bool [B, H, Mq, Nk] and forced its last two dimensions, got {keep.dtype} "
            f"{list(keep.shape)} and {list(forced.shape)}"
        )
    form = pack_mask_triton if keep.is_cuda else pack_mask_reference
    return form(keep, forced, block_size, seq_lengths, bitmap=bitmap, want_lists=want_lists)


def pack_mask_reference(
    keep: Tensor,
    forced: Tensor,
    block_size: tuple[int, int],
    seq_lengths: tuple[int, int],
    *,
    bitmap: Tensor | None = None,
    want_lists: bool = True,
) -> PackedMask:
    """`pack_mask` in plain torch."""
    keep = keep | forced
    packed = pack_bits(keep)
    return PackedMask(
        packed if bitmap is None else bitmap.copy_(packed),
        area_density(keep, block_size, seq_lengths).mean(0),
        lists_from_dense(keep) if want_lists else None,
    )


def pack_mask_triton(
    keep: Tensor,
    forced: Tensor,
    block_size: tuple[int, int],
    seq_lengths: tuple[int, int],
    *,
    bitmap: Tensor | None = None,
    want_lists: bool = True,
) -> PackedMask:
    """`pack_mask` by a kernel."""
    from sparsediff.kernels._block_bitmap_fwd import pack_rows

    keep = keep.contiguous()
    (batch, heads, mq, nk), device = keep.shape, keep.device
    if bitmap is None:
        bitmap = torch.empty(batch, heads, mq, -(-nk // 8), dtype=torch.uint8, device=device)
    shares = torch.empty(batch, heads, mq, device=device)
    counts = indices = None
    if want_lists:
        counts = torch.empty(batch, heads, mq, dtype=torch.int32, device=device)
        indices = torch.empty(keep.shape, dtype=torch.int32, device=device)
    chunk = min(1024, max(16, 1 << (nk - 1).bit_length()))
    keep, forced = keep.view(torch.uint8), forced.contiguous().view(torch.uint8)
    launch_kernel(
        pack_rows,
        (batch * heads * mq,),
        (device, chunk, want_lists, aligned(keep, forced, bitmap)),
        (
            keep,
            forced,
            bitmap,
            # A pointer that its flag switches off still has to be a tensor.
            bitmap if counts is None else counts,
            bitmap if indices is None else indices,
            shares,
            mq,
            nk,
            *block_size,
            *seq_lengths,
            1.0 / (batch * math.prod(seq_lengths)),
        ),
        WITH_LISTS=want_lists,
        CHUNK=chunk,
        num_warps=max(1, chunk // 256),
    )
    lists = (counts, indices) if want_lists else None
    return PackedMask(bitmap, shares.sum((0, 2)), lists)
