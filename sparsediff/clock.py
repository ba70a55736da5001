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

NUM_TRAIN_TIMESTEPS = (
    1000  # what a transformer's timestep argument counts to where no scheduler says otherwise
)


@dataclass(frozen=True)
class Tick:
    """The moment of one transformer call."""

    generation: int
    step: int
    num_steps: int | None
    sigma: float | None


class Clock:
    """Follows one pipeline, or a bare transformer if `pipe` is None."""

    def __init__(self, pipe: object | None) -> None:
        self._pipe = weakref.ref(pipe) if pipe is not None else lambda: None
        scheduler = self._scheduler()
        # Whatever timesteps the scheduler holds now belong to an earlier run.
        self._timesteps = getattr(scheduler, "timesteps", None)
        self._levels: list[float] = []
        self._begin = 0
        self._current: object = None  # the pipeline's current timestep, by identity
        self._last_value: float | None = None  # bare transformer only
        self._promised: int | None = None
        self._in_pipeline = False
        self.tick = Tick(-1, 0, None, None)

    def begin_generation(self, num_steps: int | None = None) -> None:
        """Say that a new generation of `num_steps` steps starts; only custom denoising loops need to."""
        self.tick = Tick(self.tick.generation + 1, 0, num_steps, None)
        self._last_value, self._current, self._promised = None, None, num_steps
        self._in_pipeline = False

    def read(self, timestep: Tensor | None, context: object | None) -> Tick:
        """The tick of a transformer call with this `timestep` argument inside this cache context."""
        scheduler = self._scheduler()
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is not None and timesteps is not self._timesteps:
            self._begin_pipeline_run(scheduler, timesteps)
        if self._in_pipeline:
            step = self._pipeline_step(scheduler, context)
            if step < len(self._levels) - self._begin:
                sigma = self._levels[self._begin + step]
                self.tick = Tick(self.tick.generation, step, len(self._levels) - self._begin, sigma)
                return self.tick
            self._in_pipeline = False  # the run is over: somebody calls the transformer directly
            self._last_value = self._promised = None
        self.tick = self._read_bare(timestep)
        return self.tick

    def _begin_pipeline_run(self, scheduler: object, timesteps: Tensor) -> None:
        self.begin_generation()
        self._timesteps, self._in_pipeline = timesteps, True
        scale = getattr(scheduler.config, "num_train_timesteps", NUM_TRAIN_TIMESTEPS)
        # One read back to the host a run.
        self._levels = [float(t) / scale for t in torch.as_tensor(timesteps).tolist()]
        self._begin = getattr(scheduler, "begin_index", None) or 0

    def _pipeline_step(self, scheduler: object, context: object | None) -> int:
        step = getattr(context, "step_index", None)
        if step is not None:
            return step
        if hasattr(scheduler, "step_index"):
            index = scheduler.step_index
            return 0 if index is None else index - self._begin
        current = getattr(self._pipe(), "_current_timestep", None)
        if self._current is None or current is self._current:
            self._current = current
            return self.tick.step
        self._current = current
        return self.tick.step + 1

    def _read_bare(self, timestep: Tensor | None) -> Tick:
        if timestep is None:
            return Tick(max(self.tick.generation, 0), self.tick.step, self._promised, None)
        value = float(timestep.max())
        generation, step = self.tick.generation, self.tick.step
        if generation < 0 or (self._last_value is not None and value > self._last_value):
            generation, step = generation + 1, 0
        elif self._last_value is not None and value < self._last_value:
            step += 1
        elif self._last_value is None:
            step = 0
        self._last_value = value
        return Tick(generation, step, self._promised, value / NUM_TRAIN_TIMESTEPS)

    def _scheduler(self) -> object | None:
        return getattr(self._pipe(), "scheduler", None)
