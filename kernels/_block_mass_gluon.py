"""Launches the Hopper kernel for exact block mass."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsediff.kernels._block_mass_sm90 import COLUMNS, PAIR_ROWS, ROWS, block_mass_sm90
from sparsediff.kernels._block_sparse_gluon import multiprocessors, tma_descriptor
from sparsediff.kernels.tuning import hopper_mass_ring


def block_mass(
    query: Tensor,
    key: Tensor,
    block_size: tuple[int, int],
    *,
    scale: float,
    lse: Tensor | None = None,
    kv_lengths: Tensor | None = None,
) -> Tensor:
    """Same contract as `block_scores.block_mass_reference`, in one pass with or without `lse`."""
    batch, seq_q, heads, head_dim = query.shape
    (bq, bk), seq_k, device = block_size, key.shape[1], query.device
    mq, nk = -(-seq_q // bq), -(-seq_k // bk)
    # Blocks that hold padding alone are not visited.
    make = torch.empty if kv_lengths is None else torch.zeros
    mass = make(batch, heads, mq, nk, device=device)
    if mass.numel() == 0:
        return mass
    row_tiles, tiles = -(-seq_q // ROWS.value), -(-seq_k // COLUMNS.value)
    items = batch * heads * row_tiles
    programs = min(multiprocessors(device), items)
    width = PAIR_ROWS.value if lse is None else PAIR_ROWS.value // 16
    space = torch.empty(programs, 2, tiles * COLUMNS.value // bk + 1, width, device=device)
    block_d = 64 if head_dim == 64 else 128
    block_mass_sm90[(programs,)](
        tma_descriptor(query, 64, block_d),
        tma_descriptor(key, COLUMNS.value, block_d),
        # a pointer that its flag switches off still has to be a tensor
        mass if lse is None else lse.contiguous(),
        mass.view(torch.int32) if kv_lengths is None else kv_lengths,
        space,
        mass,
        scale,
        heads,
        seq_q,
        seq_k,
        mq,
        nk,
        row_tiles,
        items,
        RING=hopper_mass_ring(block_d),
        BLOCK_D=block_d,
        Q_BLOCK=bq,
        KV_BLOCK=bk,
        OWN_LSE=lse is None,
        HAS_LENGTHS=kv_lengths is not None,
        num_warps=4,
        # 5 x 128 threads share 64k registers at the start; the consumers then take 112 each
        maxnreg=96,
    )
    return mass
