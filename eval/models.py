"""A pipeline from a name, a folder or a model id, with the call it is made for."""

from __future__ import annotations

from pathlib import Path

import torch

from sparsediff.pipelines import tiny

RANDOM = "random-wan"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_request(model: str) -> dict[str, object]:
    """Fields of a `Request` that suit a bundled model; nothing for others, which have defaults of their own."""
    if model == RANDOM:
        return {
            "prompt": "a small red circle moves left",
            "steps": 4,
            "height": 128,
            "width": 128,
            "frames": 17,
        }
    if model in tiny.MODELS:
        call = tiny.CALL
        return {
            "prompt": "a large red star spinning on a navy background",
            "steps": call["num_inference_steps"],
            "guidance": call["guidance_scale"],
            "height": call["height"],
            "width": call["width"],
            "frames": call["num_frames"],
            # Trained with any padding; 512, the pipeline's default, would be attended to for nothing.
            "text_tokens": 64,
        }
    return {}


def check_name(model: str) -> None:
    """Refuse what cannot be a model before anything is loaded.

    Raises:
        ValueError: neither a bundled model, nor a folder, nor of the form owner/name.
    """
    if model == RANDOM or model in tiny.names() or "/" in model or Path(model).exists():
        return
    raise ValueError(
        f"unknown model {model!r}: bundled are {', '.join([*tiny.names(), RANDOM])}, there is no folder of that name, "
        "and a model id has the form owner/name"
    )


def load_pipeline(model: str, *, device: str | None = None, dtype: str | None = None):
    """Load a bundled model by name, a folder, or a model id through diffusers.

    On CUDA the default precision is bfloat16, on a CPU float32.

    Raises:
        ValueError: unknown name, device or precision.
        OSError: a model that can be neither found nor downloaded.
    """
    check_name(model)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; use cpu, cuda or cuda:0") from None
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; use --device cpu")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    torch_dtype = (
        DTYPES[dtype] if dtype else (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    )
    if model == RANDOM:
        from sparsediff.testing import random_wan_pipeline

        return random_wan_pipeline().to(device, torch_dtype)
    if model in tiny.names():
        return tiny.load(model, torch_dtype=torch_dtype, device=device)
    from diffusers import DiffusionPipeline

    try:
        pipe = DiffusionPipeline.from_pretrained(model, **{tiny.dtype_keyword(): torch_dtype})
    except OSError as error:
        raise OSError(f"cannot load {model}: {str(error).strip().splitlines()[0]}") from None
    return pipe.to(device)
