"""Density and estimated speed-up in the pipeline's own progress bar."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator

import torch

from sparsediff.recorder import Recorder


def show_density(bar: object, recorder: Recorder) -> object:
    """Make `bar.update()` show the numbers of `recorder` as well; a disabled bar is returned as it is."""
    if not getattr(bar, "disable", False) and hasattr(bar, "set_postfix_str"):
        bar.update = _Update(bar, recorder)
    return bar


@contextlib.contextmanager
def step_bar(pipe: object, *, shown: bool) -> Iterator[None]:
    """The pipeline's own bar over its steps, below a bar over generations while it runs, or no bar at all."""
    before = getattr(pipe, "_progress_bar_config", None)
    ours = {"disable": not shown, "leave": False, "desc": "  steps"}
    pipe.set_progress_bar_config(**{**(before or {}), **ours})
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before


class _Update:
    """Shows the numbers of the last step whose work the device has finished; never waits for it."""

    def __init__(self, bar: object, recorder: Recorder) -> None:
        self._bar, self._recorder = bar, recorder
        self._update, self._pending = bar.update, deque()

    def __call__(self, n: int = 1):
        recorder = self._recorder
        if (folded := recorder.fold()) is not None:
            self._pending.append(_read_later(folded))
        numbers = None
        while self._pending and (self._pending[0][1] is None or self._pending[0][1].query()):
            numbers = self._pending.popleft()[0].tolist()
        if numbers is not None:
            text = f"density {numbers[0]:.2f}"
            speedup = recorder.estimate_speedup(numbers[1])
            if speedup is not None:
                text += f", ~{speedup:.2f}x so far"
            self._bar.set_postfix_str(text, refresh=False)
        return self._update(n)


def _read_later(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """The numbers on the host, and the event after which they are there."""
    if numbers.device.type != "cuda":
        return numbers, None
    host = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(
        numbers, non_blocking=True
    )
    event = torch.cuda.Event()
    event.record()
    return host, event
