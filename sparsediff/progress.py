"""Density and estimated speed-up in the pipeline's own progress bar."""

from __future__ import annotations

import weakref
from collections import deque

import torch

from sparsediff.recorder import Recorder


class ProgressBar:
    """Replaces `pipe.progress_bar` on one pipeline; `restore` puts the method of its class back."""

    def __init__(self, pipe: object, recorder: Recorder) -> None:
        self._pipe = weakref.ref(pipe)
        self._recorder = recorder
        self._stock = pipe.progress_bar
        self._had_own = "progress_bar" in vars(pipe)
        pipe.progress_bar = self._open

    def restore(self) -> None:
        """Undo, unless somebody else has replaced the method since."""
        pipe = self._pipe()
        if pipe is None or vars(pipe).get("progress_bar") != self._open:
            return
        if self._had_own:
            pipe.progress_bar = self._stock
        else:
            del pipe.progress_bar

    @torch.compiler.disable
    def _open(self, iterable=None, total=None):
        bar = self._stock(iterable=iterable, total=total)
        if not getattr(bar, "disable", False) and hasattr(bar, "set_postfix_str"):
            _Postfix(bar, self._recorder)
        return bar


class _Postfix:
    """Adds the numbers of the last step whose work the device has finished; never waits for it."""

    def __init__(self, bar: object, recorder: Recorder) -> None:
        self._bar, self._recorder = bar, recorder
        self._update, self._pending = bar.update, deque()
        bar.update = self.update

    def update(self, n: int = 1):
        recorder = self._recorder
        if recorder.calls:
            self._pending.append(_read_later(recorder.step_density(recorder.calls[-1].step)))
        text = None
        while self._pending and (self._pending[0][1] is None or self._pending[0][1].query()):
            text = f"density {float(self._pending.popleft()[0]):.2f}"
        if text is not None:
            on_cpu = all(
                c.density is None or c.density.device.type == "cpu" for c in recorder.calls
            )
            speedup = recorder.estimate_speedup() if on_cpu else None
            if speedup is not None:
                text += f", ~{speedup:.2f}x so far"
            self._bar.set_postfix_str(text, refresh=False)
        return self._update(n)


def _read_later(density) -> tuple[object, torch.cuda.Event | None]:
    if not isinstance(density, torch.Tensor) or density.device.type != "cuda":
        return density, None
    host = torch.empty((), dtype=density.dtype, pin_memory=True).copy_(density, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event
