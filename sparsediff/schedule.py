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
        dense_above_sigma: steps whose noise level is above this, in [0, 1] (`timestep / num_train_timesteps`, which
            is sigma in flow matching).  Unlike a count it means the same for 50 steps and for a 4-step LoRA.
        dense_layers: the first transformer layers.
    """

    dense_steps: int | float = 0
    dense_above_sigma: float | None = None
    dense_layers: int = 0

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
        limit = self.dense_above_sigma
        if limit is not None and not isinstance(limit, int | float):
            raise TypeError(f"dense_above_sigma must be a number in [0, 1], got {limit!r}")
        if limit is not None and not 0.0 <= limit <= 1.0:
            raise ValueError(f"dense_above_sigma must be in [0, 1], got {limit}")
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
            # Round up: asking for a share of dense steps must not give less.
            first = math.ceil(self.dense_steps * site.num_steps - 1e-9)
        else:
            first = int(self.dense_steps)
        if site.step < first:
            return "schedule: first steps"
        limit = self.dense_above_sigma
        if limit is not None and site.sigma is not None and site.sigma > limit:
            return "schedule: high noise"
        if site.layer < self.dense_layers:
            return "schedule: first layers"
        return None
