"""Whether a run's figures deserve belief: checks on the results themselves, made after every run.

Each looks for one way in which comparisons of sparse attention have gone wrong: another seed in one arm, a method that
silently ran dense, times of launches instead of work, a broken picture with a fine speed-up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from sparsediff.eval.arms import asked_density
from sparsediff.eval.results import ArmResult, Check, ClipResult, Results, Timings

# Clocks of host and device, and rounding.
SLACK, SLACK_SECONDS = 1.02, 2e-3
UNACCOUNTED = 0.4  # share of a call outside text, denoiser and decoding, beyond which a part was timed without waiting
# Ragged blocks and forced text rows keep the density from being met exactly; budgets are whole numbers of blocks.
DENSITY_SLACK = 0.02
LARGEST_BLOCK = 128


def check_results(results: Results) -> dict[str, tuple[Check, ...]]:
    """Every check of every arm that has clips, by the arm's identifier."""
    return {arm.arm: tuple(_checks(results, arm)) for arm in results.arms if arm.clips}


def failed(results: Results) -> list[tuple[ArmResult, Check]]:
    """The checks on disk that did not pass."""
    return [(arm, c) for arm in results.arms for c in arm.checks if c.passed is False]


def _checks(results: Results, arm: ArmResult) -> Iterable[Check]:
    if arm.role == "dense":
        yield check_deterministic(arm)
    else:
        yield check_same_start(results, arm)
    yield check_timing(arm)
    yield check_videos(results, arm)
    if arm.role in ("sparse", "random"):
        yield check_runs_sparse(arm)
        yield check_density(arm)
    if arm.role == "sparse":
        yield check_picture(results, arm)
        yield check_beats_random(results, arm)


def check_deterministic(arm: ArmResult) -> Check:
    """The dense clip comes out again, bit by bit, also through sparsediff with a wholly dense schedule."""
    repeat = arm.repeat
    twin = None if repeat is None else arm.clip(repeat.key)
    if twin is None or not repeat.frames_sha256:
        return Check(name="deterministic", passed=None, detail="no dense clip was repeated")
    if repeat.frames_sha256 == twin.frames_sha256:
        detail = "the dense clip came out again, bit by bit"
        return Check(name="deterministic", passed=True, detail=detail)
    floor = repeat.metrics.get("psnr", math.nan)
    return Check(
        name="deterministic",
        passed=False,
        detail=f"the pipeline is not deterministic: its own repeat is {floor:.1f} dB away, and no difference near that means anything",
    )


def check_same_start(results: Results, arm: ArmResult) -> Check:
    """Arms share prompt, seed and first latents."""
    pairs = [(a, b) for a, b in results.pairs(arm) if a.latents_sha256 and b.latents_sha256]
    if not pairs:
        return Check(
            name="same start", passed=None, detail="no clip has a dense twin to start with"
        )
    other = [a for a, b in pairs if a.latents_sha256 != b.latents_sha256]
    if other:
        return Check(
            name="same start",
            passed=False,
            detail=f"{len(other)} of {len(pairs)} clips started from other noise than their dense twins ({_first(other)}): "
            "the comparison is of two different clips",
        )
    return Check(name="same start", passed=True, detail=f"all {len(pairs)} clips started from the noise of their dense twins")  # fmt: skip


def check_timing(arm: ArmResult) -> Check:
    """Parts fit into the whole and account for it."""
    clips = [*arm.clips, *([arm.repeat] if arm.repeat is not None else [])]
    for clip in clips:
        if problem := _timing_problem(clip.timings):
            detail = f"clip {clip.index}: {problem}; its times are not to be trusted"
            return Check(name="timing", passed=False, detail=detail)
    return Check(name="timing", passed=True, detail="parts fit into the whole and account for it")


def check_videos(results: Results, arm: ArmResult) -> Check:
    """The clips that people look at are there."""
    missing = [c for c in arm.clips if c.video is not None and not Path(results.folder / c.video).is_file()]  # fmt: skip
    if missing:
        detail = f"{len(missing)} of {len(arm.clips)} video files are missing ({_first(missing)})"
        return Check(name="videos", passed=False, detail=detail)
    return Check(name="videos", passed=True, detail="every clip has its video file")


def check_runs_sparse(arm: ArmResult) -> Check:
    """A method did what it is named after."""
    dense = [c for c in arm.clips if c.density >= 1.0]
    if dense:
        reasons = ", ".join(dict.fromkeys(r for c in dense for r in c.dense_calls))
        detail = f"{len(dense)} of {len(arm.clips)} clips ran wholly dense ({reasons or 'no reason known'})"
        return Check(name="runs sparse", passed=False, detail=detail)
    return Check(name="runs sparse", passed=True, detail="every clip skipped blocks")


