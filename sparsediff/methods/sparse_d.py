"""SparseD: sparse attention for diffusion language models (Wang et al., arXiv:2509.24014).

Patterns differ from head to head but hardly change over the steps, and early steps matter most.  So the first steps
stay dense, the last of them measures the exact attention of every pair of blocks, and what it picks serves to the end.
Prompt and generation are picked from separately, so that neither starves the other (section 4.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsediff.budget import segment_top_k
from sparsediff.kernels.block_scores import block_mass
from sparsediff.methods.base import AttentionSite, SquareBlockMethod
from sparsediff.schedule import Schedule
from sparsediff.token_grid import TokenGrid


@dataclass(frozen=True, kw_only=True)
class SparseD(SquareBlockMethod):
    """One exact mask a head, made once, at the end of a dense prefix.

    Attributes:
        skip: share of the steps that stay dense before the mask is made; the step that makes it is dense too.
        select: share of key blocks that a query block keeps, of the prompt's and of the generation's.
        block: tokens a block: 32, 64 or 128 (published: 128 for long sequences, 32 for short tasks); None takes 64 up to
            16,384 tokens and 128 beyond.

    Mended against the published code: each side gets its own `select` as the paper says (there, what the prompt gets
    is what a mixed choice leaves it), logits are scaled by `1 / sqrt(D)` (there, for one model, by the number of
    heads), and any length works with any block.  In a video, text stays dense besides, as everywhere in this library.
    Where a language model writes block by block, a longer context gets a mask of its own, made in one dense step.
    """

    name: ClassVar[str] = "sparse_d"
    summary: ClassVar[str] = "exact attention of every block measured once, after a dense prefix"
    citation: ClassVar[str] = "arXiv:2509.24014"

    skip: float = 0.2
    select: float = 0.3
    block: int | None = None

    def __post_init__(self) -> None:
        self._require("skip", float, lambda x: 0 <= x < 1, "a share of the steps in [0, 1)")
        self._require("select", float, lambda x: 0 < x <= 1, "a share of the blocks in (0, 1]")
        self._require_block()

    def searches_dense(self, site: AttentionSite, last_refresh: int | None) -> bool:
        """The step that makes the mask does not use it yet."""
        return True

    def keep_blocks(
        self, query: Tensor, key: Tensor, site: AttentionSite, *, lse: Tensor | None = None
    ) -> Tensor:
        """For every query block the heaviest blocks of each segment; a block on the border is the prompt's."""
        size = self.block_size(site.grid)
        mass = block_mass(query, key, size, scale=site.scale, lse=lse, kv_lengths=site.kv_lengths)
        return segment_top_k(mass, self.select, segments(site.grid, size[0]), site.visible)

    def default_schedule(self) -> Schedule:
        """The dense prefix."""
        return Schedule(dense_steps=self.skip)


def segments(grid: TokenGrid, block: int) -> list[slice]:
    """Runs of key blocks: what lies wholly in the grid (the generation), and what is left before and after it."""
    generation = grid.whole_blocks(block)
    blocks = -(-grid.num_tokens // block)
    runs = (slice(0, generation.start), generation, slice(generation.stop, blocks))
    return [run for run in runs if run.stop > run.start]
