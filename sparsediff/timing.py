"""How long something takes here and now: for choices that depend on the device, not for benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch


def seconds(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Median time of `run` after one call that does not count."""
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - started)
    return median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
