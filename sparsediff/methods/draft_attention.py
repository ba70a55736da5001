"""DraftAttention: low-resolution attention guidance (Shen et al., arXiv:2505.14708).

Queries and keys are averaged over patches of 8 x 16 latent tokens of one frame; attention between the averages (the
draft) is cheap and says which pairs of patches matter.  Tokens are reordered so that a patch is a block (section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsediff.budget import head_percentile
from sparsediff.kernels.block_scores import pooled_scores
from sparsediff.methods.base import AttentionSite, Method
from sparsediff.schedule import Schedule
from sparsediff.token_grid import TokenGrid, TokenOrder


@dataclass(frozen=True, kw_only=True)
class DraftAttention(Method):
    """Choose blocks from attention between patch averages, afresh at every sparse call.

    Attributes:
        sparsity: share of visual blocks dropped per head (published: 0.75 for Wan 2.1, 0.9 for HunyuanVideo).
        pool_h, pool_w: patch in latent rows and columns; their product is the block.
        sub_blocks: cut every patch into so many runs of tokens, average those, and score a pair of patches by the
            log-sum-exp of its runs' logits: a small bright spot in a patch is then not averaged away.  1 is the
            paper.
        int8: 8-bit logits (Hopper, head size 128).
        row_minimum: blocks that every query row keeps at least.  Not in the paper, whose global percentile can leave
            a diffuse row without any; the published code relies on text columns, which Wan does not have.

    Mended against the published code: any grid (there: 8 | height and 16 | width), any batch, no empty rows.  On a
    grid that the patch does not divide, blocks straddle patches at the far edges and the draft averages the tokens
    that a block really holds.
    """

    name: ClassVar[str] = "draft_attention"
    summary: ClassVar[str] = "attention between 8x16 patch averages picks the blocks, at every step"
    needs_video: ClassVar[str] = "pools patches of frames"
    citation: ClassVar[str] = "arXiv:2505.14708"

    sparsity: float = 0.75
    pool_h: int = 8
    pool_w: int = 16
    row_minimum: int = 1
    sub_blocks: int = 1
    int8: bool = False

    def __post_init__(self) -> None:
        self._require("sparsity", float, lambda x: 0 <= x < 1, "a share in [0, 1)")
        for name in ("pool_h", "pool_w", "row_minimum"):
            self._require(name, int, lambda x: x >= 1, "a whole number >= 1")
        if self.pool_h * self.pool_w not in (64, 128):
            raise ValueError(
                f"pool_h * pool_w is the block and must be 64 or 128, got {self.pool_h} * {self.pool_w}"
            )

        self._require("int8", bool)
        self._require(
            "sub_blocks",
            int,
            lambda x: x >= 1 and self.pool_h * self.pool_w % x == 0,
            "a whole number that divides pool_h * pool_w",
        )

    @property
    def backend(self) -> str:
        """8-bit logits are a kernel of their own."""
        return "gluon_int8" if self.int8 else "auto"

    def block_size(self, grid: TokenGrid) -> tuple[int, int]:
        """One patch."""
        return (self.pool_h * self.pool_w,) * 2

    def order(self, site: AttentionSite) -> TokenOrder:
        """Patch after patch, each `pool_h x pool_w` tokens of one frame."""
        return TokenOrder.single(1, self.pool_h, self.pool_w)

    def refreshes(self, site: AttentionSite, last_refresh: int | None) -> bool:
        """At every call: the paper caches nothing."""
        return True

    def keep_blocks(
        self, query: Tensor, key: Tensor, site: AttentionSite, *, lse: Tensor | None = None
    ) -> Tensor:
        """Per head, the blocks whose draft attention is at or above the `sparsity` percentile."""
        block_size = self.block_size(site.grid)
        logits = self._logits(query, key, block_size, site)
        start, stop = site.grid.grid_span
        visual = -(-(stop - start) // block_size[0])  # `order` has put the grid in front
        keep = torch.ones_like(logits, dtype=torch.bool)
        draft = logits[..., :visual, :visual].softmax(-1)
        keep[..., :visual, :visual] = head_percentile(
            draft, 1.0 - self.sparsity, row_minimum=self.row_minimum
        )
        return keep

    def _logits(
        self, query: Tensor, key: Tensor, block_size: tuple[int, int], site: AttentionSite
    ) -> Tensor:
        parts = self.sub_blocks
        size = (block_size[0] // parts, block_size[1] // parts)
        logits = pooled_scores(query, key, size, scale=site.scale, kv_lengths=site.kv_lengths)
        if parts == 1:
            return logits
        rows, columns = (-n % parts for n in logits.shape[-2:])
        logits = F.pad(logits, (0, columns, 0, rows), value=-torch.inf)
        return logits.unflatten(-1, (-1, parts)).unflatten(-3, (-1, parts)).logsumexp((-3, -1))

    def default_schedule(self) -> Schedule:
        """Published: for Wan dense above timestep 925 of 1000 and in the first block, in general in a quarter of the steps."""
        return Schedule(dense_above_sigma=0.925, dense_layers=1, min_dense_share=0.25)
