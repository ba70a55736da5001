"""Which generation, which step, which noise level: from what the pipeline says, never from counting calls.

Counting breaks with guidance switched off, caches that skip layers, schedulers of higher order, two experts, and
exceptions.  What is read instead: `scheduler.timesteps` is a new tensor for every run; the step comes from the cache
context, the scheduler, or the pipeline's current timestep, in this order.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000  # what timesteps count to where no scheduler says otherwise


@dataclass(frozen=True)
class Tick:
    """The moment of one transformer call."""

    generation: int
    step: int
    num_steps: int | None
    sigma: float | None


class Clock:
    """Follows one pipeline, or a bare transformer if `pipe` is None.

    A transformer called from elsewhere (another pipeline that shares it, a loop of one's own) is followed by its
    timesteps.  Two such generations that cannot be told apart, of one step each and without a named cache context, are
    taken for one: `begin_generation` separates them.
    """

    def __init__(self, pipe: object | None) -> None:
        self._pipe = weakref.ref(pipe) if pipe is not None else lambda: None
        # Whatever timesteps the scheduler holds now belong to an earlier run.
        self._timesteps = getattr(self._scheduler(), "timesteps", None)
        self._levels: list[float] | None = (
            None  # noise levels of the pipeline's run; None outside one
        )
        self._first = 0  # the scheduler's index of the run's first step
        self._current: object = None  # the pipeline's current timestep, by identity
        self._last_value: float | None = None  # bare transformer only
        self._promised: int | None = None
        self._visited: set[tuple[object, str]] = set()  # named calls of this step
        self.tick = Tick(-1, 0, None, None)

    def begin_generation(self, num_steps: int | None = None) -> None:
        """Say that a new generation of `num_steps` steps starts; only custom denoising loops need to."""
        self.tick = Tick(self.tick.generation + 1, 0, num_steps, None)
        self._last_value, self._current, self._promised = None, None, num_steps
        self._levels = None
        self._visited.clear()

    def read(
        self,
        timestep: Tensor | None,
        *,
        branch: str | None = None,
        step: int | None = None,
        who: object = None,
    ) -> Tick:
        """The tick of a call of transformer `who` with this `timestep` argument.

        `branch` and `step` are what the pipeline's cache context says, if there is one.
        """
        scheduler = self._scheduler()
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is not None and timesteps is not self._timesteps:
            self._begin_pipeline_run(scheduler, timesteps, timestep)
        tick = self._read_pipeline(scheduler, step) if self._levels is not None else None
        if tick is None or self._contradicts(tick, branch, who):
            if self._levels is not None:
                self.begin_generation()
            tick = self._read_bare(timestep, branch, who)
        if (tick.generation, tick.step) != (self.tick.generation, self.tick.step):
            self._visited.clear()
        if branch is not None:
            self._visited.add((who, branch))
        self.tick = tick
        return tick

    def _contradicts(self, tick: Tick, branch: str | None, who: object) -> bool:
        """Whether this call cannot belong to the run: it goes back, or calls one branch twice in a step."""
        return tick.step < self.tick.step or (
            tick.step == self.tick.step and (who, branch) in self._visited
        )

    def _begin_pipeline_run(
        self, scheduler: object, timesteps: Tensor, timestep: Tensor | None
    ) -> None:
        self.begin_generation()
        self._timesteps = timesteps
        scale = getattr(scheduler.config, "num_train_timesteps", NUM_TRAIN_TIMESTEPS)
        # One read back to the host a run.
        levels = [float(t) / scale for t in torch.as_tensor(timesteps).tolist()]
        first = getattr(scheduler, "begin_index", None)
        if first is None:
            # Video-to-video starts in the middle of the timesteps and need not tell the scheduler.
            first = 0 if timestep is None else _nearest(levels, float(timestep.max()) / scale)
        self._first, self._levels = first, levels[first:]

    def _read_pipeline(self, scheduler: object, step: int | None) -> Tick | None:
        """The tick as the pipeline's run has it, or None when that run is over."""
        if step is None and hasattr(scheduler, "step_index"):
            index = scheduler.step_index
            step = 0 if index is None else index - self._first
        elif step is None:
            current = getattr(self._pipe(), "_current_timestep", None)
            moved = self._current is not None and current is not self._current
            self._current = current
            step = self.tick.step + moved
        if not 0 <= step < len(self._levels):
            return None
        return Tick(self.tick.generation, step, len(self._levels), self._levels[step])

    def _read_bare(self, timestep: Tensor | None, branch: str | None, who: object) -> Tick:
        if timestep is None:
            return Tick(max(self.tick.generation, 0), self.tick.step, self._promised, None)
        value, last = float(timestep.max()), self._last_value
        again = last == value and (who, branch) in self._visited
        if self.tick.generation < 0 or again or (last is not None and value > last):
            self.begin_generation()
            last = None
        self._last_value = value
        step = self.tick.step + (last is not None and value < last)
        return Tick(self.tick.generation, step, self._promised, value / NUM_TRAIN_TIMESTEPS)

    def _scheduler(self) -> object | None:
        return getattr(self._pipe(), "scheduler", None)


def _nearest(levels: list[float], level: float) -> int:
    index = min(range(len(levels)), key=lambda i: abs(levels[i] - level))
    return index if abs(levels[index] - level) < 1e-2 else 0
