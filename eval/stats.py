"""Means with bootstrap intervals over prompts.

Clips differ from prompt to prompt far more than methods do, so arms are compared clip by clip, and the interval is over
prompts: the seeds of one prompt are no independent evidence and are averaged first.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000
FEW = 8  # prompts, below which a bootstrap interval is too narrow to lean on


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over prompts.

    Attributes:
        mean: over prompts, each the mean of its clips.
        low, high: ends of the 95 % percentile bootstrap interval; None for fewer than two prompts.
        n: prompts.
        clips: clips.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    clips: int

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference is larger than chance, as far as `n` prompts tell."""
        return self.low is not None and (self.low > 0 or self.high < 0)

    def format(self, digits: int = 2, *, sign: bool = False) -> str:
        """`28.41 (27.20 to 29.66)`; without an interval the mean alone."""
        number = f"{{:{'+' if sign else ''}.{digits}f}}"
        if self.low is None:
            return number.format(self.mean)
        return (
            f"{number.format(self.mean)} ({number.format(self.low)} to {number.format(self.high)})"
        )


def estimate(values: Iterable[tuple[Hashable, float]]) -> Estimate:
    """Mean of `(prompt, value)` with its interval; the same values always give the same interval.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    by_prompt: dict[Hashable, list[float]] = defaultdict(list)
    for prompt, value in values:
        if not math.isfinite(value):
            raise ValueError(f"a mean needs finite values, got {value}")
        by_prompt[prompt].append(value)
    if not by_prompt:
        raise ValueError("a mean needs at least one value")
    means = np.array([np.mean(v) for v in by_prompt.values()])
    low = high = None
    if len(means) > 1:
        draws = np.random.default_rng(0).integers(0, len(means), (RESAMPLES, len(means)))
        tail = (1 - LEVEL) / 2
        low, high = (float(x) for x in np.quantile(means[draws].mean(1), [tail, 1 - tail]))
    clips = sum(len(v) for v in by_prompt.values())
    return Estimate(mean=float(means.mean()), low=low, high=high, n=len(means), clips=clips)


def ratio_estimate(pairs: Iterable[tuple[Hashable, float, float]]) -> Estimate:
    """Geometric mean of `numerator / denominator` of `(prompt, numerator, denominator)`, both positive."""
    logs = estimate((prompt, math.log(a / b)) for prompt, a, b in pairs)
    low, high = (None if x is None else math.exp(x) for x in (logs.low, logs.high))
    return Estimate(mean=math.exp(logs.mean), low=low, high=high, n=logs.n, clips=logs.clips)
