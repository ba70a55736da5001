"""Block lists, the form of a mask that kernels walk, out of the forms that methods compute with.

Every function returns `(kv_num_blocks, kv_indices)`, the fields of a `BlockMask`: `int32 [B, H, Mq]` and ascending
`int32 [B, H, Mq, Nk]` whose entries past the count are arbitrary.  On CUDA each is one Triton launch without a host
synchronisation; elsewhere plain torch does the same and defines what is right.

Kernels walk a list from its end, so an ascending list is visited from the last block to the first.  Nothing but
LiteAttention's vote depends on that order, and for its sake two functions make lists in the others of `Visits`.
Kernels mask the keys past the end of the sequence in the block they visit first: a ragged last block is that one
whatever the order.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from sparsediff.kernels.launcher import aligned, launch_kernel

# From the last key block to the first; from the first to the last; from the one beside the queries outwards.
Visits = Literal["descending", "ascending", "centre-out"]


def lists_from_dense(
    keep: Tensor, visits: Visits = "descending", *, ragged: bool = False
) -> tuple[Tensor, Tensor]:
    """From `keep`, `bool [B, H, Mq, Nk]`.

    Args:
        keep: which blocks are listed.
        visits: the order in which kernels are to visit them.
        ragged: whether the last key block is short; matters only where `visits` is not descending.
    """
    _check_visits(visits)
    if keep.dtype != torch.bool or keep.ndim != 4:
        raise TypeError(f"keep must be bool [B, H, Mq, Nk], got {keep.dtype} {list(keep.shape)}")
    if keep.is_cuda:
        return compact(
            keep.view(torch.uint8), keep.shape[-1], packed=False, visits=visits, ragged=ragged
        )
    return dense_reference(keep, visits, ragged=ragged)


def lists_from_bitmap(
    bitmap: Tensor, num_blocks: int, visits: Visits = "descending", *, ragged: bool = False
) -> tuple[Tensor, Tensor]:
    """From a bitmap of `num_blocks` columns, `uint8 [B, H, Mq, ceil(Nk / 8)]`, as `BlockMask.to_bitmap` packs it.

    `visits` and `ragged` are those of `lists_from_dense`.
    """
    _check_visits(visits)
    if bitmap.dtype != torch.uint8 or bitmap.ndim != 4 or bitmap.shape[-1] != -(-num_blocks // 8):
        raise TypeError(
            f"bitmap must be uint8 [B, H, Mq, {-(-num_blocks // 8)}] for {num_blocks} blocks, "
            f"got {bitmap.dtype} {list(bitmap.shape)}"
        )
    if bitmap.is_cuda:
        return compact(bitmap, num_blocks, packed=True, visits=visits, ragged=ragged)
    shifts = torch.arange(8, dtype=torch.uint8)
    keep = ((bitmap[..., None] >> shifts) & 1).flatten(-2)[..., :num_blocks].bool()
    return dense_reference(keep, visits, ragged=ragged)


def lists_from_top_k(
    scores: Tensor, k: int | Tensor, forced: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The `k` best columns of every row of `scores`, `float32 [B, H, Mq, Nk]`, and all that are `forced`.

    Args:
        scores: higher is better; among equals the lower column wins.  NaN is not allowed.
        k: columns a row: one number, or `int32 [B, H]` for a budget a head.
        forced: `bool`, broadcastable to the scores; kept beside the `k` best.
    """
    if scores.dtype != torch.float32 or scores.ndim != 4:
        raise TypeError(
            f"scores must be float32 [B, H, Mq, Nk], got {scores.dtype} {list(scores.shape)}"
        )
    batch, heads = scores.shape[:2]
    if isinstance(k, int):
        k = torch.full((batch, heads), k, dtype=torch.int32, device=scores.device)
    if k.dtype != torch.int32 or list(k.shape) != [batch, heads]:
        raise TypeError(
            f"k must be a number or int32 {[batch, heads]}, got {k.dtype} {list(k.shape)}"
        )
    return select(scores, k, forced) if scores.is_cuda else top_k_reference(scores, k, forced)


