"""Which KV blocks each query block reads.

The field names are FlexAttention's, so readers already know them.  A mask exists in three interchangeable forms:
index lists (this class: what kernels walk), a dense boolean (what methods compute with) and a packed bitmap (what is
kept between denoising steps: 32 times smaller than the lists).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsediff.kernels.block_lists import Visits, lists_from_bitmap, lists_from_dense
from sparsediff.token_grid import TokenGrid

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Index lists of the KV blocks that each query block attends.

    Attributes:
        kv_num_blocks: `int32 [B|1, H|1, Mq]`, how many entries of each row of `kv_indices` count.
        kv_indices: `int32 [B|1, H|1, Mq, Nk]`, block numbers, ascending or as `visits` says; entries past the count are
            never read.
        block_size: `(query, key/value)` tokens a block.
        seq_lengths: `(query, key/value)` tokens; the last block of either side may be ragged.
        visits: the order in which kernels visit the blocks of a row, from the end of its list to the start.  A ragged
            last block comes first in all of them.  Results differ in the vote alone.

    A row without blocks attends to nothing: its output is zero and its log-sum-exp -inf.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    block_size: tuple[int, int]
    seq_lengths: tuple[int, int]
    visits: Visits = "descending"

    def __post_init__(self) -> None:
        for name, sizes in {"block_size": self.block_size, "seq_lengths": self.seq_lengths}.items():
            if len(sizes) != 2 or min(sizes) < 1:
                raise ValueError(f"{name} must be two sizes >= 1, got {sizes}")
        for name, x in {"kv_num_blocks": self.kv_num_blocks, "kv_indices": self.kv_indices}.items():
            if x.dtype != torch.int32:
                raise TypeError(f"{name} must be int32, got {x.dtype}")
        want = (*self.kv_num_blocks.shape, self.num_blocks[1])
        if self.kv_num_blocks.ndim != 3 or tuple(self.kv_indices.shape) != want:
            raise ValueError(
                f"expected kv_num_blocks [B, H, Mq] and kv_indices [B, H, Mq, Nk={self.num_blocks[1]}], got "
                f"{list(self.kv_num_blocks.shape)} and {list(self.kv_indices.shape)}"
            )
        if self.kv_num_blocks.shape[2] != self.num_blocks[0]:
            raise ValueError(
                f"{self.seq_lengths[0]} queries in blocks of {self.block_size[0]} make {self.num_blocks[0]} rows, "
                f"got {self.kv_num_blocks.shape[2]}"
            )

    # -- construction ---------------------------------------------------------------------------------------------

    @classmethod
    def from_dense(
        cls,
        keep: Tensor,
        block_size: tuple[int, int],
        seq_lengths: tuple[int, int],
        *,
        visits: Visits = "descending",
    ) -> BlockMask:
        """Compress `keep` (`bool [B|1, H|1, Mq, Nk]`).  No host synchronisation."""
        if keep.ndim != 4 or keep.dtype != torch.bool:
            raise TypeError(
                f"keep must be bool [B, H, Mq, Nk], got {keep.dtype} {list(keep.shape)}"
            )
        blocks = _num_blocks(seq_lengths, block_size)
        if tuple(keep.shape[2:]) != blocks:
            raise ValueError(
                f"sequences {seq_lengths} in blocks {block_size} need a {blocks} map, got {list(keep.shape[2:])}"
            )
        lists = lists_from_dense(keep, visits, ragged=seq_lengths[1] % block_size[1] != 0)
        return cls(*lists, tuple(block_size), tuple(seq_lengths), visits)

    @classmethod
    def full(
        cls,
        block_size: tuple[int, int],
        seq_lengths: tuple[int, int],
        *,
        batch: int = 1,
        heads: int = 1,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """Every block kept: dense attention."""
        shape = (batch, heads, *_num_blocks(seq_lengths, block_size))
        keep = torch.ones(shape, dtype=torch.bool, device=device)
        return cls.from_dense(keep, block_size, seq_lengths)

    @classmethod
    def from_bitmap(
        cls,
        bitmap: Tensor,
        block_size: tuple[int, int],
        seq_lengths: tuple[int, int],
        *,
        visits: Visits = "descending",
    ) -> BlockMask:
        """The inverse of `to_bitmap`."""
        columns = _num_blocks(seq_lengths, block_size)[1]
        ragged = seq_lengths[1] % block_size[1] != 0
        lists = lists_from_bitmap(bitmap, columns, visits, ragged=ragged)
        return cls(*lists, tuple(block_size), tuple(seq_lengths), visits)

    @classmethod
    def from_flex(cls, mask: FlexBlockMask) -> BlockMask:
        """Take over a FlexAttention mask of whole blocks.

        Raises:
            ValueError: if it has partial blocks with an element-wise `mask_mod`, which a block mask cannot express.
        """
        from torch.nn.attention.flex_attention import noop_mask

        if mask.full_kv_num_blocks is not None and not mask.kv_num_blocks.any():
            lists = mask.full_kv_num_blocks, mask.full_kv_indices
        elif mask.full_kv_num_blocks is None and mask.mask_mod is noop_mask:
            lists = mask.kv_num_blocks, mask.kv_indices
        else:
            raise ValueError(
                "this FlexAttention mask masks inside blocks; only whole blocks can be taken over"
            )
        counts, indices = (x.to(torch.int32) for x in lists)
        rows = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
        keep = torch.zeros(indices.shape, dtype=torch.bool, device=indices.device)
        # Entries past the count are arbitrary: OR them in as "not kept".
        keep = keep.to(torch.uint8).scatter_reduce(
            -1, indices.long().clamp(0, indices.shape[-1] - 1), rows.to(torch.uint8), "amax"
        )
        return cls.from_dense(keep.bool(), tuple(mask.BLOCK_SIZE), tuple(mask.seq_lengths))

    # -- other forms ----------------------------------------------------------------------------------------------

    def to_dense(self) -> Tensor:
        """`bool [B|1, H|1, Mq, Nk]`, true where a block is read."""
        valid = (
            torch.arange(self.num_blocks[1], device=self.kv_indices.device)
            < self.kv_num_blocks[..., None]
        )
        keep = torch.zeros(self.kv_indices.shape, dtype=torch.uint8, device=self.kv_indices.device)
        index = self.kv_indices.long().clamp(0, self.num_blocks[1] - 1)
        return keep.scatter_reduce(-1, index, valid.to(torch.uint8), "amax").bool()

    def to_bitmap(self) -> Tensor:
        """`uint8 [B|1, H|1, Mq, ceil(Nk / 8)]`, block `j` in bit `j % 8` of byte `j // 8`."""
        return pack_bits(self.to_dense())

    def to_flex(self) -> FlexBlockMask:
        """The same mask for `torch.nn.attention.flex_attention`, as whole ("full") blocks.

        It also carries an element-wise `mask_mod`, because FlexAttention looks at nothing else when not compiled.
        """
        from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

        keep, (bq, bk) = self.to_dense(), self.block_size
        batch, heads = keep.shape[:2]

        def mask_mod(b, h, q, k):
            return keep[b % batch, h % heads, q // bq, k // bk]

        return FlexBlockMask.from_kv_blocks(
            torch.zeros_like(self.kv_num_blocks),
            torch.zeros_like(self.kv_indices),
            self.kv_num_blocks,
            self.kv_indices,
            BLOCK_SIZE=self.block_size,
            mask_mod=mask_mod,
            seq_lengths=self.seq_lengths,
        )

    # -- geometry -------------------------------------------------------------------------------------------------

    @property
    def num_blocks(self) -> tuple[int, int]:
        """`(Mq, Nk)`: query and key/value blocks."""
        return _num_blocks(self.seq_lengths, self.block_size)

    @property
    def device(self) -> torch.device:
        """Where the lists live."""
        return self.kv_indices.device

    def density_per_head(self) -> Tensor:
        """`float32 [B|1, H|1]`: kept share of the token area, ragged blocks at their true size.  No host sync."""
        return area_density(self.to_dense(), self.block_size, self.seq_lengths)

    @property
    def density(self) -> float:
        """Kept share of the token area in [0, 1].  Synchronises with the device; not for the hot path."""
        return self.density_per_head().mean().item()

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask on another device."""
        return BlockMask(
            self.kv_num_blocks.to(device),
            self.kv_indices.to(device),
            self.block_size,
            self.seq_lengths,
            self.visits,
        )

    # -- algebra --------------------------------------------------------------------------------------------------

    def __and__(self, other: BlockMask) -> BlockMask:
        """Blocks that both masks keep."""
        return self._combine(other, torch.logical_and)

    def __or__(self, other: BlockMask) -> BlockMask:
        """Blocks that either mask keeps."""
        return self._combine(other, torch.logical_or)

    def _combine(self, other: BlockMask, op) -> BlockMask:
        if (self.block_size, self.seq_lengths) != (other.block_size, other.seq_lengths):
            raise ValueError(
                f"masks differ: blocks {self.block_size} over {self.seq_lengths} against "
                f"{other.block_size} over {other.seq_lengths}; coarsen() or refine() one of them first"
            )
        return self.from_dense(
            op(self.to_dense(), other.to_dense()), self.block_size, self.seq_lengths
        )

    def coarsen(self, query: int, key: int) -> BlockMask:
        """Merge `query x key` blocks into one, kept if any of them was: never drops what was kept."""
        if query < 1 or key < 1:
            raise ValueError(f"factors must be >= 1, got {(query, key)}")
        keep = self.to_dense()
        mq, nk = self.num_blocks
        pad = (0, -nk % key, 0, -mq % query)
        keep = torch.nn.functional.pad(keep, pad)
        keep = keep.unflatten(-1, (-1, key)).any(-1).unflatten(-2, (-1, query)).any(-2)
        size = (self.block_size[0] * query, self.block_size[1] * key)
        return self.from_dense(keep, size, self.seq_lengths)

    def refine(self, query: int, key: int) -> BlockMask:
        """Split every block into `query x key` smaller ones with the same fate."""
        if query < 1 or key < 1 or self.block_size[0] % query or self.block_size[1] % key:
            raise ValueError(f"blocks {self.block_size} cannot be split {(query, key)} ways")
        size = (self.block_size[0] // query, self.block_size[1] // key)
        mq, nk = _num_blocks(self.seq_lengths, size)
        keep = self.to_dense().repeat_interleave(query, -2).repeat_interleave(key, -1)
        return self.from_dense(keep[..., :mq, :nk].contiguous(), size, self.seq_lengths)

    def force(self, keep: Tensor) -> BlockMask:
        """Add the blocks set in `keep` (`bool`, broadcastable to `[B, H, Mq, Nk]`); see `forced_blocks`."""
        if keep.dtype != torch.bool or tuple(keep.shape[-2:]) != self.num_blocks:
            raise ValueError(
                f"keep must be bool [..., {self.num_blocks}], got {keep.dtype} {list(keep.shape)}"
            )
        return self.from_dense(self.to_dense() | keep, self.block_size, self.seq_lengths)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.kv_indices.shape))
        return f"BlockMask([{shape}], block_size={self.block_size}, seq_lengths={self.seq_lengths})"


