"""How long something takes: marks that never wait for the device, and a quick measurement for choices made here and now."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

Mark = (
    torch.cuda.Event | float
)  # a moment: on the device's stream, or of the host's clock in seconds


def mark(device: torch.device) -> Mark:
    """Now: a CUDA event on the device's stream, which nobody waits for, or seconds."""
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    return time.perf_counter()


def seconds_between(start: Mark, stop: Mark) -> float:
    """Waits for the device to reach `stop`."""
    if isinstance(start, float):
        return stop - start
    stop.synchronize()
    return start.elapsed_time(stop) / 1000.0


def seconds(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Median time of `run` after one call that does not count; for choices that depend on the device, not for benchmarks."""
    times = []
    for _ in range(repeats + 1):
        wait(device)
        started = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - started)
    return median(times[1:])


def wait(device: torch.device) -> None:
    """Until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
