"""Block-sparse attention on a CPU, in plain torch, faster than dense attention below `CPU_BREAK_EVEN`.

Rows (one batch entry, head and query block) are sorted by how many blocks they read and processed in chunks of
similar counts: little padding, bounded memory, and every chunk is two batched matrix products around a softmax.
Low-precision inputs are computed in float32: most CPUs have no faster arithmetic, and none is more exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsediff.block_mask import BlockMask

LOG2E = 1.4426950408889634

# Elements of one chunk's score matrix: 2 MB stay in the cache between the two products.
_CHUNK_SCORES = 1 << 19
# Rows in one chunk may have this share fewer blocks than its longest row.
_PADDING = 0.125


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
    """Same contract as `_block_sparse_reference.attend`, for CPU tensors."""
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, seq_q, heads, head_dim = query.shape
    seq_k = key.shape[1]
    (bq, bk), (mq, nk) = mask.block_size, mask.num_blocks
    num_rows = batch * heads * mq

    q = _blocked(query, bq, compute).mul_(scale)  # [B * H * Mq, bq, D]
    if kv_lengths is not None:
        # 0 * NaN is NaN: what is not attended must not leak.
        hidden = torch.arange(seq_k) >= kv_lengths[:, None]
        value = value.masked_fill(hidden[:, :, None, None], 0)
    k, v = (_blocked(x, bk, compute).flatten(1) for x in (key, value))  # [B * H * Nk, bk * D]

    lists, list_row = _row_lists(mask, batch, heads)
    counts, tokens = _row_extents(mask, kv_lengths, batch, heads)
    order = counts.argsort(descending=True, stable=True)
    sorted_counts = counts[order].tolist()

    out = torch.zeros(num_rows, bq, head_dim, dtype=compute)
    lse = torch.full((num_rows, bq), -math.inf, dtype=compute) if want_lse or want_mass else None
    # One column more than there are blocks: padding is written there and dropped.
    vote = torch.zeros(num_rows, nk + 1, dtype=torch.bool) if vote_threshold is not None else None
    mass = torch.zeros(num_rows, nk + 1, dtype=torch.float32) if want_mass else None
    previous = None if lse_prev is None else _blocked(lse_prev.mT[..., None], bq, compute)[..., 0]

    chunks = _chunks(sorted_counts, bq * bk)
    work = _Workspace(chunks, sorted_counts, bq, bk, head_dim, compute)
    for start, stop in chunks:
        rows, width = order[start:stop], sorted_counts[start]
        valid, slots = tokens[rows], torch.arange(width) < counts[rows, None]
        blocks = lists[list_row[rows], :width].long()
        last = blocks.gather(1, counts[rows, None] - 1)
        blocks = torch.where(slots, blocks, last)  # entries past the count are arbitrary
        flat = (blocks + (rows // mq * nk)[:, None]).flatten()

        b_k = torch.index_select(k, 0, flat, out=work.key(len(flat))).view(
            len(rows), width * bk, head_dim
        )
        b_v = torch.index_select(v, 0, flat, out=work.value(len(flat))).view(
            len(rows), width * bk, head_dim
        )
        b_q = torch.index_select(q, 0, rows, out=work.query(len(rows)))
        scores = torch.bmm(b_q, b_k.mT, out=work.scores(len(rows), width))  # [rows, bq, width * bk]
        # A ragged block stands last in its list, so what a row may see is a prefix of its gathered keys.
        if (low := int(valid.min())) < width * bk:
            beyond = torch.arange(low, width * bk) >= valid[:, None]
            scores[:, :, low:].masked_fill_(beyond[:, None], -math.inf)
        probabilities = torch.softmax(scores, -1, out=work.probabilities(len(rows), width))
        out.index_copy_(0, rows, torch.bmm(probabilities, b_v, out=work.output(len(rows))))

        if vote is None and lse is None:
            continue
        target = torch.where(slots, blocks, nk)
        real = (rows % mq * bq)[:, None] + torch.arange(bq) < seq_q  # [rows, bq]
        if lse is not None:
            # At a row's best key the softmax is 1 / sum(exp(score - best)).
            row_lse = scores.amax(-1) - probabilities.amax(-1).log()
            lse.index_copy_(0, rows, row_lse)
        if vote is not None:
            vote[rows[:, None], target] = _vote(scores, real, width, vote_threshold)
        if mass is not None:
            weights = probabilities.unflatten(-1, (width, bk)).sum(-1)  # [rows, bq, width]
            if previous is not None:
                norm = previous[rows]
                norm = norm.masked_fill(norm == -math.inf, math.inf)
                weights *= (row_lse - norm).exp()[..., None]
            weights = weights.masked_fill(~real[..., None], 0)
            mass[rows[:, None], target] = weights.sum(1).float()

    shape = batch, heads, mq * bq
    return (
        out.view(*shape, head_dim)[:, :, :seq_q].transpose(1, 2).to(query.dtype).contiguous(),
        lse.view(shape)[..., :seq_q].contiguous() if want_lse else None,
        None if vote is None else vote[:, :nk].contiguous().view(batch, heads, mq, nk),
        None if mass is None else mass[:, :nk].contiguous().view(batch, heads, mq, nk),
    )


class _Workspace:
    """Buffers for the largest chunk, allocated once: fresh pages for every chunk cost as much as the products."""

    def __init__(
        self,
        chunks: list[tuple[int, int]],
        sorted_counts: list[int],
        bq: int,
        bk: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        self.bq, self.bk, self.head_dim = bq, bk, head_dim
        rows = max((stop - start for start, stop in chunks), default=0)
        blocks = max(((stop - start) * sorted_counts[start] for start, stop in chunks), default=0)
        self._query, self._output = (
            torch.empty(rows * bq * head_dim, dtype=dtype) for _ in range(2)
        )
        self._key, self._value = (
            torch.empty(blocks * bk * head_dim, dtype=dtype) for _ in range(2)
        )
        self._scores, self._probabilities = (
            torch.empty(blocks * bq * bk, dtype=dtype) for _ in range(2)
        )

    def query(self, rows: int) -> Tensor:
        return _leading(self._query, rows, self.bq, self.head_dim)

    def output(self, rows: int) -> Tensor:
        return _leading(self._output, rows, self.bq, self.head_dim)

    def key(self, blocks: int) -> Tensor:
        return _leading(self._key, blocks, self.bk * self.head_dim)

    def value(self, blocks: int) -> Tensor:
        return _leading(self._value, blocks, self.bk * self.head_dim)

    def scores(self, rows: int, width: int) -> Tensor:
        return _leading(self._scores, rows, self.bq, width * self.bk)

    def probabilities(self, rows: int, width: int) -> Tensor:
        return _leading(self._probabilities, rows, self.bq, width * self.bk)


def _leading(flat: Tensor, *shape: int) -> Tensor:
    """A contiguous view of the first elements of a flat buffer."""
    return flat[: math.prod(shape)].view(shape)


def _blocked(x: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """`[B, S, H, D]` to contiguous `[B * H * blocks, block, D]`, the ragged end filled with zeros."""
    batch, seq, heads, dim = x.shape
    num = -(-seq // block)
    out = torch.empty(batch, heads, num * block, dim, dtype=dtype)
    out[:, :, :seq] = x.transpose(1, 2)
    out[:, :, seq:] = 0
    return out.view(-1, block, dim)


def _row_lists(mask: BlockMask, batch: int, heads: int) -> tuple[Tensor, Tensor]:
    """The mask's lists as `[lists, Nk]` and, for each of the `B * H * Mq` rows, which list is its own."""
    b, h, mq, _ = mask.kv_indices.shape
    own = torch.arange(b * h * mq).view(b, h, mq).expand(batch, heads, mq)
    return mask.kv_indices.reshape(b * h * mq, -1), own.reshape(-1)