def check_density(arm: ArmResult) -> Check:
    """The density of sparse calls is what the parameters ask for."""
    asked = asked_density(arm.method, arm.parameters)
    found = [d for c in arm.clips if (d := _sparse_density(c)) is not None]
    if asked is None or not found:
        why = "its parameters ask for none" if asked is None else "no call was sparse"
        return Check(name="density", passed=None, detail=f"no density to hold it to: {why}")
    mean = sum(found) / len(found)
    tokens = next((c.forecast.tokens for c in arm.clips if c.forecast is not None), None)
    block = arm.parameters.get("block") or LARGEST_BLOCK
    rounding = 0.0 if tokens is None else block / tokens
    return Check(
        name="density",
        passed=abs(mean - asked) <= DENSITY_SLACK + rounding,
        detail=f"sparse calls kept {mean:.3f} of attention, {asked:.3f} were asked for",
    )


def check_picture(results: Results, arm: ArmResult) -> Check:
    """Clips are nearer to their dense twins than one flat colour or a wholly other picture would be."""
    pairs = [(a, b) for a, b in results.pairs(arm) if "psnr" in a.metrics and b.contrast]
    if not pairs:
        return Check(name="picture", passed=None, detail="no PSNR to a dense twin was measured")
    broken = []
    for clip, dense in pairs:
        # The best that a picture without any content can do is the mean colour, whose error is the variance.
        flat = -20 * math.log10(dense.contrast)
        if clip.metrics["psnr"] <= flat or (clip.contrast or 0) < 0.1 * dense.contrast:
            broken.append(clip)
    if broken:
        return Check(
            name="picture",
            passed=False,
            detail=f"{len(broken)} of {len(pairs)} clips are no nearer to their dense twins than a flat colour is "
            f"({_first(broken)}, {broken[0].metrics['psnr']:.1f} dB): noise, black, or another clip",
        )
    return Check(name="picture", passed=True, detail="every clip is nearer to its dense twin than a flat colour is")  # fmt: skip


def check_beats_random(results: Results, arm: ArmResult) -> Check:
    """A method does better than blocks drawn at its density."""
    twin = next((r for r in results.arms if r.role == "random" and r.label.endswith(f" as {arm.label}")), None)  # fmt: skip
    pairs = [
        (clip.metrics["psnr"], other.metrics["psnr"])
        for clip in arm.clips
        if twin is not None
        and (other := twin.clip(clip.key)) is not None
        and "psnr" in clip.metrics
        and "psnr" in other.metrics
    ]
    if not pairs:
        return Check(
            name="beats random", passed=None, detail="random blocks at its density were not run"
        )
    better = sum(a > b for a, b in pairs)
    return Check(
        name="beats random",
        passed=2 * better > len(pairs),
        detail=f"nearer to the dense clip than random blocks at its density in {better} of {len(pairs)} clips",
    )


def _timing_problem(t: Timings) -> str | None:
    def over(part: float, whole: float) -> bool:
        return part > whole * SLACK + SLACK_SECONDS

    total, denoiser = t.total.samples, t.denoiser.samples
    if min(total) <= 0:
        return f"the whole call took {min(total):.3f} s"
    nested = (("attention", t.attention, "denoiser", t.denoiser), ("mask", t.mask, "attention", t.attention), ("denoiser", t.denoiser, "total", t.total))  # fmt: skip
    for name, part, whole_name, whole in nested:
        if part is None or whole is None:
            continue
        for a, b in zip(part.samples, whole.samples, strict=False):
            if over(a, b):
                return f"{name} ({a:.3f} s) took longer than {whole_name} ({b:.3f} s), which contains it"
    for i, whole in enumerate(total):
        others = [s.samples[i] for s in (t.text, t.decode) if s is not None and i < len(s.samples)]
        parts = denoiser[i] + sum(others)
        if over(parts, whole):
            return f"its parts ({parts:.3f} s) take longer than the whole ({whole:.3f} s)"
        if len(others) == 2 and whole - parts > UNACCOUNTED * whole + SLACK_SECONDS:
            return f"{whole - parts:.3f} of {whole:.3f} s lie in no part, as when a part is timed without waiting for the device"
    return None


def _sparse_density(clip: ClipResult) -> float | None:
    """Of the calls that were not dense."""
    calls = sum(layer.calls for layer in clip.layers)
    dense = sum(layer.dense_calls for layer in clip.layers)
    if calls == dense:
        return None
    return (clip.density * calls - dense) / (calls - dense)


def _first(clips: list[ClipResult]) -> str:
    return f"the first: {clips[0].prompt[:60]!r}, seed {clips[0].seed}"
