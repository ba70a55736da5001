"""One call of attention in which a method has its say: choosing blocks, remembering them, running a kernel over them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sparsediff.block_mask import BlockMask, forced_blocks
from sparsediff.kernels.attention import (
    CPU_BREAK_EVEN,
    BackendChoice,
    run_backend,
    select_backend,
)
from sparsediff.methods import AttentionSite, Method
from sparsediff.methods.base import uncalibrated
from sparsediff.recorder import Recorder
from sparsediff.shared_budget import ScoreCounts
from sparsediff.slot import Layout, MaskSlot, Slots
from sparsediff.token_grid import TokenGrid, TokenOrder

# Dense attention of one call, below which a GPU waits for launches.  Measured on one H200: 1.8e11 operations (13,312
# tokens, 4 heads of 64) ran at half the speed of dense, 6.6e12 (32,760 tokens, 12 heads of 128) as fast as predicted.
LAUNCH_BOUND_FLOP = 1e12
# Whose budget blocks are chosen by, as the report says it.
SHARED = "one for all layers"
ALONE = "one for each layer (no step came before in which scores of these tokens were sampled)"


class BlockAttention:
    """Attention of all layers of one transformer by one method.

    Args:
        method: what chooses blocks.
        slots: what is remembered of each layer.
        layers: their names.
        linear_weights: numbers in the linear layers of one of them, for the share of attention in the work.
        recorder: is told what every call kept.
        show: is told every call that another part of the library may want to look at.
        always_sparse: run the kernel where dense attention would be faster too: somebody is measuring its errors.
    """

    def __init__(
        self,
        *,
        method: Method,
        slots: Slots,
        layers: Sequence[str],
        linear_weights: int,
        recorder: Recorder,
        show: Callable[..., None],
        always_sparse: bool,
    ) -> None:
        self.method = method
        # for caches that outlive this run: a calibration can be a gigabyte
        self._rules = uncalibrated(method)
        self._slots = slots
        self._layers = layers
        self._linear_weights = linear_weights
        self._recorder = recorder
        self._show = show
        self._always_sparse = always_sparse
        self._counts = ScoreCounts()

    def forget(self) -> None:
        """Drop what is remembered: a new generation."""
        self._slots.clear()
        self._counts.clear()

    def refreshed_at(self, index: int, branch: str) -> int | None:
        """The step at which the blocks of a layer were chosen last in this generation."""
        slot = self._slots.known(branch, index)
        return None if slot is None else slot.refreshed_at

    def sample(self, site: AttentionSite, query: Tensor, key: Tensor) -> None:
        """Count what blocks score here, for choices of the next step that all layers share a budget in."""
        if self._backend(query, site.grid).name == "reference":
            return  # nothing will be chosen
        (key,) = _for_each_head(query, key)
        with self._recorder.part("mask", query.device):
            scores, rows = self.method.sample_scores(query, key, site)
            self._counts.add(site, scores, rows=rows)

    def run(
        self,
        index: int,
        site: AttentionSite,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dense_reason: str | None,
    ) -> tuple[Tensor | None, str | None]:
        """The output by our kernel, or why this call is better (or only) done dense by another.

        With a `dense_reason` the call is dense whatever the method says, and only chooses blocks for the next.
        """
        method, grid, lengths = self.method, site.grid, (query.shape[1], key.shape[1])
        block_size = method.block_size(grid)
        key, value = _for_each_head(query, key, value)
        backend = self._backend(query, grid)
        if backend.name == "reference":  # then it is with votes, too
            return None, f"no fast kernel: {backend.reason}"
        order = method.order(site)
        layout = Layout(
            grid=grid,
            block_size=block_size,
            order=order,
            batch=query.shape[0],
            heads=query.shape[2],
            device=query.device,
        )
        wants_lse = method.keeps_lse(site)
        slot = self._slots.slot(site.branch, index, layout, site.visible, wants_lse=wants_lse)
        choosing = method.refreshes(site, slot.refreshed_at)
        if dense_reason is not None or (
            choosing and method.searches_dense(site, slot.refreshed_at)
        ):
            out = self._search(slot, site, query, key, value, order)
            reason = dense_reason or "search: blocks are chosen from exact attention"
            self._recorder.dense(self._layers[index], site.step, reason, warn=False)
            self._show(
                index,
                query,
                key,
                site.scale,
                grid,
                kv_lengths=site.kv_lengths,
                dense_reason=reason,
            )
            return out, None
        part, device = self._recorder.part, query.device
        # Padding is hidden behind a length, which kernels take with ascending lists only.
        visits = "descending" if site.kv_lengths is not None else method.visits(site)
        threshold = method.vote_threshold(site)
        forced = _forced(self._rules, grid, device, order is not None)
        q, k, v, mask = query, key, value, None
        if choosing:
            if order is not None:
                if order.chosen_at_run_time:
                    with part("mask", device):
                        slot.heads = method.choose_windows(query, key, site, None)
                q, k = order.apply(grid, query, key, heads=slot.heads)
            with part("mask", device):
                keep = self._keep_blocks(q, k, site, slot.lse)
                mask = slot.store(
                    keep, forced, block_size, lengths, want_mask=visits == "descending"
                )
                slot.refreshed_at = site.step
            if not wants_lse:
                slot.lse = None
        # On the CPU reading the density costs nothing, and above break-even the exact result is also the faster one:
        # before the tokens that need not be moved have been.
        if (
            threshold is None
            and not self._always_sparse
            and device.type == "cpu"
            and slot.density.mean() > CPU_BREAK_EVEN
        ):
            return (
                None,
                f"mask density above {CPU_BREAK_EVEN}, where dense attention is faster on a CPU",
            )
        if order is not None and choosing:
            (v,) = order.apply(grid, value, heads=slot.heads)
        elif order is not None:
            q, k, v = order.apply(grid, query, key, value, heads=slot.heads)
        if mask is None or visits != "descending":
            with part("mask", device):
                mask = slot.mask(block_size, lengths, visits)
        self._show(
            index,
            q,
            k,
            site.scale,
            grid,
            kv_lengths=site.kv_lengths,
            bitmap=slot.bitmap,
            order=order,
            windows=slot.heads,
        )
        density = slot.density
        backend = self._backend(query, grid, votes=threshold is not None)
        result = run_backend(
            backend.name,
            q,
            k,
            v,
            mask,
            scale=_scale(site, query),
            kv_lengths=site.kv_lengths,
            vote_threshold=threshold,
        )
        if threshold is not None:
            # A vote names only blocks that were visited: with what is forced it is the next mask.
            with part("mask", device):
                slot.store(result.vote, forced, block_size, lengths, want_mask=False)
        self._record(index, site, query, density, backend)
        # The reordered copies make room for the output in its own order.
        del q, k, v
        return self._undo(order, slot, grid, result.out), None

    def _search(
        self,
        slot: MaskSlot,
        site: AttentionSite,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        order: TokenOrder | None,
    ) -> Tensor:
        """Dense attention, whose log-sum-exp makes the block mass that blocks are chosen by half as dear."""
        method, grid, lengths = self.method, site.grid, (query.shape[1], key.shape[1])
        block_size = method.block_size(grid)
        everything = _everything(block_size, lengths, query.device)
        if site.visible is not None:
            everything = BlockMask.from_dense(site.visible, block_size, lengths)
        result = run_backend(
            self._backend(query, grid).name,
            query,
            key,
            value,
            everything,
            scale=_scale(site, query),
            kv_lengths=site.kv_lengths,
            want_lse=True,
        )
        q, k, lse = query, key, result.lse
        if order is not None:
            if order.chosen_at_run_time:
                with self._recorder.part("mask", query.device):
                    slot.heads = method.choose_windows(query, key, site, lse)
            q, k = order.apply(grid, query, key, heads=slot.heads)
            lse = order.apply_rows(grid, lse, slot.heads)
        forced = _forced(self._rules, grid, q.device, order is not None)
        with self._recorder.part("mask", query.device):
            keep = self._keep_blocks(q, k, site, lse)
            slot.store(keep, forced, block_size, lengths, want_mask=False)
        slot.refreshed_at = site.step
        keeps_lse = method.keeps_lse(site) and self._slots.has_room_for_lse(slot.layout)
        slot.lse = lse.half() if keeps_lse else None
        return result.out

    def _backend(self, query: Tensor, grid: TokenGrid, *, votes: bool = False) -> BackendChoice:
        return _backend_for(
            query.device.type,
            query.dtype,
            query.shape[-1],
            self.method.block_size(grid),
            self.method.backend,
            votes,
        )

    def _keep_blocks(
        self, query: Tensor, key: Tensor, site: AttentionSite, lse: Tensor | None
    ) -> Tensor:
        density = self.method.shared_density
        if density is not None:
            bar = self._counts.bar(site, len(query), density)
            self._recorder.budgets[SHARED if bar is not None else ALONE] += 1
            site = replace(site, score_bar=bar)
        return self.method.keep_blocks(query, key, site, lse=lse)

    @staticmethod
    def _undo(order: TokenOrder | None, slot: MaskSlot, grid: TokenGrid, out: Tensor) -> Tensor:
        return out if order is None else order.undo(grid, out, heads=slot.heads)[0]

    def _record(
        self,
        index: int,
        site: AttentionSite,
        query: Tensor,
        density: Tensor,
        backend: BackendChoice,
    ) -> None:
        recorder = self._recorder
        recorder.sparse(self._layers[index], site.step, density)
        recorder.backends.setdefault(backend.name, backend.reason)
        if recorder.attention_share is None:
            tokens, width = query.shape[1], query.shape[2] * query.shape[3]
            attention = 4 * tokens * site.grid.num_tokens * width
            if query.device.type == "cuda" and query.shape[0] * attention < LAUNCH_BOUND_FLOP:
                recorder.warn(
                    f"{tokens} tokens in {query.shape[2]} heads are too little work for a GPU: launching kernels takes "
                    "longer than running them, and sparse attention will not make this run faster"
                )
                return
            attention *= len(self._layers)
            recorder.attention_share = attention / (attention + 2 * tokens * self._linear_weights)


@functools.lru_cache(maxsize=64)
def _backend_for(
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    block_size: tuple[int, int],
    name: str,
    votes: bool,
) -> BackendChoice:
    return select_backend(torch.device(device), dtype, head_dim, block_size, name, byproducts=votes)


def _for_each_head(query: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Keys and values for every query head: blocks are chosen by query head, and a kernel walks the keys of one each."""
    group = query.shape[2] // tensors[0].shape[2]
    return tensors if group == 1 else tuple(x.repeat_interleave(group, dim=2) for x in tensors)


@functools.lru_cache(maxsize=8)
def _everything(
    block_size: tuple[int, int], lengths: tuple[int, int], device: torch.device
) -> BlockMask:
    return BlockMask.full(block_size, lengths, device=device)


def _scale(site: AttentionSite, query: Tensor) -> float:
    return query.shape[-1] ** -0.5 if site.scale is None else site.scale


@functools.lru_cache(maxsize=32)
def _forced(method: Method, grid: TokenGrid, device: torch.device, reordered: bool) -> Tensor:
    """What stays whatever the method chooses, `bool [Mq, Nk]`."""
    keep = forced_blocks(grid, method.block_size(grid), device=device, reordered=reordered)
    own = method.always(grid)
    keep = keep if own is None else keep | own.to(device)
    # Who asks comes last, in blocks of its own; what is forced for one is forced for all.
    return keep[: -(-grid.num_queries // method.block_size(grid)[0])]
