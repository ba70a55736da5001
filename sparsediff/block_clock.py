"""Which generation and which step, for language models that denoise one block of tokens after another.

They have no timestep argument and no cache context, and the pipeline's progress bar, where there is one, may last one
block (LLaDA2's in diffusers 0.38) or all of them.  What is read instead:
`scheduler.set_timesteps` is called once a generation and leaves a new tensor, and a longer context is the next block.
"""

from __future__ import annotations

from torch import Tensor

from sparsediff.clock import Clock, Tick
from sparsediff.noise_level import noise_levels


class BlockClock(Clock):
    """Follows the blocks of one pipeline, and otherwise the context of whoever calls the model.

    Steps are counted through all blocks: block `b` starts at step `b * steps a block`, also if the blocks before it
    were done sooner, so that a share of the steps is a share of the text.  Further calls in a block that has had all
    its steps (edits after the last) count as its last.

    Without a pipeline, a context that grows is the next block and one that shrinks a new generation; two generations
    with the same context cannot be told apart, and neither can their steps be counted beforehand:
    `begin_generation` does both.
    """

    def __init__(self, pipe: object | None, num_steps: int | None = None) -> None:
        super().__init__(pipe, num_steps)
        self._total: int | None = None
        self._context: int | None = None
        self._first_step = 0  # of this block
        self._calls = 0  # of the model in this block

    def open_run(self) -> object:
        """A bar says nothing here."""
        return None

    def close_run(self, run: object) -> None:
        """A bar says nothing here."""

    def begin_generation(self, num_steps: int | None = None) -> None:
        """Say that a new generation of `num_steps` model calls starts; only loops of one's own need to."""
        super().begin_generation(num_steps)
        self._total = self.tick.num_steps
        self._context, self._first_step, self._calls = None, 0, 0

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
        """The tick of a call of the model with `context` tokens; the other arguments are those of `Clock.read`."""
        pipe = self._pipe()
        scheduler = getattr(pipe, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is not None and timesteps is not self._timesteps:
            self._ended, self._timesteps = True, timesteps
            self._levels = noise_levels(scheduler)
        if self._ended or (self._context is not None and context < self._context):
            self.begin_generation()
            self._total = getattr(pipe, "_num_timesteps", self._total)
        if self._context is not None and context > self._context:
            self._first_step += len(self._levels) or self._calls
            self._calls = 0
        self._context = context
        self.tick = self._tick()
        self._calls += 1
        return self.tick

    def _tick(self) -> Tick:
        inside, level = self._calls, None
        if self._levels:
            inside = min(inside, len(self._levels) - 1)
            level = self._levels[inside]
        step = self._first_step + inside
        if self._total is not None:
            step = min(step, self._total - 1)
        return Tick(self.tick.generation, step, self._total, level)
