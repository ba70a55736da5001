"""LiteAttention: temporal sparse attention (Shmilovich et al., arXiv:2511.11062).

A tile whose scores all lie far below the running maximum adds nothing to the output, and what is useless at one
denoising step stays useless later.  So each attention call both uses the skip decisions of the call before and, as a
by-product of computing the surviving tiles, makes those of the next: no profiling pass (section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsediff.methods.base import AttentionSite, Method
from sparsediff.token_grid import TokenGrid


@dataclass(frozen=True, kw_only=True)
class LiteAttention(Method):
    """Skip tiles that a previous step found negligible; a skipped tile never comes back within a generation.

    Attributes:
        threshold: log2 units, below 0.  A tile is dropped for the next step when, in every query row, its best score
            lies below the running maximum by this much: -10 drops what weighs under 2^-10 of the best so far.
            Nearer 0 skips more.  (The paper writes the same as `-epsilon` in natural units: epsilon = 10 ln 2.)
        tile: `(query, key)` tokens.  The published Hopper kernel uses 128 x 176 at head size 128; a power of two is
            what our kernels run.

    Mended against the published code: state is reset at every generation and kept apart per guidance branch (there,
    a second video inherited the first one's skips), is a bitmap (there, int32 lists of 13 GB for Wan 14B), and text
    rows and columns never take part.
    """

    name: ClassVar[str] = "lite_attention"
    summary: ClassVar[str] = (
        "tiles found negligible at one step are skipped at the next; nothing to calibrate"
    )
    citation: ClassVar[str] = "arXiv:2511.11062"

    threshold: float = -10.0
    tile: tuple[int, int] = (128, 128)

    def __post_init__(self) -> None:
        self._require(
            "threshold",
            float,
            lambda x: x < 0,
            "a number of log2 units below 0 (published: -10; -3 is aggressive)",
        )
        self._require(
            "tile",
            tuple,
            lambda x: len(x) == 2 and all(isinstance(n, int) and n >= 16 for n in x),
            "two sizes >= 16, such as (128, 128)",
        )

    def block_size(self, grid: TokenGrid) -> tuple[int, int]:
        """The tile, whatever the grid."""
        return self.tile

    def keep_blocks(
        self, query: Tensor, key: Tensor, site: AttentionSite, *, lse: Tensor | None = None
    ) -> Tensor:
        """Everything: the first call of a generation visits all tiles, later ones only what its vote left."""
        bq, bk = self.block_size(site.grid)
        shape = (query.shape[0], query.shape[2], -(-query.shape[1] // bq), -(-key.shape[1] // bk))
        return torch.ones(shape, dtype=torch.bool, device=query.device)

    def vote_threshold(self, site: AttentionSite) -> float:
        """The same at every step."""
        return self.threshold
