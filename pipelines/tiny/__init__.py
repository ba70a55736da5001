"""Small video models that ship with the library: real diffusers pipelines, trained by us on rendered clips.

    pipe = sparsediff.pipelines.tiny.load("tiny-wan")
    video = pipe("a large red star spinning on a navy background", **sparsediff.pipelines.tiny.CALL).frames[0]

`train.py` is the recipe, `evaluate.py` measures whether prompts are obeyed, `premises.py` how sparse and how
coherent the attention is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

WEIGHTS = Path(__file__).parent / "weights"
MODELS = ("tiny-wan", "tiny-cogvideox")

# what the models were trained for; arguments of every pipeline here
CALL = {
    "height": 128,
    "width": 128,
    "num_frames": 33,
    "num_inference_steps": 20,
    "guidance_scale": 3.0,
}


def names() -> tuple[str, ...]:
    """The models whose weights are in this installation."""
    return tuple(name for name in MODELS if (WEIGHTS / name / "model_index.json").exists())


def load(
    name: str = "tiny-wan",
    *,
    torch_dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> DiffusionPipeline:
    """A stock diffusers pipeline from package data: no network, about a second, float32 unless told otherwise."""
    if name not in names():
        raise ValueError(
            f"no tiny model named {name!r}; this installation has: {', '.join(names()) or 'none'}"
        )
    return load_folder(WEIGHTS, name, torch_dtype=torch_dtype, device=device)


def load_folder(
    weights: Path,
    name: str,
    *,
    torch_dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> DiffusionPipeline:
    """`load` from any folder that `train.py export` wrote."""
    import torch
    from diffusers import AutoencoderKLWan, DiffusionPipeline

    from .models import COGVIDEOX_AUTOENCODER_CONFIG

    options = {dtype_keyword(): torch_dtype or torch.float32, "local_files_only": True}
    components = {}
    if (
        name == "tiny-cogvideox"
    ):  # it borrows the autoencoder, which lacks three entries this family reads
        vae = AutoencoderKLWan.from_pretrained(weights / "tiny-wan", subfolder="vae", **options)
        vae.register_to_config(**COGVIDEOX_AUTOENCODER_CONFIG)
        components["vae"] = vae
    pipe = DiffusionPipeline.from_pretrained(weights / name, **components, **options)
    return pipe.to(device) if device is not None else pipe


def dtype_keyword() -> str:
    """The precision argument of `from_pretrained`: diffusers 0.42 renamed it and warns about the old name."""
    from diffusers.utils import deprecation_utils

    return "dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype"
