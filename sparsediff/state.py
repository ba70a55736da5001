"""The one mutable object of an enabled transformer, and the state machine that runs every method.

For each guidance branch and layer (the batch and the heads are dimensions of the mask):

    if schedule says dense:              dense attention, on the backend that the user chose
    elif the method refreshes here:      mask = forced | method.keep_blocks(q, k), in a dense call if it searches so
    elif the method votes:               mask = forced | vote of the previous call
    else:                                mask = mask
    out = undo(block_sparse_attention(order(q, k, v), mask))

State is dropped at the start of every generation, so two runs give what two processes would.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparsediff import adapter as adapters
from sparsediff.adapter import ModelAdapter
from sparsediff.attention_mask import MaskReader, Visible
from sparsediff.block_mask import BlockMask, forced_blocks
from sparsediff.calibration import Call
from sparsediff.clock import Clock, Tick
from sparsediff.eligibility import packing_of, why_not_sparse
from sparsediff.kernels.attention import CPU_BREAK_EVEN, run_backend, select_backend
from sparsediff.methods import AttentionSite, Method
from sparsediff.methods.base import uncalibrated
from sparsediff.processor import STATES
from sparsediff.recorder import Recorder
from sparsediff.schedule import UNKNOWN_STEPS, Schedule
from sparsediff.slot import Layout, MaskSlot, Slots
from sparsediff.timing import mark
from sparsediff.token_grid import TokenGrid, TokenOrder
from sparsediff.witness import Witness, WitnessedCall

# Dense attention of one call, below which a GPU waits for launches.  Measured on one H200: 1.8e11 operations (13,312
# tokens, 4 heads of 64) ran at half the speed of dense, 6.6e12 (32,760 tokens, 12 heads of 128) as fast as predicted.
LAUNCH_BOUND_FLOP = 1e12

NOT_CAUGHT = (
    "the layer's attention is not PyTorch's scaled_dot_product_attention, and could not be caught: leave "
    "attention_backend(...), or unset DIFFUSERS_ATTN_BACKEND"
)
NOT_SEEN = (
    "the layer made no call of scaled_dot_product_attention that could be caught: load the model with "
    "attn_implementation='sdpa' and call eval() on it"
)

Observer = Callable[[Call], Tensor]  # stands in for attention while something is measured

_keys = itertools.count()


@dataclass(frozen=True)
class _Forward:
    """One call of the transformer."""

    tick: Tick
    branch: str
    grid: TokenGrid | None
    problem: str | None  # why there is no grid
    device: torch.device
    started: object
    gradients: bool


class RunState:
    """State of one enabled transformer; `Handle` owns it, the attention operation finds it by number."""

    def __init__(
        self,
        *,
        name: str,
        model: nn.Module,
        adapter: ModelAdapter,
        method: Method,
        schedule: Schedule,
        clock: Clock,
        recorder: Recorder,
        observer: Observer | None = None,
    ) -> None:
        self.key = next(_keys)
        self.name = name
        self.adapter = adapter
        self.method = method
        # for caches that outlive this run: a calibration can be a gigabyte
        self._rules = uncalibrated(method)
        self.schedule = schedule
        self.clock = clock
        self.recorder = recorder
        self.observer = observer
        self.witness: Witness | None = None  # sees every call, changes none
        self.modules = adapter.attention_layers(model)
        self.layers = [f"{name}.{layer}" for layer, _, _ in self.modules]
        self.depths = [depth for _, _, depth in self.modules]
        # (guidance branch, step or None) while the pipeline is inside `model.cache_context`.
        self.context: tuple[str, int | None] | None = None
        self.wrappers: list = []
        self._slots = Slots(len(self.layers), method.name, recorder.warn)
        self._generation: int | None = None
        self._remembered: Mapping[str, object] = {}  # of the first call of the generation
        self._forward: _Forward | None = None
        self._calls_in_step: tuple[object, Counter] = (None, Counter())
        self._seen = Counter()  # how often each layer has come by in this forward
        # layers that ran their stock code in this forward, where that has to be caught; eager calls only
        self.entered: set[int] = set()
        self._linear_weights = adapter.linear_weights(model)
        self._masks = MaskReader()
        STATES[self.key] = self

    # -- events: eager Python, outside any compiled graph ---------------------------------------------------------

    def begin_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """The transformer is about to run."""
        self._masks.forget()  # of a forward that failed
        arguments = adapters.bind_forward(model, args, kwargs)
        branch, step = self.context or (None, None)
        tick = self.clock.read(
            self.adapter.timestep(arguments),
            branch=branch,
            step=step,
            who=self.key,
            context=self.adapter.context(arguments),
            rising=self.adapter.timesteps_rise,
        )
        if tick.generation != self._generation:
            self._generation = tick.generation
            self._remembered = self.adapter.remember(arguments)
            self._slots.clear()
            self._calls_in_step = (None, Counter())
        recorder = self.recorder
        recorder.begin_generation(tick.generation)
        recorder.sigmas[tick.step] = tick.sigma
        recorder.num_steps = tick.num_steps
        grid, problem = None, None
        try:
            grid = self.adapter.token_grid(model, {**arguments, **self._remembered})
            recorder.grid, recorder.tokens = str(grid), grid.num_tokens
        except ValueError as error:
            problem = str(error)
        if grid is not None and (used := getattr(self.method, "calibration", None)) is not None:
            used.check_grid(grid)
        # Not the weights' device: under offloading they are still on the CPU here.
        device = next(x.device for x in arguments.values() if isinstance(x, Tensor))
        self._seen, self.entered = Counter(), set()
        self._forward = _Forward(
            tick=tick,
            branch=self._branch(tick, branch),
            grid=grid,
            problem=problem,
            device=device,
            started=mark(device),
            gradients=torch.is_grad_enabled(),
        )
        for (_, module, _), wrapper, layer in zip(
            self.modules, self.wrappers, self.layers, strict=True
        ):
            if not wrapper.in_place(module):
                recorder.dense(
                    layer,
                    tick.step,
                    f"the attention {wrapper.place} was replaced after enable()",
                    warn=True,
                )

    def end_forward(self) -> None:
        """The transformer has run."""
        forward, self._forward = self._forward, None
        if forward is None:
            return
        everything = set(range(len(self.layers)))
        if forward.gradients:
            # Calls that need gradients never reach `attend`; what did not come by took the stock path.
            self._record_unseen(everything, forward, "gradients are on")
        elif self.adapter.modality == "text":
            # No cache leaves layers out here: what did not come by ran unseen.
            self._record_unseen(everything, forward, NOT_SEEN)
        else:
            self._record_unseen(self.entered, forward, NOT_CAUGHT)
        self._masks.forget()
        self.recorder.span(forward.tick.step, forward.started, mark(forward.device))

    def _record_unseen(self, layers: set[int], forward: _Forward, reason: str) -> None:
        for index in sorted(layers - self._seen.keys()):
            self.recorder.dense(self.layers[index], forward.tick.step, reason, warn=True)

    def release(self) -> None:
        """Let go of the model and the masks; what was recorded stays."""
        self.modules, self.wrappers = [], []
        self._slots.clear()
        self._forward, self._masks = None, MaskReader()
        STATES.pop(self.key, None)

    def _branch(self, tick: Tick, name: str | None) -> str:
        """The guidance branch by the pipeline's name for it, else by its place in the step.

        A pipeline that names no branches, or one name for several calls, still makes them in the same order in every
        step.
        """
        if self.adapter.modality == "text":
            return "text"  # there is no guidance
        moment = (tick.generation, tick.step)
        if self._calls_in_step[0] != moment:
            self._calls_in_step = (moment, Counter())
        calls = self._calls_in_step[1]
        calls[name] += 1
        if name is None:
            return f"call {calls[name]}"
        return name if calls[name] == 1 else f"{name} {calls[name]}"

    # -- one attention call: eager Python, also under torch.compile -----------------------------------------------

    def attend(
        self,
        index: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        scale: float | None,
        is_causal: bool,
        enable_gqa: bool,
    ) -> Tensor:
        """Attention of layer `index`; `[B, S, H, D]` in and out."""
        self._seen[index] += 1
        call = {"attn_mask": attn_mask, "is_causal": is_causal, "enable_gqa": enable_gqa}

        def dense() -> Tensor:
            return self.wrappers[index].dense(query, key, value, scale=scale, **call)

        reason, warn = self._dense_reason(index, query, key, value, **call), True
        if reason is None:
            visible = self._visible(self._grid(index, query), attn_mask, key)
            reason = visible if isinstance(visible, str) else None
        if reason is None:
            site = replace(self._site(index, query, scale), visible=visible.blocks)
            reason = self.schedule.dense_reason(site)
            warn = reason == UNKNOWN_STEPS
            choosing = reason is None or self._looks_ahead(site)
            if choosing or self.observer is not None:
                packing = packing_of(self.adapter, site.grid, attn_mask, len(query))
                site = replace(site, grid=packing.grid, kv_lengths=packing.lengths)
                seen = (x[:, : visible.keys] for x in (key, value))
                packed = packing.pack(query, *seen)
                if self.observer is not None:
                    if not choosing:
                        self._record_dense(index, reason, warn=warn)
                        if self.witness is not None:
                            self._show(index, *packed[:2], scale, site.grid, dense_reason=reason)
                    out = self._observe(
                        index, site, *packed, lambda: packing.pack(dense())[0], reason, choosing
                    )
                    return packing.unpack(out)
                out, why = self._attend(index, site, *packed, reason)
                if out is not None:
                    return packing.unpack(out)
                reason, warn = why, True
        self._record_dense(index, reason, warn=warn)
        if self.witness is not None:
            grid = self._grid(index, query) if self._forward and self._forward.grid else None
            self._show(index, query, key, scale, grid, dense_reason=reason)
        return dense()

    def _observe(
        self,
        index: int,
        site: AttentionSite,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dense: Callable[[], Tensor],
        reason: str | None,
        choosing: bool,
    ) -> Tensor:
        """What the observer makes of a call; `reason` says why the schedule has it dense."""

        def sparse() -> tuple[Tensor, bool]:
            out, why = self._attend(index, site, query, key, value, reason)
            if out is None:
                self._record_dense(index, why, warn=True)
                if self.witness is not None:
                    self._show(index, query, key, site.scale, site.grid, dense_reason=why)
                out = dense()
            return out, self.recorder.calls[-1].density is not None

        return self.observer(Call(site, query, key, value, dense, sparse if choosing else None))

    def _record_dense(self, index: int, reason: str, *, warn: bool) -> None:
        step = self._forward.tick.step if self._forward else 0
        self.recorder.dense(self.layers[index], step, reason, warn=warn)

    def _show(
        self,
        index: int,
        query: Tensor,
        key: Tensor,
        scale: float | None,
        grid: TokenGrid | None = None,
        **seen: object,
    ) -> None:
        """Tell the witness of a call; `seen` are the fields of `WitnessedCall` that only some calls have."""
        forward = self._forward
        tick = forward.tick if forward else None
        grid = grid or (forward.grid if forward else None)
        self.witness(
            WitnessedCall(
                generation=tick.generation if tick else None,
                layer=self.layers[index],
                step=tick.step if tick else 0,
                num_steps=tick.num_steps if tick else None,
                sigma=tick.sigma if tick else None,
                branch=forward.branch if forward else "",
                grid=grid,
                block_size=self.method.block_size(grid) if grid else None,
                query=query,
                key=key,
                scale=scale,
                **{"dense_reason": None, **seen},
            )
        )

    def _dense_reason(self, index: int, *tensors: Tensor, **call: object) -> str | None:
        """Why the method cannot even be asked."""
        forward = self._forward
        if forward is None:
            return "called outside the transformer's forward"
        if forward.grid is None:
            return forward.problem
        grid = self._grid(index, tensors[0])
        return why_not_sparse(self.adapter, self.method, grid, *tensors, **call)

    def _visible(self, grid: TokenGrid, attn_mask: Tensor | None, key: Tensor) -> Visible | str:
        """What the model's own mask shows of the keys, or why that cannot be served."""
        visible = Visible(keys=key.shape[1])
        if attn_mask is not None and self.adapter.reads_masks:
            visible = self._masks.read(attn_mask, self.method.block_size(grid))
        if not isinstance(visible, str) and visible.keys != grid.num_tokens:
            return f"{visible.keys} keys, where the grid {grid} has {grid.num_tokens}"
        return visible

    def _looks_ahead(self, site: AttentionSite) -> bool:
        """Whether this is the last dense call of its layer and the method wants to choose blocks in it."""
        following = site.next_step() if self.method.looks_ahead else None
        return following is not None and self.schedule.dense_reason(following) is None

    def _grid(self, index: int, query: Tensor) -> TokenGrid:
        """Of one attention call: some layers see the grid alone, or the words of one sample."""
        return self.adapter.call_grid(self._forward.grid, self.modules[index][0], query.shape[1])

    def _site(self, index: int, query: Tensor, scale: float | None) -> AttentionSite:
        forward, sample = self._forward, self._seen[index]
        return AttentionSite(
            layer=self.depths[index],
            num_layers=max(self.depths) + 1,
            step=forward.tick.step,
            num_steps=forward.tick.num_steps,
            sigma=forward.tick.sigma,
            # A model that attends sample by sample comes by several times; each has a mask of its own.
            branch=forward.branch if sample == 1 else f"{forward.branch}, sample {sample}",
            grid=self._grid(index, query),
            next_sigma=forward.tick.next_sigma,
            scale=scale,
            name=self.layers[index],
        )

    def _attend(
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
        if query.shape[2] != key.shape[2]:
            # Blocks are chosen by query head, and a kernel walks the keys of one head each.
            group = query.shape[2] // key.shape[2]
            key, value = (x.repeat_interleave(group, dim=2) for x in (key, value))
        backend = _backend_for(
            query.device.type, query.dtype, query.shape[-1], block_size, method.backend
        )
        if backend.name == "reference":
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
            out = self._search(slot, site, query, key, value, order, backend.name)
            reason = dense_reason or "search: blocks are chosen from exact attention"
            self._record_dense(index, reason, warn=False)
            if self.witness is not None:
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
        part, device = self.recorder.part, query.device
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
                keep = method.keep_blocks(q, k, site, lse=slot.lse)
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
            and self.observer is None  # who measures wants to see what the method does
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
        if self.witness is not None:
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
        backend: str,
    ) -> Tensor:
        """Dense attention, whose log-sum-exp makes the block mass that blocks are chosen by half as dear."""
        method, grid, lengths = self.method, site.grid, (query.shape[1], key.shape[1])
        block_size = method.block_size(grid)
        everything = _everything(block_size, lengths, query.device)
        if site.visible is not None:
            everything = BlockMask.from_dense(site.visible, block_size, lengths)
        result = run_backend(
            backend,
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
                with self.recorder.part("mask", query.device):
                    slot.heads = method.choose_windows(query, key, site, lse)
            q, k = order.apply(grid, query, key, heads=slot.heads)
            lse = order.apply_rows(grid, lse, slot.heads)
        forced = _forced(self._rules, grid, q.device, order is not None)
        with self.recorder.part("mask", query.device):
            keep = method.keep_blocks(q, k, site, lse=lse)
            slot.store(keep, forced, block_size, lengths, want_mask=False)
        slot.refreshed_at = site.step
        keeps_lse = method.keeps_lse(site) and self._slots.has_room_for_lse(slot.layout)
        slot.lse = lse.half() if keeps_lse else None
        return result.out

    @staticmethod
    def _undo(order: TokenOrder | None, slot: MaskSlot, grid: TokenGrid, out: Tensor) -> Tensor:
        return out if order is None else order.undo(grid, out, heads=slot.heads)[0]

    def _record(
        self, index: int, site: AttentionSite, query: Tensor, density: Tensor, backend
    ) -> None:
        recorder = self.recorder
        recorder.sparse(self.layers[index], site.step, density)
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
            attention *= len(self.layers)
            recorder.attention_share = attention / (attention + 2 * tokens * self._linear_weights)

    def state_bytes(self) -> int:
        """Memory held between steps."""
        return self._slots.nbytes


@functools.lru_cache(maxsize=64)
def _backend_for(
    device: str, dtype: torch.dtype, head_dim: int, block_size: tuple[int, int], name: str
):
    return select_backend(torch.device(device), dtype, head_dim, block_size, name)


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
