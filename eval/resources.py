"""Peak memory and energy of what ran between two moments, where the device tells."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_BATCHES_KIB = 4096


class PeakMemory:
    """The most memory between two moments: what torch had allocated on a CUDA device, or what the process held on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._older: int | None = None

    def start(self) -> None:
        """From now on."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        with contextlib.suppress(OSError):  # some containers forbid it, others accept it in vain
            _CLEAR.write_text("5")
        peak, held = _kibibytes("VmHWM"), _kibibytes("VmRSS")
        # The kernel counts resident pages in batches: an honest reset leaves a peak a little off what is held.
        forgotten = peak is not None and held is not None and peak - held <= _BATCHES_KIB
        self._older = None if forgotten else peak

    def stop(self) -> int | None:
        """Bytes; None where nobody tells, or where the peak is one from before `start` that was not passed since."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        peak = _kibibytes("VmHWM")
        if peak is None or (self._older is not None and peak <= self._older):
            return None
        return peak * 1024


def _kibibytes(name: str) -> int | None:
    """A line of the kernel's report on this process."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


class EnergyMeter:
    """The energy counter of an NVIDIA device, of all that runs on it; tells None elsewhere or without `nvidia-ml-py`."""

    def __init__(self, device: torch.device) -> None:
        self._handle = _nvml_handle(device) if device.type == "cuda" else None
        self._begun: int | None = None

    def start(self) -> None:
        """From now on."""
        self._begun = self._read()

    def stop(self) -> float | None:
        """Joules since `start`."""
        now = self._read()
        return None if now is None or self._begun is None else (now - self._begun) / 1000.0

    def _read(self) -> int | None:
        if self._handle is None:
            return None
        import pynvml

        try:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)  # millijoules
        except pynvml.NVMLError:  # cards before Volta do not count
            return None


def _nvml_handle(device: torch.device) -> object | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        # Not by number: CUDA_VISIBLE_DEVICES renumbers for torch and not for the driver.
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
    except pynvml.NVMLError:
        return None
