"""Peak memory and energy of what ran between two moments, where the device tells."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory(device: torch.device) -> None:
    """Peaks count from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        with contextlib.suppress(
            OSError
        ):  # some containers forbid it: `peak_memory` then tells an older peak
            _CLEAR.write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Bytes: what torch had allocated on a CUDA device, or what the process held on a CPU; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    kibibytes = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None)
    return None if kibibytes is None else int(kibibytes) * 1024


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
