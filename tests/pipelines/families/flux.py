"""Flux.1: text first, one image; Kontext appends a reference image."""

from functools import partial

import torch
from families.registry import Family, embeddings, generator

from sparsediff.testing import make_local, seeded

TEXT, WORDS, REFERENCE = 20, 16, 64
PARTS = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


def build(pipeline="FluxPipeline", **changes):
    import diffusers

    sizes = {
        "in_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
        "num_single_layers": 2, "joint_attention_dim": WORDS, "pooled_projection_dim": 8,
        "axes_dims_rope": (4, 6, 6), "guidance_embeds": True,
    }  # fmt: skip
    with seeded(0):
        model = diffusers.FluxTransformer2DModel(**{**sizes, **changes}).eval()
    return getattr(diffusers, pipeline)(
        transformer=make_local(model),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **dict.fromkeys(PARTS),
    )


def call(pipe, size, *, guidance, pad=0.0, steps=2, seed=0, **options):
    height, width, _ = size
    return pipe(
        prompt_embeds=embeddings(1, TEXT, WORDS),
        pooled_prompt_embeds=embeddings(1, 8),
        negative_prompt_embeds=embeddings(1, TEXT, WORDS, seed=1),
        negative_pooled_prompt_embeds=embeddings(1, 8, seed=1),
        true_cfg_scale=1.0 if guidance == "off" else 3.0,
        height=height,
        width=width,
        num_inference_steps=steps,
        output_type="latent",
        generator=generator(seed),
        **options,
    ).images


def call_kontext(pipe, size, **options):
    # 8x8 tokens, given as latents, which are not encoded again.
    height, width, _ = size
    reference = torch.randn(1, 16, 16, 16, generator=generator(7))
    return call(pipe, size, image=reference, max_area=height * width, _auto_resize=False, **options)


FAMILIES = [
    Family(
        name="flux",
        build=build,
        call=call,
        sizes={
            (256, 256, 1): f"{TEXT} text + 1x16x16",
            (208, 272, 1): f"{TEXT} text + 1x13x17",
        },
        guidance=("off", "sequential"),
        outside=TEXT,
    ),
    Family(
        name="flux-kontext",
        build=partial(build, "FluxKontextPipeline", in_channels=64),
        call=call_kontext,
        sizes={
            (256, 256, 1): f"{TEXT} text + 1x16x16 + {REFERENCE} image",
            (208, 272, 1): f"{TEXT} text + 1x13x17 + {REFERENCE} image",
        },
        guidance=("off", "sequential"),
        outside=TEXT + REFERENCE,
    ),
]
