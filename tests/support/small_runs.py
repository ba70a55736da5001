"""A short run of the tiny random Wan pipeline, and a place in one."""

import torch

from sparsediff import AttentionSite

LAYERS, BRANCHES = 2, 2
SMALL = {"height": 128, "width": 128, "num_frames": 17, "max_sequence_length": 16}


def site(grid, **changes):
    """An attention call over `grid` at the start of a run of ten steps."""
    values = {"layer": 0, "num_layers": 2, "step": 0, "num_steps": 10, "sigma": 1.0}
    return AttentionSite(**{**values, "branch": "cond", "grid": grid, **changes})


def generate(pipe, *, steps=3, seed=0, **changes):
    """Latents of one prompt; 5 x 8 x 8 tokens make five blocks of 64."""
    pipe.set_progress_bar_config(disable=True)
    call = {
        "prompt": "a small red circle moves left",
        "generator": torch.Generator().manual_seed(seed),
        **SMALL,
        **changes,
    }
    return pipe(num_inference_steps=steps, guidance_scale=3.0, output_type="latent", **call).frames
