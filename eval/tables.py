"""The rows that every table of a run shows."""

from __future__ import annotations

from collections.abc import Sequence

from sparsediff.eval.metric_names import METRICS
from sparsediff.eval.results import Results
from sparsediff.eval.stats import Estimate
from sparsediff.eval.summary import ArmSummary, summarise

DIGITS = {"psnr": 2}


def summary_table(summaries: Sequence[ArmSummary]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row an arm: density, speed-ups, forecast, every metric against the dense clips."""
    shown = [
        n for n in METRICS if METRICS[n].against_dense and any(n in s.metrics for s in summaries)
    ]
    head = ["arm", "density", "speed-up", "denoiser", "forecast", *(heading(n) for n in shown)]
    return head, [_row(summary, shown) for summary in summaries]


def to_text(results: Results) -> str:
    """The table for a terminal: means without intervals, then failed self-checks."""
    summaries = summarise(results)
    head, rows = summary_table(summaries)
    cells = [
        head,
        *([cell.split(" (")[0] if i else cell for i, cell in enumerate(row)] for row in rows),
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]) for row in cells]  # fmt: skip
    lines += [
        f"NOT TO BE TRUSTED  {arm.label}: {check.detail}"
        for arm in results.arms
        for check in arm.checks
        if check.passed is False
    ]
    return "\n".join(lines)


def heading(name: str) -> str:
    """A metric with its unit and an arrow to its better end."""
    metric = METRICS[name]
    arrow = {True: " ↑", False: " ↓", None: ""}[metric.higher_is_better]
    return f"{metric.label}{f', {metric.unit}' if metric.unit else ''}{arrow}"


def _row(summary: ArmSummary, shown: list[str]) -> list[str]:
    forecast = "" if summary.forecast is None else f"{summary.forecast:.2f}x"
    return [
        summary.label,
        f"{summary.density.mean:.3f}",
        _times(summary.speedup),
        _times(summary.denoiser_speedup),
        forecast,
        *(_metric(summary, name) for name in shown),
    ]


def _metric(summary: ArmSummary, name: str) -> str:
    value = summary.metrics.get(name)
    if value is None:
        return ""
    if name == "psnr" and summary.identical == summary.clips:
        return "identical"
    return value.format(DIGITS.get(name, 4))


def _times(value: Estimate | None) -> str:
    if value is None:
        return ""
    if value.low is None:
        return f"{value.mean:.2f}x"
    return f"{value.mean:.2f}x ({value.low:.2f} to {value.high:.2f})"
