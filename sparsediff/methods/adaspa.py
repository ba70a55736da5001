"""AdaSpa: training-free sparse attention by online precise search (Xia et al., arXiv:2502.21079).

The softmax mass of every block is measured exactly, in the middle of the run: once beside a dense call, whose
log-sum-exp is kept, and later from the queries and keys and that log-sum-exp alone (section 4), or where it would be
too large to keep, from queries and keys.  Heads that keep nearly
all of their mass give budget to those that do not (section 3.4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsediff.budget import head_adaptive_top_k, row_top_k
from sparsediff.kernels.block_scores import block_mass
from sparsediff.methods.base import AttentionSite, SquareBlockMethod
from sparsediff.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class AdaSpa(SquareBlockMethod):
    """Exact block mass at a few search steps, the best blocks of every row, budgets that follow the heads' recall.

    Attributes:
        sparsity: share of the video's key blocks that a query block drops, in the mean over the heads.
        search: when to look, as shares of the steps; before the first all is dense, and so is the call that
            looks first.  (Published: steps 10 and 30 of 50.)
        head_adaptive: shift budget from heads of high recall to heads of low recall.
        recall_limit: how many heads take part: those that recall more than this share of their mass.
        block: tokens a block: 32, 64 (published) or 128; None takes 64 up to 16,384 tokens and 128 beyond.

    There is no public code.  Two slips of the paper's pseudo-code are mended (a logarithm for the exponential, a
    running maximum that starts at 1), and the budgets are clamped where the formula leaves [0, 1] or takes more than half
    of the heads.  The kept log-sum-exp is 2 bytes a token and head.  Where that would take the state of a clip over 160 MB (Wan 14B at
    720p: 480 MB), nothing is kept and the second search finds its own: exact mass of that moment, for 6 % of one dense
    call more.
    """

    name: ClassVar[str] = "adaspa"
    summary: ClassVar[str] = "exact block mass searched online at two steps, budgets by head"
    needs_video: ClassVar[str] = "ranks the blocks of frames and keeps all else"
    citation: ClassVar[str] = "arXiv:2502.21079"

    sparsity: float = 0.8
    search: tuple[float, ...] = (0.2, 0.6)
    head_adaptive: bool = True
    recall_limit: float = 0.8
    block: int | None = None

    def __post_init__(self) -> None:
        self._require("sparsity", float, lambda x: 0 <= x < 1, "a share in [0, 1)")
        self._require(
            "search",
            tuple,
            lambda x: (
                len(x) > 0
                and all(isinstance(t, int | float) and 0 <= t < 1 for t in x)
                and list(x) == sorted(set(x))
            ),
            "rising shares of the steps in [0, 1), such as (0.2, 0.6)",
        )
        self._require("head_adaptive", bool)
        self._require("recall_limit", float, lambda x: 0 <= x <= 1, "a share in [0, 1]")
        self._require_block()

    @property
    def needs_step_count(self) -> bool:
        """Later searches come at shares of the steps."""
        return len(self.search) > 1

    def refreshes(self, site: AttentionSite, last_refresh: int | None) -> bool:
        """At the first call that the schedule leaves to us, and at every later search step."""
        return last_refresh is None or site.passed(self.search[1:], last_refresh)

    def searches_dense(self, site: AttentionSite, last_refresh: int | None) -> bool:
        """Only the first search, which finds the log-sum-exp on the way."""
        return last_refresh is None

    def keeps_lse(self, site: AttentionSite) -> bool:
        """While a search is still to come."""
        return site.comes_before(self.search[1:])

    def keep_blocks(
        self, query: Tensor, key: Tensor, site: AttentionSite, *, lse: Tensor | None = None
    ) -> Tensor:
        """The heaviest blocks of each row of video; text columns are the caller's to add."""
        lse = None if lse is None else lse.float()
        size = self.block_size(site.grid)
        mass = block_mass(query, key, size, scale=site.scale, lse=lse, kv_lengths=site.kv_lengths)
        video, density = site.grid.whole_blocks(size[0]), 1.0 - self.sparsity
        visual = mass[..., video, video]
        keep = torch.zeros_like(mass, dtype=torch.bool)
        keep[..., video, video] = (
            head_adaptive_top_k(visual, density, limit=self.recall_limit)
            if self.head_adaptive
            else row_top_k(visual, density)
        )
        return keep

    def default_schedule(self) -> Schedule:
        """Dense before the first search."""
        return Schedule(dense_steps=float(self.search[0]))
