"""Chroma: Flux.1's blocks, and a mask over pairs of tokens."""

import warnings

import torch
from families.registry import Family, embeddings, generator, padded

from sparsediff.testing import make_local, seeded

TEXT, CHANNELS = 20, 16


def build():
    import diffusers

    with seeded(0), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "`FluxPosEmbed` is deprecated"
        )  # diffusers' own use of it
        model = diffusers.ChromaTransformer2DModel(
            in_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
            num_single_layers=2, joint_attention_dim=CHANNELS, axes_dims_rope=(4, 6, 6),
            approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1,
        ).eval()  # fmt: skip
    return diffusers.ChromaPipeline(
        transformer=make_local(model),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,
        text_encoder=None,
        tokenizer=None,
    )


def call(pipe, size, *, guidance, pad=0.0, steps=2, seed=0, mask_dtype=torch.bool):
    """`mask_dtype`: what the pipeline itself makes of a prompt is float."""
    height, width, _ = size
    prompt, mask = padded(embeddings(2, TEXT, CHANNELS), (7, 19), pad)
    negative, negative_mask = padded(embeddings(2, TEXT, CHANNELS, seed=1), (3, 1), pad)
    return pipe(
        prompt_embeds=prompt,
        prompt_attention_mask=mask.to(mask_dtype),
        negative_prompt_embeds=negative,
        negative_prompt_attention_mask=negative_mask.to(mask_dtype),
        guidance_scale=1.0 if guidance == "off" else 3.0,
        height=height,
        width=width,
        num_inference_steps=steps,
        output_type="latent",
        generator=[generator(seed), generator(seed + 1)],
    ).images


FAMILIES = [
    Family(
        name="chroma",
        build=build,
        call=call,
        sizes={
            (256, 256, 1): f"{TEXT} text + 1x16x16",
            (208, 272, 1): f"{TEXT} text + 1x13x17",
        },
        guidance=("off", "sequential"),
        outside=TEXT,
        masks=True,
    ),
]
