"""Launches the portable Triton kernel, with pointers (`attend`) or through TMA (`attend_tma`).

Imported only where it runs: a machine without Triton never sees it.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sparsediff.block_mask import BlockMask
from sparsediff.kernels._block_sparse_fwd import block_sparse_fwd
from sparsediff.kernels.launcher import aligned, launch_kernel
from sparsediff.kernels.tma import readable, tile_descriptor
from sparsediff.kernels.tuning import INTERPRETED_CAPABILITY, Tile, get_tile


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
    tma: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Same contract as `_block_sparse_reference.attend`; no host synchronisation.

    Mass under this call's own log-sum-exp takes a second, cheaper pass without values: a block's share is not known
    before its row is finished.
    """
    batch, seq_q, heads, _ = query.shape
    (mq, nk), device = mask.num_blocks, query.device
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    own_mass = want_mass and lse_prev is None
    lse = torch.empty(batch, heads, seq_q, device=device) if want_lse or own_mass else None
    vote = None
    if vote_threshold is not None:
        vote = torch.zeros(batch, heads, mq, nk, device=device, dtype=torch.bool)
    tile = pick_tile(query, mask, tma=tma)
    mass = None
    if want_mass:
        planes = mask.block_size[0] // tile.block_m
        mass = torch.zeros(planes, batch, heads, mq, nk, device=device)
    call = {"scale": scale, "kv_lengths": kv_lengths, "tile": tile, "tma": tma}
    launch(
        query,
        key,
        value,
        mask,
        out=out,
        lse=lse,
        vote=vote,
        vote_threshold=vote_threshold,
        mass=None if own_mass else mass,
        lse_prev=lse_prev,
        **call,
    )
    if own_mass:
        launch(query, key, None, mask, mass=mass, lse_prev=lse, **call)
    if mass is not None:
        mass = mass[0] if len(mass) == 1 else mass.sum(0)
    return out, lse if want_lse else None, vote, mass


def attend_tma(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, **options: object
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """`attend` with tiles loaded by TMA; with pointers if TMA cannot read one of the tensors as it lies."""
    tma = all(readable(x) for x in (query, key, value))
    return attend(query, key, value, mask, tma=tma, **options)


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    mask: BlockMask,
    *,
    scale: float,
    tile: Tile,
    kv_lengths: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    vote: Tensor | None = None,
    vote_threshold: float | None = None,
    mass: Tensor | None = None,
    lse_prev: Tensor | None = None,
    tma: bool = False,
) -> None:
    """Run the kernel into the given outputs; without `value` it computes scores only (for `lse` and `mass`).

    `tma` is for tensors that are `tma.readable`.
    """
    batch, seq_q, heads, head_dim = query.shape
    (bq, bk), (mq, nk) = mask.block_size, mask.num_blocks
    query, key = _unit_stride(query), _unit_stride(key)
    # A pointer that its flag switches off still has to be a tensor.
    value = key if value is None else _unit_stride(value)
    result = query if out is None else out
    lse_prev = None if lse_prev is None else lse_prev.contiguous()
    counts = mask.kv_num_blocks.expand(batch, heads, mq)
    lists = mask.kv_indices.contiguous().expand(batch, heads, mq, nk)
    if counts.stride(2) != 1:
        counts = counts.contiguous()
    grid = (batch * heads * mq * (bq // tile.block_m),)
    if 0 in (*grid, seq_q):
        return
    tensors = (query, key, value, result, counts, lists, kv_lengths, lse_prev)
    tensors = [x for x in tensors if x is not None]
    block_d = triton.next_power_of_2(head_dim)
    sources = query, key, value
    if tma:
        rows = tile.block_m, tile.block_n, tile.block_n
        sources = [tile_descriptor(x, n, block_d) for x, n in zip(sources, rows, strict=True)]
    launch_kernel(
        block_sparse_fwd,
        grid,
        (
            query.device,
            tuple((x.dtype, x.shape, x.stride()) for x in tensors),
            mask.block_size,
            tile,
            tma,
            tuple(x is None for x in (out, lse, vote, mass, kv_lengths)),
            aligned(*tensors),
        ),
        (
            # inputs
            *sources,
            # outputs and by-products
            result,
            query if lse is None else lse,
            query if vote is None else vote.view(torch.uint8),
            query if mass is None else mass,
            query if lse_prev is None else lse_prev,
            # mask
            counts,
            lists,
            counts if kv_lengths is None else kv_lengths,
            # strides
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *result.stride()[:3],
            *counts.stride()[:2],
            *lists.stride()[:2],
            # numbers
            float(scale),
            0.0 if vote_threshold is None else float(vote_threshold),
            heads,
            seq_q,
            key.shape[1],
            mq,
            nk,
            0 if mass is None else mass.stride(0),
        ),
        # what is compiled
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        Q_BLOCK=bq,
        KV_BLOCK=bk,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        HAS_LENGTHS=kv_lengths is not None,
        WITH_PV=out is not None,
        WITH_LSE=lse is not None,
        WITH_VOTE=vote is not None,
        WITH_MASS=mass is not None,
        # float32 goes through the tensor cores in three tf32 products: as exact as float32, and far faster
        PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32",
        STAGES=tile.num_stages,
        TMA=tma,
        num_warps=tile.num_warps,
    )


def pick_tile(query: Tensor, mask: BlockMask, *, tma: bool = False) -> Tile:
    """The tile for these tensors on their device."""
    capability = (
        torch.cuda.get_device_capability(query.device) if query.is_cuda else INTERPRETED_CAPABILITY
    )
    bits, dim = query.element_size() * 8, query.shape[-1]
    return get_tile(capability, bits, dim, mask.block_size, tma=tma)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
