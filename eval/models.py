"""A pipeline from a name, a folder or a model id, with the call it is made for."""

from __future__ import annotations

from pathlib import Path

import torch

from sparsediff.pipelines import tiny

RANDOM = "random-wan"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(model: str, *, device: str | None = None, dtype: str | None = None):
    """Load a bundled model by name, a folder, or a model id through diffusers.

    On CUDA the default precision is bfloat16, on a CPU float32.

    Raises:
        ValueError: unknown name, device or precision.
        OSError: a model that can be neither found nor downloaded.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; use --device cpu")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    torch_dtype = DTYPES[dtype] if dtype else (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    if model == RANDOM:
        from sparsediff.testing import random_wan_pipeline

        return random_wan_pipeline().to(device, torch_dtype)
    if model in tiny.names():
        return tiny.load(model, torch_dtype=torch_dtype, device=device)
    if "/" not in model and not Path(model).exists():
        raise ValueError(
            f"unknown model {model!r}: not one of the bundled {', '.join(tiny.names())}, no folder of that name, and a "
            "model id has the form owner/name"
        )
    from diffusers import DiffusionPipeline

    try:
        pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=torch_dtype)
    except OSError as error:
        raise OSError(f"cannot load {model}: {str(error).strip().splitlines()[0]}") from None
    return pipe.to(device)