# -- references -----------------------------------------------------------------------------------------------------


def dense_reference(
    keep: Tensor, visits: Visits = "descending", *, ragged: bool = False
) -> tuple[Tensor, Tensor]:
    """`lists_from_dense` by a stable sort, which puts kept columns first and leaves them in order."""
    counts = keep.sum(-1, dtype=torch.int32)
    if visits == "descending":
        indices = keep.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
        return counts, indices.to(torch.int32)
    columns = list_columns(*keep.shape[2:], visits, ragged=ragged, device=keep.device)
    columns = columns.expand(keep.shape)
    places = keep.gather(-1, columns).logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
    return counts, columns.gather(-1, places).to(torch.int32)


def list_columns(
    rows: int,
    columns: int,
    visits: Visits,
    *,
    ragged: bool,
    device: torch.device | str | None = None,
) -> Tensor:
    """All columns of every row in the order of a list, `int64 [Mq, Nk]`: the one to be visited first stands last.

    Outwards from the centre, a later column comes before the earlier one that is as far away; the centre of a row is
    the column at its own share of the sequence.
    """
    column = torch.arange(columns, device=device)
    distance = column.expand(rows, -1)
    if visits == "descending":
        distance = -distance
    elif visits == "centre-out":
        row = torch.arange(rows, device=device)[:, None]
        centre = (2 * row + 1) * columns // (2 * rows)
        centre = centre.clamp(max=columns - 1 - ragged)
        distance = 2 * (column - centre).abs() + (column < centre)
    if ragged:
        distance = distance.masked_fill(column == columns - 1, -columns)
    return distance.argsort(dim=-1, descending=True)


def top_k_reference(scores: Tensor, k: Tensor, forced: Tensor | None) -> tuple[Tensor, Tensor]:
    """`lists_from_top_k` by a stable sort of scores."""
    best = scores.argsort(dim=-1, descending=True, stable=True)
    chosen = (torch.arange(scores.shape[-1], device=scores.device) < k[..., None, None]).expand_as(
        scores
    )
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, chosen)
    return dense_reference(keep if forced is None else keep | forced)


# -- launchers ------------------------------------------------------------------------------------------------------


