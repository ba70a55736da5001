"""Which generation, which step, which noise level: from what the pipeline says, not from counting attention calls.

Counting them breaks with guidance switched off, caches that skip layers, schedulers of higher order, two experts, and
exceptions.  What is read instead: a run lasts as long as the pipeline's progress bar; its step comes from the cache
context, the scheduler, the pipeline's current timestep or the timestep argument, in this order.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import Tensor

from sparsediff.noise_level import (
    NUM_TRAIN_TIMESTEPS,
    noise_level,
    noise_levels,
    timestep_values,
)


@dataclass(frozen=True)
class Tick:
    """The moment of one transformer call; `sigma` is the noise level in [0, 1] (`sparsediff.noise_level`)."""

    generation: int
    step: int
    num_steps: int | None
    sigma: float | None
    # of the steps after this one, where a pipeline's scheduler tells
    later_sigmas: tuple[float, ...] = ()


class Clock:
    """Follows the runs of one pipeline, and otherwise the timesteps of whoever calls the transformer.

    A run is open while the pipeline's progress bar is.  Calls outside one (a denoising loop of one's own, another
    pipeline that shares the transformer) are ordered by their timestep argument: a lower one is a step (or the same, where
    the pipeline's scheduler has stepped), a higher one or a named guidance branch that comes again is a new generation.  Two generations of one step each, at the same
    timestep and without a named branch, cannot be told apart: `begin_generation` separates them.
    """

    def __init__(self, pipe: object | None, num_steps: int | None = None) -> None:
        self._num_steps = num_steps  # of every generation, where no pipeline tells
        self._pipe = weakref.ref(pipe) if pipe is not None else lambda: None
        self._run: object = None  # the open run, if there is one
        self._timesteps: Tensor | None = None  # of the open run, by identity
        self._values: list[
            float
        ] = []  # those timesteps from the run's first on, and their noise levels
        self._levels: list[float] = []
        self._first = 0  # the scheduler's index of the run's first step
        self._current: object = None  # the pipeline's current timestep, by identity
        self._ended = True  # whether the next call outside a run starts a generation
        self._last_value: float | None = None
        self._last_index = 0  # of the scheduler, at the call before
        self._promised: int | None = None
        self._visited: set[tuple[object, str]] = set()  # named calls of this step, outside a run
        self.tick = Tick(-1, 0, None, None)

    def open_run(self) -> object:
        """The pipeline starts to denoise; returns what `close_run` wants."""
        self._run, self._timesteps = object(), None
        return self._run

    def close_run(self, run: object) -> None:
        """The pipeline has denoised, or was stopped.  A bar closes again when it is collected: old runs are ignored."""
        if run is self._run:
            self._run, self._timesteps, self._ended = None, None, True

    def begin_generation(self, num_steps: int | None = None) -> None:
        """Say that a new generation of `num_steps` steps starts; only custom denoising loops need to."""
        num_steps = self._num_steps if num_steps is None else num_steps
        self.tick = Tick(self.tick.generation + 1, 0, num_steps, None)
        self._last_value, self._current, self._promised = None, None, num_steps
        self._ended = False
        self._visited.clear()

    def read(
        self,
        timestep: Tensor | None,
        *,
        branch: str | None = None,
        step: int | None = None,
        who: object = None,
        context: int | None = None,
        rising: bool = False,
    ) -> Tick:
        """The tick of a call of transformer `who` with this `timestep` argument.

        `branch` and `step` are what the pipeline's cache context says, if there is one; `context` is for language models
        (`sparsediff.block_clock`); `rising` says that timesteps count up to the finished sample.
        """
        scheduler = getattr(self._pipe(), "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if self._run is not None and timesteps is not None:
            # Pipelines that denoise in segments set their timesteps anew for each.
            if timesteps is not self._timesteps:
                self._begin_pipeline_run(scheduler, timesteps, timestep)
            self.tick = self._read_run(scheduler, timestep, step)
        else:
            self.tick = self._read_timestep(scheduler, timestep, branch, who, rising)
        return self.tick

    def _begin_pipeline_run(
        self, scheduler: object, timesteps: Tensor, timestep: Tensor | None
    ) -> None:
        self.begin_generation()
        self._timesteps = timesteps
        # Read back to the host once a run.
        values, levels = timestep_values(scheduler), noise_levels(scheduler)
        first = getattr(scheduler, "begin_index", None)
        if first is None:
            # Video-to-video starts in the middle of the timesteps and need not tell the scheduler.
            first = 0 if timestep is None else _nearest(values, timestep)
        self._first, self._values, self._levels = first, values[first:], levels[first:]

    def _read_run(self, scheduler: object, timestep: Tensor | None, step: int | None) -> Tick:
        pipe = self._pipe()
        index = getattr(scheduler, "step_index", None)
        # None before the first step, and for ever where a pipeline steps copies of its scheduler (diffusion forcing).
        if step is None and index is not None:
            step = index - self._first
        elif step is None and getattr(pipe, "_current_timestep", None) is not None:
            current = pipe._current_timestep
            moved = self._current is not None and current is not self._current
            self._current = current
            step = self.tick.step + moved
        elif step is None:
            step = 0 if timestep is None else _nearest(self._values, timestep)
        step = min(max(step, 0), len(self._levels) - 1)
        levels = self._levels
        later = tuple(levels[step + 1 :])
        return Tick(self.tick.generation, step, len(levels), levels[step], later)

    def _read_timestep(
        self,
        scheduler: object,
        timestep: Tensor | None,
        branch: str | None,
        who: object,
        rising: bool,
    ) -> Tick:
        value = None if timestep is None else float(timestep.max())
        sigma = None if value is None else noise_level(scheduler, value)
        if rising and value is not None:
            value = NUM_TRAIN_TIMESTEPS - value
            # A scheduler of such a model knows; without one timesteps were taken for falling ones.
            sigma = sigma if scheduler is not None else 1.0 - sigma
        last = self._last_value
        # In half precision neighbouring steps may have the same timestep: a scheduler that has stepped says so.
        index = getattr(scheduler, "step_index", None) or 0
        stepped = value == last and index > self._last_index
        again = value == last and (who, branch) in self._visited and not stepped
        if self._ended or again or (None not in (value, last) and value > last):
            self.begin_generation()
            last = None
        moved = None not in (value, last) and (value < last or stepped)
        if moved:
            self._visited.clear()
        if branch is not None:
            self._visited.add((who, branch))
        self._last_value, self._last_index = value, index
        return Tick(self.tick.generation, self.tick.step + moved, self._promised, sigma)


def check_step_count(num_steps: object) -> None:
    """Refuse what is no number of denoising steps.

    Raises:
        ValueError: the message names the value.
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps must be a whole number >= 1, got {num_steps!r}")


def _nearest(values: list[float], timestep: Tensor) -> int:
    """The index of a timestep; 0 if there is none within a hundredth of their range."""
    value = float(timestep.max())
    index = min(range(len(values)), key=lambda i: abs(values[i] - value))
    return index if abs(values[index] - value) < 1e-2 * max(map(abs, values)) else 0
