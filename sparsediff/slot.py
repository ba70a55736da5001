"""What is kept of one layer between denoising steps: a bitmap, and what the method needs beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsediff.block_mask import BlockMask
from sparsediff.kernels.block_bitmap import pack_mask
from sparsediff.kernels.block_lists import Visits

# Index lists are 32 times the bitmap: kept between steps only while they are small, 84 MB in 40 layers of two branches.
LIST_CACHE_BYTES = 1 << 20
# What a run may keep between steps without a word: Wan 14B at 720p in both branches takes 140 MB in blocks of 128.
STATE_TARGET_BYTES = 160_000_000


def slot_bytes(
    batch: int,
    heads: int,
    lengths: tuple[int, int],
    block_size: tuple[int, int],
    *,
    keeps_lse: bool,
) -> tuple[int, int]:
    """What one layer will keep in one branch for a mask over `lengths` tokens: of the mask, and of the log-sum-exp."""
    rows, columns = (-(-n // b) for n, b in zip(lengths, block_size, strict=True))
    blocks = batch * heads * rows
    lists = 4 * blocks * columns
    masks = blocks * -(-columns // 8) + (lists if lists <= LIST_CACHE_BYTES else 0)
    return masks, 2 * batch * heads * lengths[0] if keeps_lse else 0


@dataclass
class MaskSlot:
    """What one layer remembers in one branch."""

    layout: tuple
    visible: Tensor | None = None  # bool [B|1, H|1, Mq, Nk], what the model's own mask shows
    bitmap: Tensor | None = None  # uint8 [B, H, Mq, ceil(Nk / 8)]
    density: Tensor | None = None  # float32 [H], averaged over the batch
    refreshed_at: int | None = None
    lists: BlockMask | None = None
    heads: Tensor | None = None  # int32 [B, H], the window of each head, where the method chooses
    # float16 [B, H, S] in the order of the mask: an old one is off by far more than the rounding
    lse: Tensor | None = None

    def store(
        self,
        keep: Tensor,
        forced: Tensor,
        block_size: tuple[int, int],
        lengths: tuple[int, int],
        *,
        want_mask: bool = True,
    ) -> BlockMask | None:
        """Remember `keep | forced`, in place of what was; returns it as a mask if it is wanted at once."""
        small = keep.numel() * 4 <= LIST_CACHE_BYTES
        if self.visible is not None:
            keep, forced = (keep | forced) & self.visible, torch.zeros_like(forced)
        same = self.bitmap is not None and self.bitmap.shape[:3] == keep.shape[:3]
        packed = pack_mask(
            keep,
            forced,
            block_size,
            lengths,
            bitmap=self.bitmap if same else None,
            want_lists=want_mask or small,
        )
        self.bitmap, self.density = packed.bitmap, packed.density
        mask = None if packed.lists is None else BlockMask(*packed.lists, block_size, lengths)
        self.lists = mask if small else None
        return mask

    def mask(
        self,
        block_size: tuple[int, int],
        lengths: tuple[int, int],
        visits: Visits = "descending",
    ) -> BlockMask:
        """What is remembered, as lists."""
        if self.lists is not None and visits == self.lists.visits:
            return self.lists
        return BlockMask.from_bitmap(self.bitmap, block_size, lengths, visits=visits)

    @property
    def nbytes(self) -> int:
        """Memory held between steps."""
        lists = None if self.lists is None else self.lists.kv_indices
        return sum(x.nbytes for x in (self.bitmap, lists, self.lse) if x is not None)
