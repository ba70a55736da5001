"""What a figure depends on beside the code that was measured: versions, device, commit."""

from __future__ import annotations

import platform

import torch

import sparsediff
from sparsediff.kernels.bench_inputs import cpu_name
from sparsediff.kernels.bench_inputs import git_commit as git_commit


def environment(device: torch.device | None = None) -> dict[str, str]:
    """Versions and device; without one, the first CUDA device or the CPU."""
    import diffusers
    import transformers

    cuda = torch.cuda.is_available() if device is None else device.type == "cuda"
    found = {
        "sparsediff": sparsediff.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "threads": str(torch.get_num_threads()),
    }
    return found | ({"cuda": str(torch.version.cuda)} if cuda else {})
