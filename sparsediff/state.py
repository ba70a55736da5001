"""The one mutable object of an enabled transformer, and the state machine that runs every method.

For each guidance branch and layer (the batch and the heads are dimensions of the mask):

    if schedule says dense:              dense attention, on the backend that the user chose
    elif the method refreshes here:      mask = forced | method.keep_blocks(q, k), in a dense call if it searches so
    elif the method votes:               mask = forced | vote of the previous call
    else:                                mask = mask
    out = undo(block_sparse_attention(order(q, k, v), mask))

Where all layers share a budget, the call before one that refreshes samples scores, dense or sparse as it is.  State is
dropped at the start of every generation, so two runs give what two processes would.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparsediff import adapter as adapters
from sparsediff.adapter import ModelAdapter
from sparsediff.attention_mask import MaskReader, Visible
from sparsediff.block_attention import BlockAttention
from sparsediff.calibration import Call
from sparsediff.clock import Clock, Tick
from sparsediff.eligibility import packing_of, why_not_sparse
from sparsediff.methods import AttentionSite, Method
from sparsediff.processor import STATES
from sparsediff.recorder import Recorder
from sparsediff.schedule import UNKNOWN_STEPS, Schedule
from sparsediff.slot import Slots
from sparsediff.timing import mark
from sparsediff.token_grid import TokenGrid
from sparsediff.witness import Witness, WitnessedCall

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
        self._blocks = BlockAttention(
            method=method,
            slots=self._slots,
            layers=self.layers,
            linear_weights=adapter.linear_weights(model),
            recorder=recorder,
            show=self._show,
            always_sparse=observer is not None,
        )
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
            self._blocks.forget()
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
        self._blocks.forget()
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
            sampling = self.method.shared_density is not None and self._precedes_choice(index, site)
            if choosing or sampling or self.observer is not None:
                packing = packing_of(self.adapter, site.grid, attn_mask, len(query))
                site = replace(site, grid=packing.grid, kv_lengths=packing.lengths)
                seen = (x[:, : visible.keys] for x in (key, value))
                packed = packing.pack(query, *seen)
                if sampling:
                    self._blocks.sample(site, *packed[:2])
                if self.observer is not None:
                    if not choosing:
                        self._record_dense(index, reason, warn=warn)
                        self._show(index, *packed[:2], scale, site.grid, dense_reason=reason)
                    out = self._observe(
                        index, site, *packed, lambda: packing.pack(dense())[0], reason, choosing
                    )
                    return packing.unpack(out)
                if choosing:
                    out, why = self._blocks.run(index, site, *packed, reason)
                    if out is not None:
                        return packing.unpack(out)
                    reason, warn = why, True
        self._record_dense(index, reason, warn=warn)
        self._show(index, query, key, scale, dense_reason=reason)
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
            out, why = self._blocks.run(index, site, query, key, value, reason)
            if out is None:
                self._record_dense(index, why, warn=True)
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
        """Tell the witness, if there is one, of a call; `seen` are the fields of `WitnessedCall` that only some have."""
        if self.witness is None:
            return
        forward = self._forward
        tick = forward.tick if forward else None
        if grid is None and forward and forward.grid:
            grid = self._grid(index, query)
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

    def _precedes_choice(self, index: int, site: AttentionSite) -> bool:
        """Whether the next call of this layer chooses blocks."""
        following = site.next_step()
        if following is None:
            return False
        if self.schedule.dense_reason(following) is not None:
            return self._looks_ahead(following)
        refreshed_at = self._blocks.refreshed_at(index, site.branch)
        dense = self.schedule.dense_reason(site) is not None
        if self._looks_ahead(site) if dense else self.method.refreshes(site, refreshed_at):
            refreshed_at = site.step
        return self.method.refreshes(following, refreshed_at)

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
            later_sigmas=forward.tick.later_sigmas,
            scale=scale,
            name=self.layers[index],
        )

    def state_bytes(self) -> int:
        """Memory held between steps."""
        return self._slots.nbytes