def _row_extents(
    mask: BlockMask, kv_lengths: Tensor | None, batch: int, heads: int
) -> tuple[Tensor, Tensor]:
    """Blocks each row visits and the tokens in them that exist: two `int64 [B * H * Mq]`."""
    bk, seq_k = mask.block_size[1], mask.seq_lengths[1]
    counts, lists = mask.kv_num_blocks.long(), mask.kv_indices.long()
    lengths = torch.tensor([seq_k]) if kv_lengths is None else kv_lengths.long().clamp(0, seq_k)
    lengths = lengths[:, None, None]
    if kv_lengths is not None:
        listed = torch.arange(lists.shape[-1]) < counts[..., None]
        counts = (listed & (lists * bk < lengths[..., None])).sum(-1)
    final = (counts - 1).clamp(min=0)[..., None]
    last = lists.expand(*counts.shape, -1).gather(-1, final)[..., 0]
    tokens = counts * bk - ((last + 1) * bk - lengths).clamp(min=0)
    shape = batch, heads, counts.shape[2]
    return counts.expand(shape).reshape(-1), tokens.expand(shape).reshape(-1)


def _chunks(sorted_counts: list[int], block_area: int) -> list[tuple[int, int]]:
    """Cut rows, sorted by descending count, into ranges of similar counts; rows without blocks are left out."""
    chunks, start, end = [], 0, len(sorted_counts)
    while start < end and sorted_counts[start]:
        width = sorted_counts[start]
        most = start + max(1, _CHUNK_SCORES // (width * block_area))
        stop = start + 1
        while stop < min(most, end) and sorted_counts[stop] >= max(1, width * (1 - _PADDING)):
            stop += 1
        chunks.append((start, stop))
        start = stop
    return chunks


def _vote(scores: Tensor, real: Tensor, width: int, threshold: float) -> Tensor:
    """LiteAttention's running-max vote: `bool [rows, width]`; see `_block_sparse_reference._vote`."""
    local = scores.unflatten(-1, (width, -1)).amax(-1)  # [rows, bq, width]
    visited = local.flip(-1).cummax(-1).values.flip(-1)  # running maximum after visiting each block
    before = torch.nn.functional.pad(visited[..., 1:], (0, 1), value=-math.inf)
    worth = (local - before) * LOG2E > threshold
    return (worth & real[..., None]).any(1)
