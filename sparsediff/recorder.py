"""Collects what a generation does, without ever waiting for the device."""

from __future__ import annotations

import time
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsediff.kernels.attention import CPU_BREAK_EVEN
from sparsediff.report import LayerReport, RunReport, StepReport

# Cost of a kept block relative to its share of a dense call, by kernel.  At the break-even density both cost the same.
KEPT_BLOCK_COST = {"cpu": 1.0 / CPU_BREAK_EVEN, "triton": 1.25, "gluon": 1.05}


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
    num_steps: int | None = None
    grid: str = ""
    attention_share: float | None = None
    _generation: int | None = None
    _spans: list[tuple[int, object, object]] = field(default_factory=list)
    _warned: set[str] = field(default_factory=set)

    def begin_generation(self, generation: int) -> None:
        """Forget the previous generation; a second call for the same one changes nothing."""
        if generation == self._generation:
            return
        self._generation = generation
        self.calls.clear()
        self.sigmas.clear()
        self.backends.clear()
        self._spans.clear()

    def sparse(self, layer: str, step: int, density: Tensor) -> None:
        """A sparse call; `density` is `float32 [H]`."""
        self.calls.append(_Call(layer, step, density, None))

    def dense(self, layer: str, step: int, reason: str, *, warn: bool) -> None:
        """A dense call; `warn` for reasons that the user did not choose, once each."""
        self.calls.append(_Call(layer, step, None, reason))
        if warn and reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"sparsediff: attention ran dense: {reason}", RuntimeWarning, stacklevel=2
            )

    # -- time -----------------------------------------------------------------------------------------------------

    def mark(self, device: torch.device) -> object:
        """Now: a CUDA event on the device's stream, or seconds."""
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter()

    def span(self, step: int, start: object, stop: object) -> None:
        """A transformer call of `step` between two marks."""
        self._spans.append((step, start, stop))

    def _seconds(self) -> dict[int, float]:
        total: dict[int, float] = defaultdict(float)
        for step, start, stop in self._spans:
            if isinstance(start, float):
                total[step] += stop - start
            else:
                stop.synchronize()
                total[step] += start.elapsed_time(stop) / 1000.0
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
        return RunReport(
            method=self.method,
            schedule=self.schedule,
            grid=self.grid,
            num_steps=self.num_steps or len(by_step),
            density=_mean([sum(h) / len(h) for h in per_call]),
            layers=tuple(_layer(name, calls) for name, calls in by_layer.items()),
            steps=tuple(
                StepReport(
                    step=step,
                    sigma=self.sigmas.get(step),
                    density=_mean([sum(h) / len(h) for _, h in calls]),
                    dense_share=_mean([float(c.reason is not None) for c, _ in calls]),
                    seconds=seconds.get(step),
                )
                for step, calls in sorted(by_step.items())
            ),
            dense_calls=dict(Counter(c.reason for c in self.calls if c.reason is not None)),
            backends=dict(self.backends),
            estimated_speedup=self.estimate_speedup(per_call),
        )

    def estimate_speedup(self, per_call: list[tuple[float, ...]] | None = None) -> float | None:
        """Denoiser time of a dense run over this one's, from operation counts; None before anything has run."""
        if not self.calls or self.attention_share is None:
            return None
        cost = max((KEPT_BLOCK_COST.get(name, 1.0) for name in self.backends), default=1.0)
        relative = [
            1.0 if call.reason is not None else cost * sum(heads) / len(heads)
            for call, heads in zip(self.calls, per_call or _read_densities(self.calls), strict=True)
        ]
        return 1.0 / (1.0 - self.attention_share + self.attention_share * _mean(relative))

    def step_density(self, step: int) -> Tensor | float | None:
        """Mean density of a step; a tensor on the device if any of its calls was sparse."""
        values = [
            c.density.mean() if c.density is not None else 1.0 for c in self.calls if c.step == step
        ]
        if not values:
            return None
        tensors = [v for v in values if isinstance(v, Tensor)]
        if not tensors:
            return 1.0
        return (torch.stack(tensors).sum() + (len(values) - len(tensors))) / len(values)


def _read_densities(calls: list[_Call]) -> list[tuple[float, ...]]:
    """Densities per head of every call, with one transfer for all of them."""
    tensors = {id(c.density): c.density for c in calls if c.density is not None}
    values = {}
    if tensors:
        flat = torch.cat(list(tensors.values())).tolist()
        for key, x in tensors.items():
            values[key], flat = tuple(flat[: x.numel()]), flat[x.numel() :]
    heads = max((len(v) for v in values.values()), default=1)
    return [values[id(c.density)] if c.density is not None else (1.0,) * heads for c in calls]


def _layer(name: str, calls: list[tuple[_Call, tuple[float, ...]]]) -> LayerReport:
    heads = tuple(_mean(list(column)) for column in zip(*(h for _, h in calls), strict=True))
    return LayerReport(
        name=name,
        density=_mean(list(heads)),
        heads=heads,
        calls=len(calls),
        dense_calls=sum(c.reason is not None for c, _ in calls),
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 1.0
