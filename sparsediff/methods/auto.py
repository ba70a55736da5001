"""The default: the hybrid that measured best on the bundled models (docs/methods.md).

It is not a published method.  From AdaSpa (arXiv:2502.21079) it takes the exact block mass, measured beside a dense
call; from PAROAttention (arXiv:2506.16054) the order of tokens chosen by head, but while the run goes on, so that
nothing needs calibrating; and from all of them the finding that the pattern hardly moves from one step to the next.
Its own is where blocks are spent: one budget for all layers and heads, half of it kept evenly by every row of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import ClassVar

from sparsediff.methods.base import AttentionSite
from sparsediff.methods.custom import Budget, Custom
from sparsediff.methods.sparse_d import SparseD
from sparsediff.token_grid import TokenGrid, TokenOrder, Window

# Block -> (frames, height, width): a patch of one frame.
PATCHES = {32: (1, 4, 8), 64: (1, 8, 8), 128: (1, 8, 16)}
# In a shorter run a second choice costs more than the same time spent on blocks gains (LOG.md).
LONG_RUN, AGAIN = 20, (0.5,)


@dataclass(frozen=True, kw_only=True)
class Auto(Custom):
    """Dense while the layout forms; its last dense step finds for every head the order and the blocks that matter.

    Attributes:
        density: share of key blocks kept, of all layers and heads together.
        windows: None offers each head a patch of one frame and a column through all frames; an image has patches only.
        refresh: None chooses again at half of a run that is known to have 20 steps or more, a fifth of the run after the
            first choice at the earliest; `()` never.

    The other parameters are those of `Custom`.  Their defaults here: one budget for all layers, half of which rows have to
    themselves, and 64 query tokens of a block looked at.
    """

    name: ClassVar[str] = "auto"
    summary: ClassVar[str] = (
        "the default hybrid: short dense prefix, exact block mass, order by head, one budget for all layers"
    )

    budget: Budget = "model_percentile"
    row_share: float = 0.5
    stride: int | None = None
    windows: tuple[Window, ...] | None = None

    def _require_windows(self) -> None:
        if self.windows is not None:
            super()._require_windows()

    def for_text(self) -> SparseD:
        """SparseD, of which this method is a descendant, with the same share of blocks.

        Raises:
            ValueError: a parameter is set that SparseD does not know.
        """
        strange = {
            f.name
            for f in fields(self)
            if f.name not in ("density", "block") and getattr(self, f.name) != f.default
        }
        if strange:
            raise ValueError(
                f"auto is sparse_d on a language model, which has no {', '.join(sorted(strange))}; "
                "leave it out, or use 'sparse_d'"
            )
        block = {} if self.block is None else {"block": self.block}
        return SparseD(select=self.density, **block)

    def refreshes(self, site: AttentionSite, last_refresh: int | None) -> bool:
        """The first time, and as `refresh` says."""
        if self.refresh is not None or last_refresh is None:
            return super().refreshes(site, last_refresh)
        steps = site.num_steps or 0
        # Soon after the first choice there is nothing new to see.
        settled = site.step - last_refresh >= steps // 5
        return steps >= LONG_RUN and settled and site.passed(AGAIN, last_refresh)

    def order(self, site: AttentionSite) -> TokenOrder | None:
        """A patch or a column, as the head likes."""
        if self.windows is not None:
            return super().order(site)
        block = self.block_size(site.grid)[0]
        if site.grid.shape[0] == 1:
            return TokenOrder((PATCHES[block],))
        return TokenOrder(tuple(dict.fromkeys((PATCHES[block], column(site.grid, block)))))


@lru_cache(maxsize=32)
def column(grid: TokenGrid, block: int) -> Window:
    """About `block` tokens of all frames: the box that divides the frame and comes nearest."""
    frames, height, width = grid.shape
    boxes = [
        (rows, columns)
        for rows in range(1, height + 1)
        for columns in range(1, width + 1)
        if height % rows == 0 and width % columns == 0
    ]

    def misfit(box: tuple[int, int]) -> tuple[float, int]:
        # nearly right is as good as right if the box is squarer
        return (round(abs(frames * box[0] * box[1] / block - 1), 1), abs(box[0] - box[1]))

    rows, columns = min(boxes, key=misfit)
    return (frames, rows, columns)
