"""Launches the Hopper kernel with 8-bit operands."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from sparsediff.block_mask import BlockMask
from sparsediff.kernels._block_sparse_8bit_sm90 import block_sparse_fwd_8bit_sm90
from sparsediff.kernels._block_sparse_gluon import (
    ENTRY_REGISTERS,
    attend,
    multiprocessors,
    prepare,
    tma_descriptor,
)
from sparsediff.kernels.quantize import quantize_pair, quantize_values
from sparsediff.kernels.tuning import hopper_8bit_ring


def attend_8bit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    fp8_pv: bool,
    scale: float,
    kv_lengths: Tensor | None = None,
    vote_threshold: float | None = None,
    lse_prev: Tensor | None = None,
    want_lse: bool = False,
    want_mass: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Contract of `_block_sparse_reference.attend`, with 8-bit logits and with `fp8_pv` 8-bit values too.

    A vote keeps a margin for the rounding of the logits: it errs towards keeping a block.  Calls with key lengths stay
    in 16 bits: the mean and the scales of the keys would have to leave out what lies past a length.
    """
    if kv_lengths is not None:
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
    _, seq_q, heads, block_d = query.shape
    block_n = mask.block_size[1]
    call = prepare(
        value,
        mask,
        seq_q,
        vote_threshold=vote_threshold,
        want_lse=want_lse,
        want_mass=want_mass,
    )
    num_rows = len(call.counts)
    if num_rows == 0:
        return call[:4]
    pair = quantize_pair(
        query,
        key,
        block_n,
        with_shift=want_lse or lse_prev is not None,
        with_error=vote_threshold is not None,
    )
    # Read from the inputs rather than taken from the kernel's logits, which lack it.
    shift = None if pair.shift is None else scale * pair.shift
    norm = None if lse_prev is None else lse_prev - shift
    if fp8_pv:
        values = quantize_values(value, block_n)
        v_desc, v_scale = (
            tma_descriptor(values.value.transpose(1, 2), block_d, block_n),
            values.scale,
        )
    else:
        v_desc, v_scale = tma_descriptor(value, block_n, block_d), pair.key_scale
    block_sparse_fwd_8bit_sm90[(min(multiprocessors(query.device), num_rows),)](
        # inputs and output
        tma_descriptor(pair.query, 64, block_d),
        tma_descriptor(pair.key, block_n, block_d),
        v_desc,
        tma_descriptor(call.out, 64, block_d),
        *call.byproducts(norm),
        # mask
        call.counts,
        call.lists,
        call.order,
        call.draw,
        # scales
        pair.query_scale,
        pair.key_scale,
        v_scale,
        pair.query_scale if pair.error is None else pair.error,
        *call.lists.stride()[:2],
        # numbers
        scale,
        0.0 if vote_threshold is None else vote_threshold,
        heads,
        seq_q,
        key.shape[1],
        *mask.num_blocks,
        num_rows,
        # what is compiled
        RING=hopper_8bit_ring(fp8_pv),
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        FP8_PV=fp8_pv,
        **call.flags(norm),
        num_warps=4,
        maxnreg=ENTRY_REGISTERS,
    )
    lse = None if call.lse is None else call.lse + shift
    return call.out, lse, call.vote, call.mass


attend_int8 = partial(attend_8bit, fp8_pv=False)
attend_fp8 = partial(attend_8bit, fp8_pv=True)
