"""From a measured call to a `ClipResult`: metrics against the dense twin, curves, layers, times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsediff.eval.measure import Made, divergence
from sparsediff.eval.metrics import score
from sparsediff.eval.results import (
    ClipResult,
    Forecast,
    LayerResult,
    Spread,
    StepResult,
    Timings,
)
from sparsediff.report import RunReport


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The dense twin that clips of one prompt and seed are compared with.

    Frames and latents are kept in half precision, and clips are rounded alike before they are compared, so that a run
    that was interrupted gives the figures of one that was not.

    Attributes:
        frames: `float16 [F, H, W, 3]` in [0, 1].
        latents: `float16 [steps, ...]`; None where the pipeline does not tell them.
        frames_sha256: of the frames before rounding.
    """

    frames: Tensor
    latents: Tensor | None
    frames_sha256: str

    @classmethod
    def of(cls, made: Made) -> Reference:
        """What a dense run left."""
        return cls(frames=made.video.half(), latents=made.latents, frames_sha256=made.frames_sha256)

    def save(self, path: Path) -> None:
        """For a run that goes on after an interrupt."""
        tensors = {"frames": self.frames}
        if self.latents is not None:
            tensors["latents"] = self.latents
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        save_file({k: v.contiguous() for k, v in tensors.items()}, fresh)
        fresh.replace(path)

    @classmethod
    def load(cls, path: Path, frames_sha256: str) -> Reference:
        """What `save` wrote."""
        tensors = load_file(path)
        return cls(
            frames=tensors["frames"], latents=tensors.get("latents"), frames_sha256=frames_sha256
        )


def clip_result(
    runs: Sequence[Made],
    *,
    index: int,
    prompt: str,
    seed: int,
    metrics: Sequence[str],
    lpips_weights: str | Path | None = None,
    reference: Reference | None = None,
    report: RunReport | None = None,
    parts: Sequence[RunReport] = (),
) -> ClipResult:
    """The result of one clip that was made one or more times.

    Args:
        runs: equal but for their times; frames and latents are the first one's.
        index, prompt, seed: which clip.
        metrics: names of frame metrics.
        lpips_weights: file with the network of ST-LPIPS.
        reference: the dense twin; None for the dense arm itself.
        report: of the first run, where sparsediff ran it.
        parts: reports of all runs, with the times of attention.
    """
    made = runs[0]
    video = made.video.half().float()
    twin = None if reference is None else reference.frames.float()
    found = score(metrics, video, twin, lpips_weights=lpips_weights)
    apart: tuple[float, ...] = ()
    if reference is not None and None not in (reference.latents, made.latents):
        apart = divergence(made.latents, reference.latents)
    return ClipResult(
        index=index,
        prompt=prompt,
        seed=seed,
        timings=_timings(runs, parts),
        density=1.0 if report is None else report.density,
        metrics=found.clip | ({"latent_divergence": apart[-1]} if apart else {}),
        frame_curves=found.frames,
        steps=_steps(made, report, apart),
        layers=() if report is None else tuple(_layer(layer) for layer in report.layers),
        forecast=_forecast(report),
        dense_calls={} if report is None else report.dense_calls,
        backends={} if report is None else report.backends,
        peak_memory_bytes=made.peak_memory_bytes,
        energy_joules=made.energy_joules,
        shape=tuple(made.video.shape[:3]),
        contrast=video.std().item(),
        latents_sha256=made.latents_sha256,
        frames_sha256=made.frames_sha256,
    )


def with_attention_errors(clip: ClipResult, by_step: dict[int, float]) -> ClipResult:
    """The clip with the error of its sampled attention calls, mean over layers by step, and over all."""
    if not by_step:
        return clip
    steps = tuple(replace(s, attention_error=by_step.get(s.step)) for s in clip.steps)
    mean = sum(by_step.values()) / len(by_step)
    return replace(clip, steps=steps, metrics={**clip.metrics, "attention_error": mean})


def _timings(runs: Sequence[Made], parts: Sequence[RunReport]) -> Timings:
    def spread(name: str) -> Spread:
        return Spread(samples=tuple(getattr(run, name) for run in runs))

    def part(name: str) -> Spread | None:
        values = [getattr(report, name) for report in parts]
        return Spread(samples=tuple(values)) if values and None not in values else None

    return Timings(
        total=spread("total_seconds"),
        denoiser=spread("denoiser_seconds"),
        attention=part("attention_seconds"),
        mask=part("mask_seconds"),
        text=spread("text_seconds"),
        decode=spread("decode_seconds"),
    )


def _steps(
    made: Made, report: RunReport | None, apart: tuple[float, ...]
) -> tuple[StepResult, ...]:
    """Steps as the pipeline tells them, with what is known of each."""
    told = {} if report is None else {step.step: step for step in report.steps}
    count = max(len(made.step_seconds), len(apart), 1 + max(told, default=-1))
    return tuple(
        StepResult(
            step=i,
            sigma=told[i].sigma if i in told else None,
            density=told[i].density if i in told else None,
            dense_share=told[i].dense_share if i in told else None,
            seconds=made.step_seconds[i] if i < len(made.step_seconds) else None,
            latent_divergence=apart[i] if i < len(apart) else None,
        )
        for i in range(count)
    )


def _layer(layer: object) -> LayerResult:
    return LayerResult(
        name=layer.name,
        steps=layer.steps,
        heads=layer.heads,
        calls=layer.calls,
        dense_calls=layer.dense_calls,
    )


def _forecast(report: RunReport | None) -> Forecast | None:
    if report is None or None in (report.tokens, report.attention_share):
        return None
    return Forecast(
        tokens=report.tokens,
        attention_share=report.attention_share,
        density=report.density,
        speedup=report.estimated_speedup,
    )


class SampledAttentionError:
    """Relative L1 error of sparse outputs against dense attention on the same inputs; the sparse output is fed forward.

    An `Observer` of `sparsediff.api.watch`.  Each sampled call costs a dense one, and nothing here is timed.
    """

    def __init__(self, *, every: int = 1) -> None:
        self.every = every  # layers
        self._sums: dict[int, list[Tensor]] = {}

    def __call__(self, call: object) -> Tensor:
        """One attention call."""
        if call.sparse is None:
            return call.dense()
        output, was_sparse = call.sparse()
        if was_sparse and call.site.layer % self.every == 0:
            dense = call.dense().float()
            error = (output.float() - dense).abs().sum() / dense.abs().sum().clamp_min(1e-20)
            self._sums.setdefault(call.site.step, []).append(error)
        return output

    def by_step(self) -> dict[int, float]:
        """Mean over the sampled sparse calls of each step that had any."""
        return {step: torch.stack(errors).mean().item() for step, errors in self._sums.items()}
