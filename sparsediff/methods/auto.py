"""The default: the best hybrid that the landed methods allow.

It is not a published method.  From DraftAttention it takes the reordering of tokens into patches, from AdaSpa
(arXiv:2502.21079) the exact block mass looked at once instead of an estimate looked at every step, and from all of
them the finding that the pattern hardly moves from one step to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsediff.budget import row_top_k
from sparsediff.kernels.block_scores import block_mass
from sparsediff.methods.base import AttentionSite, Method
from sparsediff.schedule import Schedule
from sparsediff.token_grid import TokenGrid, TokenOrder

SHORT_SEQUENCE = 16_384  # tokens
# Block -> (frames, height, width).  Patches of one frame divide most grids; boxes that reach over four frames lost
# 3 dB on the bundled model, whose nine latent frames they do not divide (LOG.md).
WINDOWS = {64: (1, 8, 8), 128: (1, 8, 16)}


@dataclass(frozen=True, kw_only=True)
class Auto(Method):
    """Dense while the layout forms, then the blocks with the largest exact attention mass, looked up again rarely.

    Attributes:
        density: share of key blocks that every query block keeps.
        refresh_every: steps between two looks at the exact mass. Each costs about half a dense attention call on a CPU and
            up to 1.4 on a GPU (docs/performance.md).
        block: tokens a block, 64 (patches of 8 x 8 latent tokens of a frame) or 128 (8 x 16).  None takes 64 for
            short sequences, where few blocks leave little to choose from, and 128 beyond 16,384 tokens.
    """

    name: ClassVar[str] = "auto"
    summary: ClassVar[str] = (
        "the default hybrid: short dense prefix, exact block mass, rare refreshes"
    )
    citation: ClassVar[str] = "this library"

    density: float = 0.3
    refresh_every: int = 8
    block: int | None = None

    def __post_init__(self) -> None:
        self._require("density", float, lambda x: 0 < x <= 1, "a share in (0, 1]")
        self._require("refresh_every", int, lambda x: x >= 1, "a whole number of steps >= 1")
        if self.block is not None:
            self._require("block", int, lambda x: x in WINDOWS, f"one of {sorted(WINDOWS)} or None")

    def block_size(self, grid: TokenGrid) -> tuple[int, int]:
        """Square blocks."""
        return (self.block or (64 if grid.num_tokens <= SHORT_SEQUENCE else 128),) * 2

    def order(self, site: AttentionSite) -> TokenOrder:
        """DraftAttention's patches."""
        return TokenOrder((WINDOWS[self.block_size(site.grid)[0]],))

    def refreshes(self, site: AttentionSite, last_refresh: int | None) -> bool:
        """Every `refresh_every` steps."""
        return last_refresh is None or site.step - last_refresh >= self.refresh_every

    def keep_blocks(self, query: Tensor, key: Tensor, site: AttentionSite) -> Tensor:
        """The heaviest blocks of each row."""
        return row_top_k(block_mass(query, key, self.block_size(site.grid)), self.density)

    def default_schedule(self) -> Schedule:
        """Dense above noise level 0.95: 14 % of the steps at a flow shift of 3, 20 % at 5, the first of 4 with a LoRA."""
        return Schedule(dense_above_sigma=0.95)
