"""Launches the Hopper kernel.  Gluon is experimental in Triton: only the versions it was compiled under are used."""

from __future__ import annotations

import copy
from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparsediff.block_mask import BlockMask
from sparsediff.kernels import block_lists
from sparsediff.kernels._block_sparse_sm90 import block_sparse_fwd_sm90
from sparsediff.kernels.quantize import QuantizedPair, quantize_pair
from sparsediff.kernels.tuning import hopper_ring


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
    """Same contract as `_block_sparse_reference.attend`; no host synchronisation."""
    return _launch(
        query,
        key,
        value,
        mask,
        scale=scale,
        kv_lengths=kv_lengths,
        vote_threshold=vote_threshold,
        lse_prev=lse_prev,
        want_lse=want_lse,
        want_mass=want_mass,
    )


def attend_int8(
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
    """`attend` with 8-bit logits; calls with key lengths, or that ask for a vote, stay in 16 bits.

    A vote compares logits with a threshold, and its margin for the rounding of 8 bits is not measured yet; the mean of
    the keys would have to leave out what lies past a length.
    """
    if kv_lengths is not None or vote_threshold is not None:
        return attend(
            query,
            key,
            value,
            mask,
            scale=scale,
            kv_lengths=kv_lengths,
            vote_threshold=vote_threshold,
            lse_prev=lse_prev,
            want_lse=want_lse,
            want_mass=want_mass,
        )
    pair = quantize_pair(query, key, mask.block_size[1])
    shift = scale * pair.shift  # what the kernel's logits lack
    out, lse, _, mass = _launch(
        pair.query,
        pair.key,
        value,
        mask,
        scale=scale,
        lse_prev=None if lse_prev is None else lse_prev - shift,
        want_lse=want_lse,
        want_mass=want_mass,
        pair=pair,
    )
    return out, None if lse is None else lse + shift, None, mass


def _launch(
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
    pair: QuantizedPair | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    batch, seq_q, heads, head_dim = query.shape
    (mq, nk), device = mask.num_blocks, query.device
    out = torch.empty(query.shape, dtype=value.dtype, device=device)
    lse = torch.empty(batch, heads, seq_q, device=device) if want_lse else None
    vote = mass = None
    if vote_threshold is not None:
        vote = torch.zeros(batch, heads, mq, nk, device=device, dtype=torch.bool)
    if want_mass:
        mass = torch.zeros(batch, heads, mq, nk, device=device)
    num_rows = batch * heads * mq
    if num_rows == 0:
        return out, lse, vote, mass
    counts = mask.kv_num_blocks
    if kv_lengths is not None:
        counts = block_lists.visible_counts(
            counts, mask.kv_indices, kv_lengths, mask.block_size[1], batch, heads
        )
    counts, order, draw = block_lists.order(counts, batch, heads)
    lists = mask.kv_indices.contiguous().expand(batch, heads, mq, nk)
    block_n, block_d = mask.block_size[1], 64 if head_dim == 64 else 128
    ring, alias = hopper_ring(block_n, block_d, pair is not None)
    programs = min(multiprocessors(device), num_rows)
    space = torch.empty(programs, nk + 1, 128, device=device) if want_mass else out
    block_sparse_fwd_sm90[(programs,)](
        # inputs and output
        _descriptor(query, 64, block_d),
        _descriptor(key, block_n, block_d),
        _descriptor(value, block_n, block_d),
        _descriptor(out, 64, block_d),
        # by-products; a pointer that its flag switches off still has to be a tensor
        out if lse is None else lse,
        counts if vote is None else vote.view(torch.uint8),
        out if mass is None else mass,
        out if lse_prev is None else lse_prev.contiguous(),
        space,
        # mask
        counts,
        lists,
        counts if kv_lengths is None else kv_lengths,
        order,
        draw,
        counts if pair is None else pair.query_scale,
        counts if pair is None else pair.key_scale,
        *lists.stride()[:2],
        # numbers
        scale,
        0.0 if vote_threshold is None else vote_threshold,
        heads,
        seq_q,
        key.shape[1],
        mq,
        nk,
        num_rows,
        # what is compiled
        RING=ring,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        ALIAS=alias,
        HAS_LENGTHS=kv_lengths is not None,
        WITH_LSE=lse is not None,
        WITH_VOTE=vote is not None,
        WITH_MASS=want_mass,
        HAS_LSE_PREV=want_mass and lse_prev is not None,
        INT8=pair is not None,
        num_warps=4,
        # 3 x 128 + 32 threads share 64k registers at the start; the consumers then take 240 each
        maxnreg=168,
    )
    return out, lse, vote, mass


def _descriptor(x: Tensor, rows: int, block_d: int) -> TensorDescriptor:
    """TMA view `[B, H, S, D]` of a `[B, S, H, D]` tensor, in boxes of `rows x block_d`.

    TMA wants a unit last stride and everything else on 16 bytes; a tensor that is not so is copied.
    """
    form = _form(x.dtype, x.shape, x.stride(), rows, block_d)
    if form is None or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
        form = _form(x.dtype, x.shape, x.stride(), rows, block_d)
    descriptor = copy.copy(form)
    descriptor.base = x
    return descriptor


# Making a descriptor takes longer than launching the kernel, and calls differ in addresses alone.
@lru_cache(maxsize=256)
def _form(
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    strides: tuple[int, int, int, int],
    rows: int,
    block_d: int,
) -> TensorDescriptor | None:
    """The descriptor of such a tensor, but for its address; None if TMA cannot read it."""
    unit = 16 // dtype.itemsize
    batch, seq, heads, dim = shape
    # The stride of a dimension of size 1 is never used, but it is checked.
    step = [s if size > 1 else dim * 16 for s, size in zip(strides, shape, strict=True)]
    if strides[3] != 1 or any(s <= 0 or s % unit for s in step[:3]):
        return None
    layout = gl.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=dtype.itemsize * 8, rank=4
    )
    return TensorDescriptor(
        torch.empty(0, dtype=dtype),
        [batch, heads, seq, dim],
        [step[0], step[2], step[1], 1],
        [1, 1, rows, block_d],
        layout,
    )


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many a device has; asking it takes microseconds."""
    return torch.cuda.get_device_properties(device).multi_processor_count
