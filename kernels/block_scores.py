"""One number per (query block, key block): what methods choose blocks by.

Pooled scores are DraftAttention's (arXiv 2505.14708); the exact softmax mass of a block, with or without a cached
log-sum-exp, is AdaSpa's (arXiv 2502.21079) and SparseD's (arXiv 2509.24014).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsediff.block_mask import BlockMask
from sparsediff.kernels.attention import _why_not_triton


def block_means(x: Tensor, block: int) -> Tensor:
    """Mean token of every block: `[B, S, H, D]` to `float32 [B, H, ceil(S / block), D]`; a ragged end is a true mean."""
    _check_bshd(x=x)
    return block_means_triton(x, block) if x.is_cuda else block_means_reference(x, block)


def block_means_reference(x: Tensor, block: int) -> Tensor:
    """`block_means` in plain torch."""
    batch, seq, heads, dim = x.shape
    full, rest = divmod(seq, block)
    means = (
        x[:, : full * block].reshape(batch, full, block, heads, dim).sum(2, dtype=torch.float32)
        / block
    )
    if rest:
        tail = x[:, full * block :].sum(1, keepdim=True, dtype=torch.float32) / rest
        means = torch.cat([means, tail], 1)
    return means.transpose(1, 2).contiguous()


def block_means_triton(x: Tensor, block: int) -> Tensor:
    """`block_means` in one pass over `x`, without a copy."""
    from sparsediff.kernels._block_lists_fwd import mean_blocks

    batch, seq, heads, dim = x.shape
    num = -(-seq // block)
    x = x if x.stride(-1) == 1 else x.contiguous()
    means = torch.empty(batch, heads, num, dim, device=x.device, dtype=torch.float32)
    if means.numel():
        chunk = min(64, 1 << (block - 1).bit_length())
        mean_blocks[(num, batch * heads)](
            x,
            means,
            *x.stride()[:3],
            heads,
            seq,
            num,
            BLOCK=block,
            HEAD_DIM=dim,
            BLOCK_D=1 << (dim - 1).bit_length(),
            CHUNK=chunk,
            num_warps=4,
        )
    return means


def pooled_scores(
    query: Tensor,
    key: Tensor,
    block_size: tuple[int, int],
    scale: float | None = None,
    *,
    kv_lengths: Tensor | None = None,
) -> Tensor:
    """Logits of pooled queries and keys, `float32 [B, H, Mq, Nk]`.

    Args:
        query: `[B, Sq, H, D]`.
        key: `[B, Sk, H, D]`.
        block_size: `(query, key)` tokens a block.
        scale: of the logits; `1 / sqrt(D)` unless given.
        kv_lengths: `int32 [B]`; tokens at or past it, of both sides, are left out of the means.  A key block without any
            other has the logit -inf.
    """
    _check_bshd(query=query, key=key)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if kv_lengths is None:
        return block_means(query, block_size[0]).mul_(scale) @ block_means(key, block_size[1]).mT
    rows, _ = _valid_means(query, block_size[0], kv_lengths)
    columns, seen = _valid_means(key, block_size[1], kv_lengths)
    logits = rows.mul_(scale) @ columns.mT
    return logits.masked_fill_((seen == 0)[:, None, None], -torch.inf)


def _valid_means(x: Tensor, block: int, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """`block_means` over the tokens before `lengths`, and how many of each block these are, `[B, blocks]`."""
    seq = x.shape[1]
    starts = torch.arange(0, seq, block, device=x.device)
    sizes = (seq - starts).clamp(max=block)
    seen = (lengths[:, None] - starts).clamp(min=0).minimum(sizes)
    hidden = torch.arange(seq, device=x.device) >= lengths[:, None]
    means = block_means(x.masked_fill(hidden[..., None, None], 0), block)
    return means * (sizes / seen.clamp(min=1))[:, None, :, None], seen


def block_mass(
    query: Tensor,
    key: Tensor,
    block_size: tuple[int, int],
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    chunk_bytes: int = 256 << 20,
) -> Tensor:
    """Exact softmax mass of every block, summed over its query rows: `float32 [B, H, Mq, Nk]`.

    Args:
        query: `[B, Sq, H, D]`.
        key: `[B, Sk, H, D]`.
        block_size: `(query, key)` tokens a block.
        scale: of the logits; `1 / sqrt(D)` unless given.
        lse: `float32 [B, H, Sq]` from an earlier dense pass; saves finding it again.  Rows where it is -inf
            contribute nothing.
        kv_lengths: `int32 [B]`; keys at or past it have no mass.
        chunk_bytes: temporaries stay under this (one query block against all keys of one head is the least); the
            portable CUDA kernel needs none, the Hopper kernel 1 to 2 MB for every 1000 keys without `lse`.

    Returns:
        A row of blocks sums to the number of its query rows (with this call's own `lse`).
    """
    _check_bshd(query=query, key=key)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    call = (query.device, query.dtype, query.shape[-1], tuple(block_size))
    if query.is_cuda and not _why_not_triton(*call):
        run = block_mass_triton if _why_not_gluon(*call) else block_mass_gluon
        return run(query, key, block_size, scale=scale, lse=lse, kv_lengths=kv_lengths)
    return block_mass_reference(
        query,
        key,
        block_size,
        scale=scale,
        lse=lse,
        kv_lengths=kv_lengths,
        chunk_bytes=chunk_bytes,
    )


def _why_not_gluon(
    device: torch.device, dtype: torch.dtype, head_dim: int, block_size: tuple[int, int]
) -> str:
    """One line on what keeps the Hopper kernel from serving such a call, or ""."""
    from sparsediff.kernels.tuning import why_not_hopper_mass

    capability = torch.cuda.get_device_capability(device)
    return why_not_hopper_mass(capability, dtype.itemsize * 8, head_dim, block_size)


def block_mass_gluon(
    query: Tensor,
    key: Tensor,
    block_size: tuple[int, int],
    *,
    scale: float,
    lse: Tensor | None = None,
    kv_lengths: Tensor | None = None,
) -> Tensor:
    """`block_mass` on Hopper, in one pass whether there is an `lse` or not."""
    from sparsediff.kernels import _block_mass_gluon

    return _block_mass_gluon.block_mass(
        query, key, block_size, scale=scale, lse=lse, kv_lengths=kv_lengths
    )


def block_mass_triton(
    query: Tensor,
    key: Tensor,
    block_size: tuple[int, int],
    *,
    scale: float,
    lse: Tensor | None = None,
    kv_lengths: Tensor | None = None,
) -> Tensor:
    """`block_mass` by the attention kernel without its values: one pass, and one before it to find `lse`."""
    from sparsediff.kernels._block_sparse_triton import launch, pick_tile

    batch, seq_q, heads, _ = query.shape
    mask = BlockMask.full(block_size, (seq_q, key.shape[1]), device=query.device)
    tile = pick_tile(query, mask)
    if lse is None:
        lse = torch.empty(batch, heads, seq_q, device=query.device)
        launch(query, key, None, mask, scale=scale, tile=tile, lse=lse, kv_lengths=kv_lengths)
    planes = block_size[0] // tile.block_m
    mass = torch.zeros(planes, batch, heads, *mask.num_blocks, device=query.device)
    launch(
        query,
        key,
        None,
        mask,
        scale=scale,
        tile=tile,
        mass=mass,
        lse_prev=lse,
        kv_lengths=kv_lengths,
    )
    return mass[0] if planes == 1 else mass.sum(0)


def block_mass_reference(
    query: Tensor,
    key: Tensor,
    block_size: tuple[int, int],
    *,
    scale: float,
    lse: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    chunk_bytes: int = 256 << 20,
) -> Tensor:
    """`block_mass` in plain torch, a chunk of query blocks of one head at a time."""
    batch, seq_q, heads, dim = query.shape
    seq_k = key.shape[1]
    bq, bk = block_size
    mq, nk = -(-seq_q // bq), -(-seq_k // bk)
    mass = torch.empty(batch, heads, mq, nk, device=query.device, dtype=torch.float32)
    # Scores, their exponentials and one head's keys in float32.
    rows_bytes = 2 * bq * nk * bk * 4
    step = max(1, (chunk_bytes - seq_k * dim * 4) // rows_bytes)
    places = torch.arange(seq_k, device=query.device)
    for b in range(batch):
        for h in range(heads):
            k = key[b, :, h].float().mT
            for start in range(0, mq, step):
                rows = slice(start * bq, (start + step) * bq)
                scores = query[b, rows, h].float().mul(scale) @ k
                if kv_lengths is not None:
                    scores.masked_fill_(places >= kv_lengths[b], -torch.inf)
                shift = scores.amax(-1) if lse is None else lse[b, h, rows]
                shift = shift.masked_fill(shift == -torch.inf, torch.inf)
                sums = _sum_runs(scores.sub_(shift[:, None]).exp_(), bk)
                if lse is None:
                    # Dividing few sums, not many scores, saves a second pass over them.
                    sums /= sums.sum(-1, keepdim=True).clamp_(min=torch.finfo().tiny)
                mass[b, h, start : start + step] = _sum_runs(sums.mT, bq).mT
    return mass


def _sum_runs(x: Tensor, run: int) -> Tensor:
    """Sums over runs of the last dimension; the last run may be short."""
    full = x.shape[-1] // run * run
    sums = x[..., :full].unflatten(-1, (-1, run)).sum(-1)
    return (
        sums if full == x.shape[-1] else torch.cat([sums, x[..., full:].sum(-1, keepdim=True)], -1)
    )


def _check_bshd(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B, S, H, D], got {list(x.shape)}")
