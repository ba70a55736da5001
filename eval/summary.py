"""What a folder of results says in a few numbers: the rows of every table."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from sparsediff.eval.metric_names import METRICS
from sparsediff.eval.results import ArmResult, ClipResult, Results
from sparsediff.eval.stats import Estimate, estimate, ratio_estimate

# Identical clips have infinite PSNR; in means they count as this much, which 8-bit video cannot tell from identical.
PSNR_CAP = 100.0


@dataclass(frozen=True, kw_only=True)
class ArmSummary:
    """One arm over all its clips, against the dense arm's clips of the same prompts and seeds.

    Attributes:
        density: over all steps, dense ones included.
        metrics: name -> mean.  PSNR of identical clips counts as `PSNR_CAP`.
        differences: name -> mean of (this arm - dense), for metrics that look at one clip alone.
        identical: clips that equal their dense twin bit by bit.
        speedup: dense time over this arm's, the whole call; the geometric mean over clips.
        denoiser_speedup: the same for the transformers alone.
        forecast: speed-up of the denoiser that operation counts predict; None for dense arms and runs too short for one.
        seconds, denoiser_seconds: median of a clip, mean over clips.
        attention_share, mask_share: of attention in the denoiser's time, of choosing blocks in attention's, measured.
        peak_memory_bytes: the largest of any clip.
        energy: dense energy over this arm's; None where it was not measured.
    """

    arm: str
    label: str
    role: str
    clips: int
    density: Estimate
    metrics: dict[str, Estimate] = field(default_factory=dict)
    differences: dict[str, Estimate] = field(default_factory=dict)
    identical: int = 0
    speedup: Estimate | None = None
    denoiser_speedup: Estimate | None = None
    forecast: float | None = None
    seconds: float = 0.0
    denoiser_seconds: float = 0.0
    attention_share: float | None = None
    mask_share: float | None = None
    peak_memory_bytes: int | None = None
    energy: Estimate | None = None


def summarise(results: Results) -> tuple[ArmSummary, ...]:
    """Every arm that has clips, in the order of `results`."""
    return tuple(_summarise(results, arm) for arm in results.arms if arm.clips)


def paired_difference(results: Results, arm: str, other: str, metric: str) -> Estimate | None:
    """Mean of (arm - other) over the clips that both have, clip by clip; None if there are none."""
    one, two = results.arm(arm), results.arm(other)
    values = [
        (clip.prompt, capped(clip.metrics[metric]) - capped(twin.metrics[metric]))
        for clip in one.clips
        if (twin := two.clip(clip.key)) and _has(clip, metric) and _has(twin, metric)
    ]
    return estimate(values) if values else None


def capped(value: float) -> float:
    """Infinity, which only PSNR knows, as `PSNR_CAP`."""
    return min(value, PSNR_CAP)


def _summarise(results: Results, arm: ArmResult) -> ArmSummary:
    pairs = results.pairs(arm) if arm.role != "dense" else []
    clips = arm.clips
    names = [n for n in METRICS if any(_has(c, n) for c in clips)]
    forecasts = [
        c.forecast.speedup
        for c in clips
        if c.forecast is not None and c.forecast.speedup is not None
    ]
    peaks = [c.peak_memory_bytes for c in clips if c.peak_memory_bytes is not None]
    timed = [c.timings for c in clips]
    return ArmSummary(
        arm=arm.arm,
        label=arm.label,
        role=arm.role,
        clips=len(clips),
        density=estimate((c.prompt, c.density) for c in clips),
        metrics={
            n: estimate((c.prompt, capped(c.metrics[n])) for c in clips if _has(c, n))
            for n in names
            if not (METRICS[n].against_dense and arm.role == "dense")
        },
        differences={
            n: found
            for n in names
            if not METRICS[n].against_dense and (found := _difference(pairs, n)) is not None
        },
        identical=sum(math.isinf(c.metrics.get("psnr", 0.0)) for c, _ in pairs),
        speedup=_ratio(pairs, "total"),
        denoiser_speedup=_ratio(pairs, "denoiser"),
        forecast=sum(forecasts) / len(forecasts) if forecasts else None,
        seconds=_mean([t.total.median for t in timed]),
        denoiser_seconds=_mean([t.denoiser.median for t in timed]),
        attention_share=_share(arm, "attention", "denoiser"),
        mask_share=_share(arm, "mask", "attention"),
        peak_memory_bytes=max(peaks, default=None),
        energy=_energy(pairs),
    )


def _difference(pairs: list[tuple[ClipResult, ClipResult]], name: str) -> Estimate | None:
    values = [
        (a.prompt, a.metrics[name] - b.metrics[name])
        for a, b in pairs
        if _has(a, name) and _has(b, name)
    ]
    return estimate(values) if values else None


def _has(clip: ClipResult, name: str) -> bool:
    """Whether it was measured and came out as a number."""
    return not math.isnan(clip.metrics.get(name, math.nan))


def _ratio(pairs: list[tuple[ClipResult, ClipResult]], part: str) -> Estimate | None:
    """Dense time over the arm's."""
    values = [
        (arm.prompt, getattr(dense.timings, part).median, getattr(arm.timings, part).median)
        for arm, dense in pairs
    ]
    positive = [v for v in values if v[1] > 0 and v[2] > 0]
    return ratio_estimate(positive) if positive else None


def _energy(pairs: list[tuple[ClipResult, ClipResult]]) -> Estimate | None:
    values = [
        (a.prompt, b.energy_joules, a.energy_joules)
        for a, b in pairs
        if a.energy_joules and b.energy_joules
    ]
    return ratio_estimate(values) if values else None


def _share(arm: ArmResult, part: str, whole: str) -> float | None:
    # A dense arm's attention is timed in its repeat only: its clips run the untouched stock pipeline.
    clips = [*arm.clips, arm.repeat] if arm.repeat is not None else arm.clips
    both = [(getattr(c.timings, part), getattr(c.timings, whole)) for c in clips]
    shares = [a.median / b.median for a, b in both if a is not None and b is not None and b.median]
    return _mean(shares) if shares else None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
