"""Launches the Hopper kernel for pairs of 64-row blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsediff.block_mask import BlockMask
from sparsediff.kernels import _block_sparse_triton, block_lists, block_pairs
from sparsediff.kernels._block_sparse_gluon import multiprocessors, tma_descriptor
from sparsediff.kernels._block_sparse_pair_sm90 import block_sparse_pairs_sm90
from sparsediff.kernels._block_sparse_pair_wide_sm90 import block_sparse_wide_pairs_sm90
from sparsediff.kernels.launcher import aligned, launch_kernel
from sparsediff.kernels.tuning import PairForm, hopper_pair_form


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
    """Same contract as `_block_sparse_reference.attend`; no host synchronisation.

    Calls that want a vote or mass go to the portable kernel: the walk of a pair has an order of its own, and a vote
    depends on it.
    """
    if vote_threshold is not None or want_mass:
        return _block_sparse_triton.attend(
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
    form = hopper_pair_form(64 if query.shape[-1] == 64 else 128)
    out, lse = launch(
        query, key, value, mask, scale=scale, form=form, kv_lengths=kv_lengths, want_lse=want_lse
    )
    return out, lse, None, None


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    scale: float,
    form: PairForm,
    kv_lengths: Tensor | None = None,
    want_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Join the lists and run the kernel in a given form: output and log-sum-exp."""
    batch, seq_q, heads, head_dim = query.shape
    seq_k, device = key.shape[1], query.device
    out = torch.empty(batch, seq_q, heads, head_dim, dtype=value.dtype, device=device)
    lse = torch.empty(batch, heads, seq_q, device=device) if want_lse else None
    pairs = block_pairs.pair_rows(
        mask.kv_num_blocks, mask.kv_indices, seq_k, kv_lengths=kv_lengths, block_n=64
    )
    totals, order, draw = block_lists.order(pairs.totals, batch, heads)
    if len(totals) == 0:
        return out, lse
    # Strides in pairs: a mask for all heads or samples has one walk for them.
    made_batch, made_heads, num_pairs = pairs.totals.shape
    stride_b = made_heads * num_pairs if made_batch > 1 else 0
    stride_h = num_pairs if made_heads > 1 else 0
    block_d = 64 if head_dim == 64 else 128
    launch_kernel(
        block_sparse_wide_pairs_sm90 if form.wide else block_sparse_pairs_sm90,
        (min(form.programs * multiprocessors(device), len(totals)),),
        (device, query.dtype, block_d, form, kv_lengths is None, want_lse, aligned(*pairs)),
        (
            # inputs and output
            *(tma_descriptor(x, 64, block_d) for x in (query, key, value, out)),
            out if lse is None else lse,
            # walks
            totals,
            pairs.rows,
            pairs.walk,
            order,
            draw,
            stride_b,
            stride_h,
            # numbers
            float(scale),
            heads,
            seq_q,
            num_pairs,
            mask.num_blocks[1],
            len(totals),
        ),
        # what is compiled
        **form.constants,
        BLOCK_D=block_d,
        HAS_LENGTHS=kv_lengths is not None,
        WITH_LSE=want_lse,
        num_warps=4,
        maxnreg=form.registers[0],
    )
    return out, lse
