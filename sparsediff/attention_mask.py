"""Which blocks of keys an attention mask lets each block of queries see.

A block-sparse kernel can leave blocks out and nothing smaller.  A mask that hides nothing, the last keys from
everybody, or whole blocks, is served exactly; any other is said to be none of these, and the call runs dense.
Reads the mask back to the host.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

KINDS = 2  # masks of one forward: a model may have one for windowed and one for full layers
KNOWN = 8  # sets of blocks that are told apart from new ones


@dataclass(frozen=True, kw_only=True, eq=False)
class Visible:
    """What a mask shows.

    Attributes:
        keys: the first so many keys are all that anybody sees.
        blocks: `bool [B|1, H|1, Mq, Nk]` over those keys, the blocks that are seen; None if all are.
    """

    keys: int
    blocks: Tensor | None = None


def read_mask(mask: Tensor, block_size: tuple[int, int]) -> Visible:
    """What `mask` shows.

    Args:
        mask: as `scaled_dot_product_attention` takes it, broadcastable to `[B, H, Sq, Sk]` but for the keys: bool (True
            is seen), or added to the logits (0 is seen, -inf or the least number of a dtype is not).
        block_size: `(query, key)` tokens a block.

    Raises:
        ValueError: it does something that whole blocks cannot; the message is for reports.
    """
    seen = _seen(mask)
    seen = seen.reshape((1,) * (4 - seen.ndim) + seen.shape)
    if seen.all():
        return Visible(keys=seen.shape[-1])
    if not seen.any(-1).all():
        raise ValueError("an attention mask that hides all keys from some queries")
    keys = int(seen.flatten(0, 2).any(0).nonzero().max()) + 1
    seen = seen[..., :keys]
    if seen.all():
        return Visible(keys=keys)
    if seen.shape[2] == 1:
        raise ValueError("an attention mask over keys with gaps (prompts padded to one length)")
    bq, bk = block_size
    some = _any_in_block(seen, bq, bk)
    if (some & _any_in_block(~seen, bq, bk)).any():
        raise ValueError(f"an attention mask that cuts through blocks of {bq} x {bk} tokens")
    return Visible(keys=keys, blocks=some)


def _seen(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    # A sum of two such masks overflows to -inf; half the least number of the narrowest dtype is as good as it.
    hidden = mask <= torch.finfo(torch.float16).min / 2
    seen = mask == 0
    if not (seen | hidden).all():
        raise ValueError("an attention mask that weighs keys instead of hiding them")
    return seen


def _any_in_block(x: Tensor, bq: int, bk: int) -> Tensor:
    """`bool [B, H, Sq, Sk]` to `[B, H, Mq, Nk]`; the last blocks may be ragged."""
    rows, columns = x.shape[-2:]
    x = functional.pad(x, (0, -columns % bk, 0, -rows % bq), value=False)
    return x.unflatten(-1, (-1, bk)).any(-1).unflatten(-2, (-1, bq)).any(-2)


class MaskReader:
    """Reads each mask of a forward once, for all layers.

    What shows the same blocks as before is the same `Visible.blocks`, so that layers need not compare them, for which
    they would wait for the device.
    """

    def __init__(self) -> None:
        self._read: deque[tuple[Tensor, tuple[int, int], Visible | str]] = deque(maxlen=KINDS)
        self._known: deque[Tensor] = deque(maxlen=KNOWN)

    def read(self, mask: Tensor, block_size: tuple[int, int]) -> Visible | str:
        """`read_mask`, or why the mask cannot be served."""
        for seen, size, visible in self._read:
            if seen is mask and size == block_size:
                return visible
        try:
            visible = self._like_before(read_mask(mask, block_size))
        except ValueError as error:
            visible = str(error)
        self._read.append((mask, block_size, visible))
        return visible

    def forget(self) -> None:
        """The forward is over: masks of the next are others, if by chance at the same place in memory."""
        self._read.clear()

    def _like_before(self, visible: Visible) -> Visible:
        blocks = visible.blocks
        if blocks is None:
            return visible
        for known in self._known:
            same = known.device == blocks.device and known.shape == blocks.shape
            if same and torch.equal(known, blocks):
                return Visible(keys=visible.keys, blocks=known)
        self._known.append(blocks)
        return visible
