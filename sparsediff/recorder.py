"""Collects what a generation does, without ever waiting for the device."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsediff.kernels.attention import CPU_BREAK_EVEN
from sparsediff.report import LayerReport, RunReport, StepReport
from sparsediff.timing import Mark, mark, seconds_between

# Cost of a kept block relative to its share of a dense call (cuDNN on a GPU), by kernel: docs/performance.md.  At the
# CPU's break-even density both cost the same.
KEPT_BLOCK_COST = {
    "cpu": 1.0 / CPU_BREAK_EVEN,
    "triton": 1.3,
    "triton_tma": 1.3,
    "gluon": 0.95,
    "gluon_pairs": 1.1,
    "gluon_int8": 0.78,
    "gluon_fp8": 0.75,
}


NOT_TIMED = contextlib.nullcontext()


class _Part:
    """Marks before and after."""

    def __init__(self, spans: list[tuple[Mark, Mark]], device: torch.device) -> None:
        self._spans, self._device = spans, device

    def __enter__(self) -> None:
        self._start = mark(self._device)

    def __exit__(self, *exc: object) -> None:
        self._spans.append((self._start, mark(self._device)))


@dataclass
class _Call:
    layer: str
    step: int
    density: Tensor | None  # float32 [H] on the device; None for a dense call
    reason: str | None


@dataclass
class Recorder:
    """The calls of the current generation of one enabled pipeline."""

    method: str
    schedule: str
    calls: list[_Call] = field(default_factory=list)
    sigmas: dict[int, float | None] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)
    budgets: Counter[str] = field(default_factory=Counter)
    num_steps: int | None = None
    grid: str = ""
    tokens: int | None = None
    attention_share: float | None = None
    timed: bool = False  # whether attention calls are timed one by one; two marks each
    _generation: int | None = None
    _spans: list[tuple[int, Mark, Mark]] = field(default_factory=list)
    _parts: dict[str, list[tuple[Mark, Mark]]] = field(default_factory=lambda: defaultdict(list))
    _warned: set[str] = field(default_factory=set)
    _folded: int = 0
    _density_sum: Tensor | float = 0.0

    def begin_generation(self, generation: int) -> None:
        """Forget the previous generation; a second call for the same one changes nothing."""
        if generation == self._generation:
            return
        self._generation = generation
        self.calls.clear()
        self.sigmas.clear()
        self.backends.clear()
        self.budgets.clear()
        self._spans.clear()
        self._parts.clear()
        self.num_steps, self.grid, self.tokens, self.attention_share = None, "", None, None
        self._folded, self._density_sum = 0, 0.0

    def sparse(self, layer: str, step: int, density: Tensor) -> None:
        """A sparse call; `density` is `float32 [H]`."""
        self.calls.append(_Call(layer, step, density, None))

    def dense(self, layer: str, step: int, reason: str, *, warn: bool) -> None:
        """A dense call; `warn` for reasons that the user did not choose, once each."""
        self.calls.append(_Call(layer, step, None, reason))
        if warn:
            self.warn(f"attention ran dense: {reason}")

    def warn(self, text: str) -> None:
        """Tell the user, once."""
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(f"sparsediff: {text}", RuntimeWarning, stacklevel=2)

    # -- time -----------------------------------------------------------------------------------------------------

    def span(self, step: int, start: Mark, stop: Mark) -> None:
        """A transformer call of `step` between two marks."""
        self._spans.append((step, start, stop))

    def part(self, name: str, device: torch.device) -> contextlib.AbstractContextManager:
        """Times what is inside as a part of attention, where that is wanted."""
        return _Part(self._parts[name], device) if self.timed else NOT_TIMED

    def _part_seconds(self, name: str) -> float | None:
        spans = self._parts[name]
        return sum((seconds_between(*s) for s in spans), 0.0) if self.timed else None

    def _seconds(self) -> dict[int, float]:
        total: dict[int, float] = defaultdict(float)
        for step, start, stop in self._spans:
            total[step] += seconds_between(start, stop)
        return dict(total)

    # -- report ---------------------------------------------------------------------------------------------------

    def report(self) -> RunReport:
        """Everything so far.  Waits for the device."""
        per_call = _read_densities(self.calls)
        by_layer, by_step = defaultdict(list), defaultdict(list)
        for call, heads in zip(self.calls, per_call, strict=True):
            by_layer[call.layer].append((call, heads))
            by_step[call.step].append((call, heads))
        seconds = self._seconds()
        density = _mean([sum(h) / len(h) for h in per_call])
        return RunReport(
            method=self.method,
            schedule=self.schedule,
            grid=self.grid,
            num_steps=self.num_steps or len(self.sigmas),
            density=density,
            layers=tuple(
                _layer(name, calls, sorted(self.sigmas)) for name, calls in by_layer.items()
            ),
            steps=tuple(
                _step(step, self.sigmas[step], by_step[step], seconds.get(step))
                for step in sorted(self.sigmas)
            ),
            dense_calls=dict(Counter(c.reason for c in self.calls if c.reason is not None)),
            backends=dict(self.backends),
            estimated_speedup=self.estimate_speedup(density),
            tokens=self.tokens,
            attention_share=self.attention_share,
            attention_seconds=self._part_seconds("attention"),
            mask_seconds=self._part_seconds("mask"),
            budgets=dict(self.budgets),
        )

    def estimate_speedup(self, density: float) -> float | None:
        """Denoiser time of a dense run over this one's at mean `density`; None before anything has run.

        From operation counts: attention's share of the transformer's arithmetic, and what a kept block costs.
        """
        if not self.calls or self.attention_share is None:
            return None
        cost = max((KEPT_BLOCK_COST.get(name, 1.0) for name in self.backends), default=1.0)
        dense = sum(c.reason is not None for c in self.calls) / len(self.calls)
        relative = dense + cost * (density - dense)
        return 1.0 / (1.0 - self.attention_share + self.attention_share * relative)

    def fold(self) -> Tensor | None:
        """Mean density since the last fold and over the generation: `float32 [2]`, on the device, not waited for."""
        new = self.calls[self._folded :]
        if not new:
            return None
        self._folded = len(self.calls)
        sparse = [c.density for c in new if c.density is not None]
        # Two experts may live on two devices, and a dense step on none.
        device = sparse[-1].device if sparse else torch.as_tensor(self._density_sum).device
        total = torch.full((), float(len(new) - len(sparse)), device=device)
        # Layers alike are added up together: one by one they would be the launches of another few layers.
        alike = defaultdict(list)
        for density in sparse:
            alike[density.device, len(density)].append(density)
        for densities in alike.values():
            total = total + torch.stack(densities).mean(-1).sum().to(device)
        self._density_sum = total + torch.as_tensor(self._density_sum).to(device)
        return torch.stack([total / len(new), self._density_sum / len(self.calls)])


def _read_densities(calls: list[_Call]) -> list[tuple[float, ...]]:
    """Densities per head of every call, with one transfer a device for all of them."""
    by_device: dict[torch.device, dict[int, Tensor]] = defaultdict(dict)
    for call in calls:
        if call.density is not None:
            by_device[call.density.device][id(call.density)] = call.density
    values: dict[int, tuple[float, ...]] = {}
    for tensors in by_device.values():
        flat = torch.cat(list(tensors.values())).cpu()
        parts = flat.split([x.numel() for x in tensors.values()])
        values |= {key: tuple(part.tolist()) for key, part in zip(tensors, parts, strict=True)}
    heads = max((len(v) for v in values.values()), default=1)
    return [values[id(c.density)] if c.density is not None else (1.0,) * heads for c in calls]


def _step(
    step: int,
    sigma: float | None,
    calls: list[tuple[_Call, tuple[float, ...]]],
    seconds: float | None,
) -> StepReport:
    # A cache such as MagCache can skip every block of a step: no attention was computed at all.
    return StepReport(
        step=step,
        sigma=sigma,
        density=_mean([sum(h) / len(h) for _, h in calls]) if calls else 0.0,
        dense_share=_mean([float(c.reason is not None) for c, _ in calls]) if calls else 0.0,
        seconds=seconds,
    )


def _layer(
    name: str, calls: list[tuple[_Call, tuple[float, ...]]], steps: list[int]
) -> LayerReport:
    by_step = defaultdict(list)
    for call, heads in calls:
        by_step[call.step].append(_mean(list(heads)))
    heads = tuple(_mean(list(column)) for column in zip(*(h for _, h in calls), strict=True))
    return LayerReport(
        name=name,
        density=_mean(list(heads)),
        heads=heads,
        steps=tuple(_mean(by_step[step]) if step in by_step else None for step in steps),
        calls=len(calls),
        dense_calls=sum(c.reason is not None for c, _ in calls),
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 1.0
