"""When to stay dense.  Pure: which blocks to read is a `Method`'s business."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsediff.methods import AttentionSite

UNKNOWN_STEPS = "schedule: a fraction of an unknown number of steps; handle.begin_generation(num_steps) tells it"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which attention calls of a generation run dense.  A call is dense if any of the fields says so.

    Early steps fix the layout of the picture and early layers feed all others, so these are the ones to protect.

    Attributes:
        dense_steps: the first denoising steps: a count if `int`, a fraction of the steps if `float` (`1.0` is a
            wholly dense run).
        dense_above_sigma: steps whose noise level is above this, in [0, 1]: sigma in flow matching, and the same share
            of noise under any other scheduler (`sparsediff.noise_level`).  Unlike a count it means the same for 50
            steps and for a 4-step LoRA.
        dense_layers: the first transformer layers.
        min_dense_share: beside `dense_above_sigma`, the least share of the steps: a scheduler may start below that
            noise level.  Says nothing where the number of steps is unknown.
    """

    dense_steps: int | float = 0
    dense_above_sigma: float | None = None
    dense_layers: int = 0
    min_dense_share: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.dense_steps, bool) or not isinstance(self.dense_steps, int | float):
            raise TypeError(
                f"dense_steps must be a count (int) or a fraction (float), got {self.dense_steps!r}"
            )
        if isinstance(self.dense_steps, float) and not 0.0 <= self.dense_steps <= 1.0:
            raise ValueError(
                f"dense_steps as a float is a fraction in [0, 1], got {self.dense_steps}; use an int for a count"
            )
        if self.dense_steps < 0:
            raise ValueError(f"dense_steps must be >= 0, got {self.dense_steps}")
        for name in ("dense_above_sigma", "min_dense_share"):
            share = getattr(self, name)
            if name == "dense_above_sigma" and share is None:
                continue
            if isinstance(share, bool) or not isinstance(share, int | float):
                raise TypeError(f"{name} must be a number in [0, 1], got {share!r}")
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {share}")
        if isinstance(self.dense_layers, bool) or not isinstance(self.dense_layers, int):
            raise TypeError(f"dense_layers must be a count, got {self.dense_layers!r}")
        if self.dense_layers < 0:
            raise ValueError(f"dense_layers must be >= 0, got {self.dense_layers}")

    @property
    def needs_step_count(self) -> bool:
        """Whether the number of steps must be known, which a bare transformer cannot tell."""
        return isinstance(self.dense_steps, float) and 0.0 < self.dense_steps < 1.0

    @property
    def is_all_dense(self) -> bool:
        """Whether no call can ever be sparse."""
        return isinstance(self.dense_steps, float) and self.dense_steps == 1.0

    def dense_reason(self, site: AttentionSite) -> str | None:
        """Why this call is dense, or None if the method decides."""
        if self.is_all_dense:
            return "schedule: every step"
        if self.needs_step_count:
            if site.num_steps is None:
                return UNKNOWN_STEPS
            first = _round_up(self.dense_steps * site.num_steps)
        else:
            first = int(self.dense_steps)
        if site.num_steps is not None:
            first = max(first, _round_up(self.min_dense_share * site.num_steps))
        if site.step < first:
            return "schedule: first steps"
        limit = self.dense_above_sigma
        if limit is not None and site.sigma is not None and site.sigma > limit:
            return "schedule: high noise"
        if site.layer < self.dense_layers:
            return "schedule: first layers"
        return None


def _round_up(steps: float) -> int:
    """Asking for a share of dense steps must not give less."""
    return math.ceil(steps - 1e-9)
