"""Every choice that the published methods make, one by one.

A method is a dense prefix, a moment to look, a score for every block, a budget, an order of the tokens and a rule for
the steps between two looks; the six papers are six points of this space, and the best point need not be one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from sparsediff.budget import (
    above_bar,
    head_adaptive_top_k,
    head_percentile,
    layer_percentile,
    recall,
    row_top_k,
    row_top_p,
)
from sparsediff.kernels.block_scores import block_mass, pooled_scores
from sparsediff.methods.base import AttentionSite, SquareBlockMethod
from sparsediff.schedule import Schedule
from sparsediff.token_grid import TokenOrder, Window

Producer = Literal["mass", "pooled"]
Budget = Literal[
    "row_top_k",
    "row_top_p",
    "head_adaptive",
    "head_percentile",
    "layer_percentile",
    "model_percentile",
]
SPEND: dict[Budget, Callable[[Tensor, float], Tensor]] = {
    "row_top_k": row_top_k,
    "row_top_p": row_top_p,
    "head_adaptive": head_adaptive_top_k,
    "head_percentile": head_percentile,
    "layer_percentile": layer_percentile,
    "model_percentile": layer_percentile,  # where nobody has sampled
}
SAMPLED_BLOCKS = 32  # query blocks of each head that a window is judged by
STRIDES = (1, 2, 4)
ROWS, LEAST_ROWS = 64, 32  # of a block that are looked at unless told otherwise, and at least
COUNTED_BLOCKS = 8  # query blocks of each head that are counted for a budget of all layers


@dataclass(frozen=True, kw_only=True)
class Custom(SquareBlockMethod):
    """A hybrid put together from the parts of the published methods.

    Attributes:
        density: share of key blocks kept: of a row of blocks, of a head, of a layer or of all layers, as the budget has
            it; for `row_top_p` the share of the softmax mass.
        producer: what scores a block: its exact softmax mass (`"mass"`: AdaSpa, SparseD) or the attention between
            pooled queries and keys (`"pooled"`: DraftAttention).
        budget: `"row_top_k"` (AdaSpa, SparseD), `"row_top_p"`, `"head_adaptive"` (AdaSpa), or the best blocks wherever
            they lie: in a head (`"head_percentile"`, DraftAttention), in all heads of a layer (`"layer_percentile"`) or
            in all layers (`"model_percentile"`).  The last samples scores one step before blocks are chosen; where
            there are none (the first step of a run or of a second expert chooses, a modular pipeline or a bare transformer
            does not tell its noise levels, batch or size have changed since), each layer has its own budget.
        row_share: of a budget that rows share (`..._percentile`), the share that every row of blocks has to itself; with the
            others a row has all of its budget to itself anyway.
        stride: find mass by every so many-th query token (1, 2 or 4), at least 32 of a block: 2 halves the time that
            choosing takes.  None looks at 64 of a block.  With pooled scores only windows are chosen by mass.
        windows: which tokens share a block: `()` keeps the sequence, one window serves all heads, of several each head
            takes the one under which it keeps the most mass.  A window is `(frames, height, width)` or an order of
            the axes such as `"HWF"`.
        block: tokens a block: 32, 64 or 128; None takes 64 up to 16,384 tokens and 128 beyond.
        refresh: when blocks are chosen again after the first time: None (never), every so many steps (int), or at
            shares of the steps (tuple).
        search: how the first choice is made: `"ahead"` (in the last dense step of the schedule; where that is not
            known, as `"sparse"`), `"dense"` (in a dense call of its own) or `"sparse"` (in the call that uses it).
        vote_threshold_log2: between choices, thin the mask by LiteAttention's vote; log2 units below 0, None for not at all.
    """

    name: ClassVar[str] = "custom"
    summary: ClassVar[str] = "a hybrid of your own from the parts of the published methods"
    needs_video: ClassVar[str] = "ranks the blocks of frames and keeps all else"
    citation: ClassVar[str] = "this library"

    density: float = 0.3
    producer: Producer = "mass"
    budget: Budget = "row_top_k"
    row_share: float = 0.0
    stride: int | None = 1
    windows: tuple[Window, ...] = ()
    block: int | None = None
    refresh: int | tuple[float, ...] | None = None
    search: Literal["ahead", "dense", "sparse"] = "ahead"
    vote_threshold_log2: float | None = None

    def __post_init__(self) -> None:
        self._require("density", float, lambda x: 0 < x <= 1, "a share in (0, 1]")
        for name, kinds in {
            "producer": get_args(Producer),
            "budget": get_args(Budget),
            "search": ("ahead", "dense", "sparse"),
        }.items():
            self._require(name, str, lambda x, k=kinds: x in k, f"one of {', '.join(kinds)}")
        self._require("row_share", float, lambda x: 0 <= x <= 1, "a share in [0, 1]")
        if self.stride is not None:
            self._require("stride", int, lambda x: x in STRIDES, "1, 2, 4 or None")
        self._require_block()
        self._require_windows()
        if isinstance(self.refresh, tuple):
            self._require(
                "refresh",
                tuple,
                lambda x: all(isinstance(t, int | float) and 0 <= t < 1 for t in x),
                "None, a number of steps, or shares of the steps in [0, 1)",
            )
        elif self.refresh is not None:
            self._require(
                "refresh", int, lambda x: x >= 1, "None, a number of steps >= 1, or shares"
            )
        if self.vote_threshold_log2 is not None:
            self._require("vote_threshold_log2", float, lambda x: x < 0, "None or below 0")

    def _require_windows(self) -> None:
        self._require("windows", tuple, what="a tuple of windows")
        if self.windows:
            TokenOrder(self.windows)  # refuses what is no window

    @property
    def looks_ahead(self) -> bool:
        """Whether the schedule's last dense step is where blocks are chosen."""
        return self.search == "ahead"

    @property
    def needs_step_count(self) -> bool:
        """Refreshing at shares of the steps does."""
        return isinstance(self.refresh, tuple) and len(self.refresh) > 0

    def order(self, site: AttentionSite) -> TokenOrder | None:
        """The windows, if there are any."""
        return TokenOrder(self.windows) if self.windows else None

    def choose_windows(
        self, query: Tensor, key: Tensor, site: AttentionSite, lse: Tensor | None
    ) -> Tensor:
        """The window under which a head's best blocks hold the most mass, judged by a sample of its query blocks."""
        return self._best_windows(query, key, site, lse, SAMPLED_BLOCKS)

    def _best_windows(
        self, query: Tensor, key: Tensor, site: AttentionSite, lse: Tensor | None, count: int
    ) -> Tensor:
        order, block = self.order(site), self.block_size(site.grid)[0]
        shares = []
        for window in order.windows:
            alone = TokenOrder((window,))
            q, k = alone.apply(site.grid, query, key)
            blocks = q.shape[1] // block
            sample = _spread(0, blocks, count)
            q = _rows_of(q, sample, block)
            rows = None
            if lse is not None:
                rows = alone.apply_rows(site.grid, lse)[..., : blocks * block]
                rows = rows.unflatten(-1, (blocks, block))[..., sample, :].flatten(-2)
            mass = self._mass(q, k, site, rows)
            shares.append(recall(mass, row_top_k(mass, min(self.density, 0.5))))
        # Each clip for itself: what a prompt gives must not depend on what it is generated beside.
        return torch.stack(shares).argmax(0).to(torch.int32)

    @property
    def shared_density(self) -> float | None:
        """`density`, if the budget is the model's."""
        return self.density if self.budget == "model_percentile" else None

    def sample_scores(self, query: Tensor, key: Tensor, site: AttentionSite) -> tuple[Tensor, int]:
        """The scores of a few rows of blocks of every head, under the windows that these heads would take by them."""
        order, (block, _) = self.order(site), self.block_size(site.grid)
        if order is not None:
            heads = None
            if order.chosen_at_run_time:
                # Judged by no more rows than are counted: at short lengths it would cost more than the choice itself.
                heads = self._best_windows(query, key, site, None, COUNTED_BLOCKS)
            query, key = order.apply(site.grid, query, key, heads=heads)
        video = site.grid.whole_blocks(block, reordered=order is not None)
        whole = min(video.stop, query.shape[1] // block)
        if whole <= video.start:
            return query.new_zeros(len(query), 0, dtype=torch.float32), 1
        sample = _spread(video.start, whole, COUNTED_BLOCKS)
        scores = self._scores(_rows_of(query, sample, block), key, site, video)
        return self._with_own(scores).flatten(1), sample.step

    def refreshes(self, site: AttentionSite, last_refresh: int | None) -> bool:
        """The first time, and as `refresh` says."""
        if last_refresh is None:
            return True
        if isinstance(self.refresh, tuple):
            return site.passed(self.refresh, last_refresh)
        return self.refresh is not None and site.step - last_refresh >= self.refresh

    def searches_dense(self, site: AttentionSite, last_refresh: int | None) -> bool:
        """The first time, if told so; later choices are made in the call that uses them."""
        return self.search == "dense" and last_refresh is None

    def vote_threshold(self, site: AttentionSite) -> float | None:
        """As configured, at every step."""
        return self.vote_threshold_log2

    def keep_blocks(
        self, query: Tensor, key: Tensor, site: AttentionSite, *, lse: Tensor | None = None
    ) -> Tensor:
        """Score, then budget, over the blocks of the grid; all that touches other tokens is the caller's to add."""
        size = self.block_size(site.grid)
        video = site.grid.whole_blocks(size[0], reordered=self.order(site) is not None)
        scores = self._scores(query, key, site, video, lse=lse)
        blocks = (-(-x.shape[1] // n) for x, n in zip((query, key), size, strict=True))
        keep = scores.new_zeros(*scores.shape[:2], *blocks, dtype=torch.bool)
        keep[..., video, video] = self._spend(scores[..., video, :], site.score_bar)
        return keep

    def _scores(
        self,
        query: Tensor,
        key: Tensor,
        site: AttentionSite,
        columns: slice,
        *,
        lse: Tensor | None = None,
    ) -> Tensor:
        """What the key blocks `columns` score in every row of blocks, as share of the row: `float32 [B, H, Mq, n]`."""
        size, lengths = self.block_size(site.grid), site.kv_lengths
        if self.producer == "pooled":
            logits = pooled_scores(query, key, size, scale=site.scale, kv_lengths=lengths)
            return logits[..., columns].softmax(-1)
        mass = self._mass(query, key, site, lse)
        step = self._step(size[0])
        rows = size[0] // step
        if ragged := -(-query.shape[1] // step) % rows:
            mass[..., -1, :] *= rows / ragged
        return mass.div_(rows)[..., columns]

    def _mass(self, query: Tensor, key: Tensor, site: AttentionSite, lse: Tensor | None) -> Tensor:
        """Exact softmax mass of every block, by the query tokens that count."""
        rows, columns = self.block_size(site.grid)
        step = self._step(rows)
        if step > 1:
            query, lse = query[:, ::step], None if lse is None else lse[..., ::step].contiguous()
        return block_mass(
            query,
            key,
            (rows // step, columns),
            scale=site.scale,
            lse=lse,
            kv_lengths=site.kv_lengths,
        )

    def _step(self, block: int) -> int:
        stride = max(1, block // ROWS) if self.stride is None else self.stride
        return min(stride, block // LEAST_ROWS)

    def _with_own(self, scores: Tensor) -> Tensor:
        """The scores, of a budget that rows share those infinite that their row keeps whatever others score."""
        if self.row_share == 0 or not self.budget.endswith("_percentile"):
            return scores
        own = row_top_k(scores, self.row_share * self.density)
        return scores.masked_fill(own, torch.inf)

    def _spend(self, scores: Tensor, bar: Tensor | None) -> Tensor:
        scores = self._with_own(scores)
        if self.budget == "model_percentile" and bar is not None:
            return above_bar(scores, bar[:, None])
        return SPEND[self.budget](scores, self.density)

    def default_schedule(self) -> Schedule:
        """Dense above noise level 0.95, and 15 % of the steps at least.

        Noise alone gives 14 % of the steps at a flow shift of 3, 20 % at 5, the first of 4 with a LoRA, 10 to 16 % of
        CogVideoX's under DDIM or DPM, and none where a scheduler starts below (Stable Diffusion's: at 0.94).
        """
        return Schedule(dense_above_sigma=0.95, min_dense_share=0.15)


def _spread(start: int, stop: int, count: int) -> slice:
    """At least `count` places between, evenly spaced; all if there are fewer."""
    step = max(1, (stop - start) // count)
    return slice(start + step // 2, stop, step)


def _rows_of(query: Tensor, blocks: slice, block: int) -> Tensor:
    """The tokens of some whole blocks: `[B, n, H, D]`."""
    whole = query.shape[1] // block
    return query[:, : whole * block].unflatten(1, (whole, block))[:, blocks].flatten(1, 2)
