"""Launches the Hopper kernel.  Gluon is experimental in Triton: only the versions it was compiled under are used."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparsediff.block_mask import BlockMask
from sparsediff.kernels import block_lists
from sparsediff.kernels._block_sparse_sm90 import block_sparse_fwd_sm90
from sparsediff.kernels.launcher import aligned, launch_kernel
from sparsediff.kernels.tma import at, head_strides
from sparsediff.kernels.tuning import hopper_ring

# 3 x 128 + 32 threads share 64k registers at the start; the consumers then take 240 each.
ENTRY_REGISTERS = 168


class Prepared(NamedTuple):
    """What both Hopper kernels are launched with besides their operands."""

    out: Tensor
    lse: Tensor | None
    vote: Tensor | None
    mass: Tensor | None
    counts: Tensor  # int32 [B * H * Mq]
    lists: Tensor  # int32 [B, H, Mq, Nk]
    order: Tensor  # int32 [B * H * Mq]
    draw: Tensor  # int32 [1]
    space: Tensor  # float32 [programs, 2, Nk + 1, 128]

    def byproducts(self, lse_prev: Tensor | None) -> tuple[Tensor, ...]:
        """Pointers in the order of the kernels' arguments; one that its flag switches off still is a tensor."""
        return (
            self.out if self.lse is None else self.lse,
            self.counts if self.vote is None else self.vote.view(torch.uint8),
            self.out if self.mass is None else self.mass,
            self.out if lse_prev is None else lse_prev.contiguous(),
            self.space,
        )

    def flags(self, lse_prev: Tensor | None) -> dict[str, bool]:
        """Which by-products are compiled in."""
        return {
            "WITH_LSE": self.lse is not None,
            "WITH_VOTE": self.vote is not None,
            "WITH_MASS": self.mass is not None,
            "HAS_LSE_PREV": self.mass is not None and lse_prev is not None,
        }


def prepare(
    value: Tensor,
    mask: BlockMask,
    seq_q: int,
    *,
    kv_lengths: Tensor | None = None,
    vote_threshold: float | None = None,
    want_lse: bool = False,
    want_mass: bool = False,
) -> Prepared:
    """Outputs, and the walk over the rows of the lists."""
    batch, _, heads, head_dim = value.shape
    (mq, nk), device = mask.num_blocks, value.device
    out = torch.empty(batch, seq_q, heads, head_dim, dtype=value.dtype, device=device)
    lse = torch.empty(batch, heads, seq_q, device=device) if want_lse else None
    vote = mass = None
    if vote_threshold is not None:
        vote = torch.zeros(batch, heads, mq, nk, device=device, dtype=torch.bool)
    if want_mass:
        mass = torch.zeros(batch, heads, mq, nk, device=device)
    counts = mask.kv_num_blocks
    if kv_lengths is not None:
        counts = block_lists.visible_counts(
            counts, mask.kv_indices, kv_lengths, mask.block_size[1], batch, heads
        )
    counts, order, draw = block_lists.order(counts, batch, heads)
    lists = mask.kv_indices.contiguous().expand(batch, heads, mq, nk)
    programs = min(multiprocessors(device), len(counts))
    space = torch.empty(programs, 2, nk + 1, 128, device=device) if want_mass else out
    return Prepared(out, lse, vote, mass, counts, lists, order, draw, space)


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
    _, seq_q, heads, head_dim = query.shape
    call = prepare(
        value,
        mask,
        seq_q,
        kv_lengths=kv_lengths,
        vote_threshold=vote_threshold,
        want_lse=want_lse,
        want_mass=want_mass,
    )
    num_rows = len(call.counts)
    if num_rows == 0:
        return call[:4]
    block_n, block_d = mask.block_size[1], 64 if head_dim == 64 else 128
    ring, alias = hopper_ring(block_n, block_d)
    flags = call.flags(lse_prev)
    pointers = [x for x in (call.lists, kv_lengths, lse_prev) if x is not None]
    launch_kernel(
        block_sparse_fwd_sm90,
        (min(multiprocessors(query.device), num_rows),),
        (
            (query.device, query.dtype, block_n, block_d),
            (kv_lengths is None, lse_prev is None, *flags.values()),
            aligned(*pointers),
        ),
        (
            # inputs and output
            tma_descriptor(query, 64, block_d),
            tma_descriptor(key, block_n, block_d),
            tma_descriptor(value, block_n, block_d),
            tma_descriptor(call.out, 64, block_d),
            *call.byproducts(lse_prev),
            # mask
            call.counts,
            call.lists,
            call.counts if kv_lengths is None else kv_lengths,
            call.order,
            call.draw,
            *call.lists.stride()[:2],
            # numbers
            float(scale),
            0.0 if vote_threshold is None else float(vote_threshold),
            heads,
            seq_q,
            key.shape[1],
            *mask.num_blocks,
            num_rows,
        ),
        # what is compiled
        RING=ring,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        ALIAS=alias,
        HAS_LENGTHS=kv_lengths is not None,
        **flags,
        num_warps=4,
        maxnreg=ENTRY_REGISTERS,
    )
    return call[:4]


def tma_descriptor(x: Tensor, rows: int, block_d: int) -> TensorDescriptor:
    """TMA view `[B, H, S, D]` of a `[B, S, H, D]` tensor, in boxes of `rows x block_d`.

    A tensor that TMA cannot read (`head_strides`) is copied.
    """
    form = _form(x.dtype, x.shape, x.stride(), rows, block_d)
    if form is None or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
        form = _form(x.dtype, x.shape, x.stride(), rows, block_d)
    return at(form, x)


# Calls differ in addresses alone.
@lru_cache(maxsize=256)
def _form(
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    strides: tuple[int, int, int, int],
    rows: int,
    block_d: int,
) -> TensorDescriptor | None:
    """The descriptor of such a tensor, but for its address; None if TMA cannot read it."""
    strides = head_strides(dtype.itemsize, shape, strides)
    if strides is None:
        return None
    batch, seq, heads, dim = shape
    layout = gl.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=dtype.itemsize * 8, rank=4
    )
    return TensorDescriptor(
        torch.empty(0, dtype=dtype),
        [batch, heads, seq, dim],
        strides,
        [1, 1, rows, block_d],
        layout,
    )


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many a device has; asking it takes microseconds."""
    return torch.cuda.get_device_properties(device).multi_processor_count