def compact(
    keep: Tensor,
    num_columns: int,
    *,
    packed: bool,
    visits: Visits = "descending",
    ragged: bool = False,
) -> tuple[Tensor, Tensor]:
    """Launch `compact_rows` over `uint8 [B, H, Mq, ...]`."""
    from sparsediff.kernels._block_lists_fwd import compact_rows

    keep = keep.contiguous()
    counts = torch.empty(keep.shape[:3], dtype=torch.int32, device=keep.device)
    indices = torch.empty(*keep.shape[:3], num_columns, dtype=torch.int32, device=keep.device)
    if counts.numel():
        chunk = min(1024, max(16, _power_of_2(num_columns)))
        launch_kernel(
            compact_rows,
            (counts.numel(),),
            (keep.device, packed, chunk, visits, ragged, aligned(keep)),
            (keep, counts, indices, keep.shape[2], num_columns),
            PACKED=packed,
            CHUNK=chunk,
            VISITS=visits,
            RAGGED=ragged,
            num_warps=max(1, chunk // 256),
        )
    return counts, indices


def select(scores: Tensor, k: Tensor, forced: Tensor | None) -> tuple[Tensor, Tensor]:
    """Launch `select_top_k`."""
    from sparsediff.kernels._block_lists_fwd import select_top_k

    scores = scores.contiguous()
    *rows, columns = scores.shape
    counts = torch.empty(rows, dtype=torch.int32, device=scores.device)
    indices = torch.empty(*rows, columns, dtype=torch.int32, device=scores.device)
    if forced is not None:
        forced = forced.expand(scores.shape).contiguous().view(torch.uint8)
    if counts.numel():
        width = max(16, _power_of_2(columns))
        select_top_k[(counts.numel(),)](
            scores,
            k.contiguous(),
            k if forced is None else forced,
            counts,
            indices,
            columns,
            rows[2],
            HAS_FORCED=forced is not None,
            COLUMNS=width,
            num_warps=1 if width <= 1024 else 4,
        )
    return counts, indices


def visible_counts(
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    kv_lengths: Tensor,
    kv_block: int,
    batch: int,
    heads: int,
) -> Tensor:
    """Listed blocks that begin before each batch row's key length, `int32 [B, H, Mq]`; `kv_lengths` is `int32 [B]`."""
    from sparsediff.kernels._block_lists_fwd import count_visible

    q_blocks, kv_blocks = kv_indices.shape[2:]
    counts = kv_num_blocks.expand(batch, heads, q_blocks)
    if counts.stride(2) != 1:
        counts = counts.contiguous()
    lists = kv_indices.contiguous().expand(batch, heads, q_blocks, kv_blocks)
    visible = torch.empty(batch, heads, q_blocks, dtype=torch.int32, device=counts.device)
    if visible.numel():
        kv_lengths = kv_lengths.contiguous()
        launch_kernel(
            count_visible,
            (batch * heads, -(-q_blocks // 128)),
            (counts.device, aligned(counts, lists, kv_lengths)),
            (
                counts,
                lists,
                kv_lengths,
                visible,
                *counts.stride()[:2],
                *lists.stride()[:2],
                heads,
                q_blocks,
                kv_blocks,
                kv_blocks.bit_length(),
                kv_block,
            ),
            ROWS=128,
            num_warps=4,
        )
    return visible


def visible_counts_reference(
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    kv_lengths: Tensor,
    kv_block: int,
    batch: int,
    heads: int,
) -> Tensor:
    """`visible_counts` by looking at every entry."""
    listed = torch.arange(kv_indices.shape[-1], device=kv_indices.device) < kv_num_blocks[..., None]
    starts = kv_indices.long() * kv_block
    inside = listed & (starts < kv_lengths[:, None, None, None])
    return inside.sum(-1, dtype=torch.int32).expand(batch, heads, -1).contiguous()


def order(kv_num_blocks: Tensor, batch: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Heaviest rows first within each head, heads in order: `(counts, order, draw)`.

    Heads stay together for the cache's sake; inside one, heavy rows first leave a persistent grid little to wait for
    at the end.

    Returns:
        `int32 [B * H * Mq]` twice, and the grid's counter of rows handed out, `int32 [1]`, at 0.
    """
    from sparsediff.kernels._block_lists_fwd import order_rows

    q_blocks = kv_num_blocks.shape[2]
    counts = kv_num_blocks.expand(batch, heads, q_blocks)
    if counts.stride(2) != 1:
        counts = counts.contiguous()
    flat, places = (
        torch.empty(batch * heads * q_blocks, dtype=torch.int32, device=counts.device)
        for _ in range(2)
    )
    draw = torch.empty(1, dtype=torch.int32, device=counts.device)
    if flat.numel():
        launch_kernel(
            order_rows,
            (batch * heads, -(-q_blocks // 32)),
            (counts.device, aligned(counts)),
            (counts, flat, places, draw, *counts.stride()[:2], heads, q_blocks),
            ROWS=32,
            OTHERS=128,
            num_warps=4,
        )
    return flat, places, draw


def order_reference(kv_num_blocks: Tensor, batch: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """`order` by a stable sort."""
    q_blocks = kv_num_blocks.shape[2]
    counts = kv_num_blocks.expand(batch, heads, q_blocks).reshape(batch * heads, q_blocks)
    first = torch.arange(batch * heads, device=counts.device)[:, None] * q_blocks
    places = counts.argsort(dim=1, descending=True, stable=True) + first
    draw = torch.zeros(1, dtype=torch.int32, device=counts.device)
    return counts.reshape(-1), places.reshape(-1).to(torch.int32), draw


def _check_visits(visits: str) -> None:
    if visits not in get_args(Visits):
        raise ValueError(f"visits must be one of {', '.join(get_args(Visits))}, got {visits!r}")


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
