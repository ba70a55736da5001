"""The numbers of the report, as the page's script reads them."""

from __future__ import annotations

import dataclasses

from sparsediff.eval.metric_names import METRICS
from sparsediff.eval.pictures import RAMP
from sparsediff.eval.results import ArmResult, ClipResult, Results, StepResult
from sparsediff.eval.stats import Estimate
from sparsediff.eval.summary import ArmSummary

DENSE_COLOUR = 0  # grey; the others follow in order
COLOURS = 8
STEP_CURVES = tuple(f.name for f in dataclasses.fields(StepResult) if f.name != "step")
# What the headline goes by, in this order, where it was measured.
QUALITY = ("psnr", "lpips", "st_lpips", "ssim", "ms_ssim", "latent_divergence")


def page_figures(
    results: Results,
    summaries: tuple[ArmSummary, ...],
    videos: dict[str, dict[int, dict[str, str]]],
) -> dict[str, object]:
    """Arms, clips, curves and densities."""
    by_name = {arm.arm: arm for arm in results.arms}
    arms = [by_name[s.arm] for s in summaries]
    pairs = {clip.index: clip for arm in arms for clip in arm.clips}
    present = [
        name for name in METRICS if any(name in clip.metrics for arm in arms for clip in arm.clips)
    ]
    curves = {name for arm in arms for clip in arm.clips for name in clip.frame_curves}
    baseline = results.dense.arm if results.dense is not None and results.dense.clips else None
    return {
        "fps": arms[0].fps,
        "ramp": RAMP,
        "metrics": {
            name: {
                "label": title(name),
                "unit": metric.unit,
                "better": {True: "higher", False: "lower", None: None}[metric.higher_is_better],
                "against": metric.against_dense,
                "meaning": metric.meaning,
            }
            for name, metric in METRICS.items()
            if name in present or name in curves
        },
        "metricNames": present,
        "arms": [
            _arm(summary, by_name[summary.arm], place) for place, summary in enumerate(summaries)
        ],
        "baseline": baseline or arms[0].arm,
        "focus": (focus_arm(summaries) or summaries[-1]).arm,
        "prompts": [
            {"index": index, "prompt": clip.prompt, "seed": clip.seed}
            for index, clip in sorted(pairs.items())
        ],
        "severalSeeds": len({clip.seed for clip in pairs.values()}) > 1,
        "clips": {
            arm.arm: {
                str(clip.index): _clip(clip, videos[arm.arm].get(clip.index)) for clip in arm.clips
            }
            for arm in arms
        },
    }


def focus_arm(summaries: tuple[ArmSummary, ...]) -> ArmSummary | None:
    """The arm that the headline is about: the closest to dense of those that are faster, else the closest."""
    methods = [s for s in summaries if s.role == "sparse"]
    faster = [s for s in methods if is_faster(s)]
    metric = headline_metric(faster or methods)
    if metric is None:
        return next(iter(faster or methods), None)
    sign = 1 if METRICS[metric].higher_is_better else -1
    measured = [s for s in faster or methods if metric in s.metrics]
    return max(measured, key=lambda s: sign * s.metrics[metric].mean)


def is_faster(summary: ArmSummary) -> bool:
    """Whether its denoiser beats dense by more than chance."""
    speed = summary.denoiser_speedup
    return speed is not None and (speed.mean if speed.low is None else speed.low) > 1.0


def headline_metric(summaries: list[ArmSummary]) -> str | None:
    """The quality that speaks for an arm, where any was measured."""
    return next((name for name in QUALITY if any(name in s.metrics for s in summaries)), None)


def title(name: str) -> str:
    """A metric's label at the start of a line."""
    label = METRICS[name].label
    return label[:1].upper() + label[1:]


def triple(value: Estimate | None) -> list[float | None] | None:
    """Mean and interval."""
    return None if value is None else [value.mean, value.low, value.high]


def _arm(summary: ArmSummary, arm: ArmResult, place: int) -> dict[str, object]:
    return {
        "id": arm.arm,
        "label": arm.label,
        "role": arm.role,
        "subtitle": _subtitle(arm),
        "colour": DENSE_COLOUR if arm.role == "dense" else 1 + (place - 1) % (COLOURS - 1),
        "clips": summary.clips,
        "identical": summary.identical,
        "density": triple(summary.density),
        "denoiser": triple(summary.denoiser_speedup),
        "speedup": triple(summary.speedup),
        "metrics": {name: triple(value) for name, value in summary.metrics.items()},
        "differences": {name: triple(value) for name, value in summary.differences.items()},
        "forecast": summary.forecast,
        "seconds": _seconds(summary, arm),
        "peakBytes": summary.peak_memory_bytes,
        "joules": _mean([clip.energy_joules for clip in arm.clips]),
    }


def _seconds(summary: ArmSummary, arm: ArmResult) -> dict[str, float | None]:
    """Where a clip's time goes, mean over clips; parts that hold one another are taken apart."""
    attention = mask = None
    if summary.attention_share is not None:
        attention = summary.attention_share * summary.denoiser_seconds
        mask = attention * (summary.mask_share or 0.0)
    return {
        "text": _mean([c.timings.text.median if c.timings.text else None for c in arm.clips]),
        "attention": None if attention is None else attention - mask,
        "mask": mask,
        "denoiser": summary.denoiser_seconds - (attention or 0.0),
        "decode": _mean([c.timings.decode.median if c.timings.decode else None for c in arm.clips]),
        "total": summary.seconds,
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _subtitle(arm: ArmResult) -> str:
    kind = {
        "dense": "stock attention",
        "dense-best": f"dense, {arm.attention_backend or 'best backend'}",
        "random": "floor: blocks drawn at random",
    }.get(arm.role)
    return kind or ""


def _clip(clip: ClipResult, video: dict[str, str] | None) -> dict[str, object]:
    return {
        "shape": list(clip.shape),
        "video": video,
        "density": clip.density,
        "metrics": clip.metrics,
        "curves": clip.frame_curves,
        "seconds": clip.timings.denoiser.median,
        "steps": {
            name: [getattr(step, name) for step in clip.steps]
            for name in STEP_CURVES
            if any(getattr(step, name) is not None for step in clip.steps)
        },
        "layers": [
            {"name": layer.name, "steps": list(layer.steps), "heads": list(layer.heads)}
            for layer in clip.layers
        ],
        "denseCalls": clip.dense_calls,
    }