def forced_blocks(
    grid: TokenGrid,
    block_size: tuple[int, int],
    *,
    device: torch.device | str | None = None,
    diagonal: bool = False,
    reordered: bool = False,
) -> Tensor:
    """What every method must keep: `bool [Mq, Nk]`.

    Rows and columns of blocks that hold any token outside the grid (text, image, audio) stay exact; `pad` tokens
    bind nobody.  With `diagonal`, so does each query block's own place.  `reordered` says that a `TokenOrder` has
    moved the grid to the front.
    """
    n = grid.num_tokens
    mq, nk = _num_blocks((n, n), block_size)
    keep = torch.zeros(mq, nk, dtype=torch.bool, device=device)
    spans = grid.spans("text", "image", "audio")
    if reordered and spans:
        start, stop = grid.grid_span
        spans = ((stop - start, n),)
    bq, bk = block_size
    for start, stop in spans:
        keep[start // bq : -(-stop // bq)] = True
        keep[:, start // bk : -(-stop // bk)] = True
    if diagonal:
        own = torch.arange(mq, device=device) * bq
        last = ((own + bq).clamp(max=n) - 1) // bk
        columns = torch.arange(nk, device=device)
        keep |= (columns >= (own // bk)[:, None]) & (columns <= last[:, None])
    return keep


def block_areas(
    block_size: tuple[int, int],
    seq_lengths: tuple[int, int],
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens in each query block and in each key block (`float32 [Mq]`, `[Nk]`); only the last may be short."""
    sizes = []
    for n, b in zip(seq_lengths, block_size, strict=True):
        starts = torch.arange(0, n, b, device=device, dtype=torch.float32)
        sizes.append((n - starts).clamp(max=b))
    return sizes[0], sizes[1]


def area_density(keep: Tensor, block_size: tuple[int, int], seq_lengths: tuple[int, int]) -> Tensor:
    """Kept share of the token area of `keep` (`bool [B, H, Mq, Nk]`): `float32 [B, H]`.  No host sync."""
    rows, columns = block_areas(block_size, seq_lengths, keep.device)
    return ((keep.to(torch.float32) @ columns) @ rows) / math.prod(seq_lengths)


def pack_bits(keep: Tensor) -> Tensor:
    """`bool [..., N]` to `uint8 [..., ceil(N / 8)]`, little-endian bits."""
    padded = torch.nn.functional.pad(keep, (0, -keep.shape[-1] % 8)).unflatten(-1, (-1, 8))
    weights = 2 ** torch.arange(8, device=keep.device, dtype=torch.uint8)
    return (padded.to(torch.uint8) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(bitmap: Tensor, length: int) -> Tensor:
    """The inverse of `pack_bits` for `length` bits."""
    if -(-length // 8) != bitmap.shape[-1]:
        raise ValueError(
            f"{length} bits take {-(-length // 8)} bytes a row, got {bitmap.shape[-1]}"
        )
    shifts = torch.arange(8, device=bitmap.device, dtype=torch.uint8)
    bits = (bitmap[..., None] >> shifts) & 1
    return bits.flatten(-2)[..., :length].bool()


def _num_blocks(seq_lengths: tuple[int, int], block_size: tuple[int, int]) -> tuple[int, int]:
    return -(-seq_lengths[0] // block_size[0]), -(-seq_lengths[1] // block_size[1])
