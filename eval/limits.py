"""Which figures of a run can be held to a limit."""

from __future__ import annotations

from dataclasses import dataclass

from sparsediff.eval.metric_names import METRICS

# Beside the metrics, fields of an `ArmSummary`: whether more is better, and what it is.
FIGURES: dict[str, tuple[bool, str]] = {
    "speedup": (True, "dense time over the arm's, the whole call"),
    "denoiser_speedup": (True, "dense time over the arm's, the transformer alone"),
    "density": (False, "share of attention kept, over all steps"),
}


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A bound on one figure.

    Attributes:
        figure: a name from `directions`.
        bound: least or greatest value that passes.
        is_minimum: which of the two.
    """

    figure: str
    bound: float
    is_minimum: bool


def directions() -> dict[str, tuple[bool, str]]:
    """Every figure that can be limited -> whether its limit is a minimum, and what it is."""
    metrics = {
        m.name: (m.higher_is_better, m.meaning)
        for m in METRICS.values()
        if m.higher_is_better is not None and (m.against_dense or m.name.startswith("vbench_"))
    }
    return FIGURES | metrics
