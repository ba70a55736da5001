"""What is kept of each layer between denoising steps: a bitmap, and what the method needs beside it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsediff.block_mask import BlockMask
from sparsediff.kernels.block_bitmap import pack_mask
from sparsediff.kernels.block_lists import Visits
from sparsediff.token_grid import TokenGrid, TokenOrder

# Guidance branches, or samples of one, whose masks are kept: more if contexts go unnamed outside a pipeline, or batches
# are large where a model attends sample by sample.
MAX_BRANCHES = 8
# What a sample takes with guidance, the most that is common.
GUIDED_BRANCHES = 2
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


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a mask is about; it says nothing about tokens in another order, in other blocks or of another batch.

    Attributes:
        grid: the tokens.
        block_size: `(query, key/value)` tokens a block.
        order: which tokens share a block; None if the sequence keeps its own order.
        batch, heads: samples and query heads, each with blocks of its own.
        device: where the mask lives.
    """

    grid: TokenGrid
    block_size: tuple[int, int]
    order: TokenOrder | None
    batch: int
    heads: int
    device: torch.device

    def bytes_a_layer(self, *, batch: int, keeps_lse: bool) -> tuple[int, int]:
        """`slot_bytes` of so many samples."""
        lengths = (self.grid.num_queries, self.grid.num_tokens)
        return slot_bytes(batch, self.heads, lengths, self.block_size, keeps_lse=keeps_lse)


@dataclass
class MaskSlot:
    """What one layer remembers in one branch."""

    layout: Layout
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


class Slots(OrderedDict[str, list[MaskSlot | None]]):
    """The slot of every layer, by guidance branch; the branch used last comes last.

    Args:
        layers: how many there are.
        name: of the method, for messages.
        warn: tells the user something, once.
    """

    def __init__(self, layers: int, name: str, warn: Callable[[str], None]) -> None:
        super().__init__()
        self._layers, self._name, self._warn = layers, name, warn

    def slot(
        self, branch: str, index: int, layout: Layout, visible: Tensor | None, *, wants_lse: bool
    ) -> MaskSlot:
        """What layer `index` remembers in `branch`: nothing, if the last call there was about something else.

        `visible` are the blocks that the model's own mask shows, the same tensor as long as they are the same;
        `wants_lse` says that the method would have a log-sum-exp kept.
        """
        layers = self.get(branch)
        if layers is None:
            layers = self[branch] = [None] * self._layers
            if len(self) > MAX_BRANCHES:
                self.popitem(last=False)
                self._warn(
                    f"more than {MAX_BRANCHES} guidance branches or samples of one step: masks of the oldest are dropped "
                    "and made again; name the branches with transformer.cache_context(), generate fewer clips at once, or "
                    "tell steps by the timestep argument or handle.begin_generation()"
                )
        else:
            self.move_to_end(branch)
        slot = layers[index]
        if slot is None or slot.layout != layout or slot.visible is not visible:
            slot = layers[index] = MaskSlot(layout, visible)
            self._tell_memory(layout, wants_lse and self.has_room_for_lse(layout))
        return slot

    def known(self, branch: str, index: int) -> MaskSlot | None:
        """What layer `index` remembers in `branch`, if it has come by."""
        layers = self.get(branch)
        return None if layers is None else layers[index]

    def has_room_for_lse(self, layout: Layout) -> bool:
        """Whether masks and log-sum-exps of one clip with guidance stay under the target.

        Of one clip, however many are generated: what becomes of it must not depend on what stands beside it.
        """
        one = sum(layout.bytes_a_layer(batch=1, keeps_lse=True))
        return one * self._layers * GUIDED_BRANCHES <= STATE_TARGET_BYTES

    def _tell_memory(self, layout: Layout, keeps_lse: bool) -> None:
        """Warn once of more memory than people expect masks to take."""
        each = layout.bytes_a_layer(batch=layout.batch, keeps_lse=keeps_lse)
        masks, lse = (self._layers * part for part in each)
        if (masks + lse) * len(self) <= STATE_TARGET_BYTES:
            return
        block_size = layout.block_size
        what = (
            f"{masks / 1e6:.0f} MB of masks in blocks of {block_size[0]} x {block_size[1]} tokens"
        )
        advice = []
        if min(block_size) < 128:
            advice.append("blocks of 128 take less")
        if lse:
            what += f" and {lse / 1e6:.0f} MB of log-sum-exps"
            advice.append("searching once keeps no log-sum-exps")
        self._warn(
            f"{self._name} keeps {what} between steps, for each guidance branch"
            + (f"; {', '.join(advice)}" if advice else "")
        )

    @property
    def nbytes(self) -> int:
        """Memory held between steps."""
        return sum(slot.nbytes for layers in self.values() for slot in layers if slot)
