"""Joined lists of neighbouring query blocks: what the Hopper kernel for 64-token blocks walks.

Query blocks 2p and 2p + 1 make pair p.  Its walk names every block that either of them lists once: where one row alone
lists a block of which only a part is visible, that block first; then the blocks of both; then those of one row alone, a
row after the other in turns for as long as both have some, the first row first.  Within each group later blocks come
first; what order the lists have does not matter, and neither do results depend on it but for rounding.

A row that lists nothing goes along with the first block of the other one, or with block 0, and sees no key of it.  A
last row without a neighbour has one that lists nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsediff.kernels.launcher import aligned, launch_kernel

FIELD = 17  # bits of a number in `RowNumbers.pack`: as many blocks as 8 million tokens have


class Pairs(NamedTuple):
    """Walks of all pairs; `B` and `H` are the mask's own, which may be 1, and `B` the batch where lengths are given."""

    totals: Tensor  # int32 [B, H, pairs], entries of a walk that count
    rows: Tensor  # int64 [B, H, pairs, 2], packed `RowNumbers`
    walk: Tensor  # int32 [B, H, pairs, Nk], in the order of visits


class RowNumbers(NamedTuple):
    """Where in the walk of its pair a row's own blocks are, and how much of the first one it sees."""

    count: int  # own blocks, 1 at least
    before: int  # own blocks before its private ones
    turns: int  # how many private blocks each row of the pair has while they take turns
    visible: int  # keys before the end in the first block
    start: int  # 1 if the walk begins with a block of the other row alone
    lead: int  # 1 if it begins with one of this row alone
    idle: int  # 1 if the row lists nothing and sees no key of the block it goes along with

    def pack(self) -> int:
        """All of them in one word that is not negative."""
        places = (0, FIELD, 2 * FIELD, *(3 * FIELD + bits for bits in (0, 7, 8, 9)))
        return sum(number << place for number, place in zip(self, places, strict=True))

    def positions(self, row: int) -> list[int]:
        """Places of the own blocks of the pair's row 0 or 1 in the walk."""
        return [
            self.start + i + min(max(i - self.before + row, 0), self.turns)
            for i in range(self.count)
        ]


def pair_rows(
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    seq_k: int,
    *,
    kv_lengths: Tensor | None = None,
    block_n: int = 64,
) -> Pairs:
    """Join neighbouring rows of lists in one launch, without a host synchronisation.

    Args:
        kv_num_blocks: `int32 [B|1, H|1, Mq]`.
        kv_indices: `int32 [B|1, H|1, Mq, Nk]`, each block once, in any order; what stands past the count is not read.
        seq_k: key tokens.
        kv_lengths: `int32 [B]`; blocks past it are left out.
        block_n: key tokens a block.
    """
    from sparsediff.kernels._block_pairs_fwd import pair_rows as kernel

    _, heads, q_blocks, kv_blocks = kv_indices.shape
    batch = len(kv_indices) if kv_lengths is None else len(kv_lengths)
    device = kv_indices.device
    counts = kv_num_blocks.expand(batch, heads, q_blocks)
    if counts.stride(2) != 1:
        counts = counts.contiguous()
    lists = kv_indices.contiguous().expand(batch, heads, q_blocks, kv_blocks)
    pairs = -(-q_blocks // 2)
    lengths = counts if kv_lengths is None else kv_lengths.contiguous()
    made = Pairs(
        torch.empty(batch, heads, pairs, dtype=torch.int32, device=device),
        torch.empty(batch, heads, pairs, 2, dtype=torch.int64, device=device),
        torch.empty(batch, heads, pairs, kv_blocks, dtype=torch.int32, device=device),
    )
    marks = torch.empty(batch, heads, pairs, kv_blocks, dtype=torch.uint8, device=device)
    if made.totals.numel():
        chunk = min(1024, max(16, 1 << (kv_blocks - 1).bit_length()))
        launch_kernel(
            kernel,
            (made.totals.numel(),),
            (device, chunk, block_n, kv_lengths is None, aligned(counts, lists, lengths)),
            (
                counts,
                lists,
                lengths,
                marks,
                *made,
                *counts.stride()[:2],
                *lists.stride()[:2],
                heads,
                q_blocks,
                pairs,
                kv_blocks,
                seq_k,
            ),
            HAS_LENGTHS=kv_lengths is not None,
            BLOCK_N=block_n,
            FIELD=FIELD,
            CHUNK=chunk,
            num_warps=max(1, chunk // 256),
        )
    return made


def pair_rows_reference(
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    seq_k: int,
    *,
    kv_lengths: Tensor | None = None,
    block_n: int = 64,
) -> Pairs:
    """`pair_rows` pair by pair with sets; entries of `walk` past the total are -1."""
    batch = len(kv_indices) if kv_lengths is None else len(kv_lengths)
    _, heads, q_blocks, kv_blocks = kv_indices.shape
    lengths = [seq_k] * batch if kv_lengths is None else kv_lengths.clamp(max=seq_k).tolist()
    counts = kv_num_blocks.expand(batch, heads, q_blocks).tolist()
    lists = kv_indices.expand(batch, heads, q_blocks, kv_blocks).tolist()
    totals, rows, walks = [], [], []
    for i_b, length in enumerate(lengths):
        visible = set(range(-(-length // block_n)))
        for i_h in range(heads):
            listed = [
                set(row[:count]) & visible
                for row, count in zip(lists[i_b][i_h], counts[i_b][i_h], strict=True)
            ]
            listed += [set()] * (q_blocks % 2)
            for first, second in zip(listed[::2], listed[1::2], strict=True):
                walk, numbers = _join((first, second), length, block_n)
                totals.append(len(walk))
                rows.append([row.pack() for row in numbers])
                walks.append(walk + [-1] * (kv_blocks - len(walk)))
    shape = (batch, heads, -(-q_blocks // 2))
    device = kv_indices.device
    return Pairs(
        torch.tensor(totals, dtype=torch.int32, device=device).view(shape),
        torch.tensor(rows, dtype=torch.int64, device=device).view(*shape, 2),
        torch.tensor(walks, dtype=torch.int32, device=device).view(*shape, kv_blocks),
    )


def _join(
    listed: tuple[set[int], set[int]], length: int, block_n: int
) -> tuple[list[int], list[RowNumbers]]:
    """Walk and numbers of one pair."""
    union = listed[0] | listed[1]
    edge = length // block_n
    if length % block_n == 0 or edge not in union:
        edge = None
    first = max(union, default=0)
    own = [row or {first} for row in listed]
    both = own[0] & own[1]
    lead = [(row - both) & {edge} for row in own]
    private = [sorted(own[r] - both - lead[r], reverse=True) for r in range(2)]
    turns = min(len(x) for x in private)
    walk = [*lead[0], *lead[1], *sorted(both, reverse=True)]
    for pair in zip(*private, strict=False):
        walk += pair
    walk += private[0][turns:] + private[1][turns:]
    numbers = [
        RowNumbers(
            count=len(own[r]),
            before=len(both) + len(lead[r]),
            turns=turns,
            visible=length % block_n if edge in own[r] else block_n,
            start=len(lead[1 - r]),
            lead=len(lead[r]),
            idle=int(not listed[r]),
        )
        for r in range(2)
    ]
    return walk, numbers
