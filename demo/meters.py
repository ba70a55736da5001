"""What a run says of itself while it runs, as HTML: a bar, four numbers and how they came about."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 120, 26


@dataclass(frozen=True, kw_only=True)
class StepPoint:
    """One denoising step that has just ended.

    Attributes:
        step: from 1.
        steps: of the run.
        seconds: since the step before it.
        density: kept share of attention in this step; 1 in a dense one.
        speedup: of the denoiser so far, estimated from operation counts; None in the dense run.
        divergence: relative L2 distance of the latents to the dense run's after the same step; None if unknown.
    """

    step: int
    steps: int
    seconds: float
    density: float = 1.0
    speedup: float | None = None
    divergence: float | None = None


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What is running now.

    Attributes:
        name: in a word or two, for people.
        points: the steps it has done.
        share: of the whole job that is done, in [0, 1].
        note: what it is doing besides stepping, such as decoding.
        id: for scripts.
    """

    name: str
    points: tuple[StepPoint, ...] = ()
    share: float = 0.0
    note: str = ""
    id: str = "running"


def meter(phase: Phase) -> str:
    """The state of a run."""
    last = phase.points[-1] if phase.points else None
    said = [phase.note] if phase.note else []
    if last is not None:
        pace = sum(p.seconds for p in phase.points) / len(phase.points)
        said = [f"step {last.step} of {last.steps}"]
        if left := last.steps - last.step:
            said.append(f"about {_duration(left * pace)} left")
        said += [phase.note] if phase.note else []
    head = _head(phase.name, " · ".join(said))
    bar = (
        f'<div class="sd-bar" role="progressbar" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{100 * phase.share:.0f}"><i style="width:{100 * phase.share:.1f}%"></i></div>'
    )
    step = 0 if last is None else last.step
    return (
        f'<div class="sd-meter" data-phase="{phase.id}" data-step="{step}" aria-live="polite">'
        f"{head}{bar}{_dials(phase.points)}</div>"
    )


def notice(text: str, *, kind: str = "", title: str = "") -> str:
    """A sentence where the meter is; `kind` is `error` or empty."""
    role = ' role="alert"' if kind == "error" else ""
    return f'<div class="sd-meter sd-notice {kind}"{role}>{_head(title, text)}</div>'


def _head(name: str, text: str) -> str:
    title = f"<b>{html.escape(name)}</b> " if name else ""
    return f'<div class="sd-head">{title}<span>{html.escape(text)}</span></div>'


def _dials(points: Sequence[StepPoint]) -> str:
    if not points:
        return ""
    last = points[-1]
    dials = [
        ("density", f"{last.density:.2f}", [p.density for p in points], 0.0, "kept share of attention in this step"),
        ("speed-up", _or_dash(last.speedup, "{:.2f}\N{MULTIPLICATION SIGN}"), [p.speedup for p in points], None, "of the denoiser so far, estimated from operation counts"),
        ("a step", _duration(last.seconds), [p.seconds for p in points], 0.0, "seconds of this step"),
        ("error", _or_dash(last.divergence, "{:.2%}"), [p.divergence for p in points], 0.0, "relative distance of the latents to the dense run's after the same step"),
    ]  # fmt: skip
    cells = (
        f'<div class="sd-dial" data-dial="{label}" title="{html.escape(hint)}"><span>{label}</span><b>{value}</b>'
        f"{_line(values, last.steps, floor)}</div>"
        for label, value, values, floor, hint in dials
    )
    return f'<div class="sd-dials">{"".join(cells)}</div>'


def _line(values: Sequence[float | None], steps: int, floor: float | None) -> str:
    """A small curve over all steps of the run."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true"></svg>'
    low, high = min(known) if floor is None else floor, max(known)
    span = (high - low) or 1.0
    places = [
        (3 + (WIDTH - 6) * i / max(1, steps - 1), HEIGHT - 4 - (HEIGHT - 8) * (v - low) / span)
        for i, v in enumerate(values)
        if v is not None and math.isfinite(v)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    x, y = places[-1]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">'
        f'<polyline points="{line}"/><circle cx="{x:.1f}" cy="{y:.1f}" r="2.2"/></svg>'
    )


def _or_dash(value: float | None, form: str) -> str:
    return "\N{EN DASH}" if value is None or not math.isfinite(value) else form.format(value)


def _duration(seconds: float) -> str:
    if seconds < 0.995:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.0f} min"
