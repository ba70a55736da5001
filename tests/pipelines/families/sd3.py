"""Stable Diffusion 3 and 3.5: one image, text last; 3.5 medium has a second attention over the image alone."""

from functools import partial

from families.registry import Family, embeddings, generator

from sparsediff.testing import make_local, seeded

TEXT, CHANNELS = 20, 16
PARTS = (
    "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3",
    "tokenizer_3",
)  # fmt: skip


def build(**changes):
    import diffusers

    sizes = {
        "sample_size": 32, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
        "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": CHANNELS,
        "caption_projection_dim": 32, "pooled_projection_dim": 8, "pos_embed_max_size": 32,
    }  # fmt: skip
    with seeded(0):
        model = diffusers.SD3Transformer2DModel(**{**sizes, **changes}).eval()
    return diffusers.StableDiffusion3Pipeline(
        transformer=make_local(model),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **dict.fromkeys(PARTS),
    )


def call(pipe, size, *, guidance, pad=0.0, steps=2, seed=0, **options):
    height, width, _ = size
    return pipe(
        prompt_embeds=embeddings(1, TEXT, CHANNELS),
        pooled_prompt_embeds=embeddings(1, 8),
        negative_prompt_embeds=embeddings(1, TEXT, CHANNELS, seed=1),
        negative_pooled_prompt_embeds=embeddings(1, 8, seed=1),
        guidance_scale=1.0 if guidance == "off" else 3.0,
        height=height,
        width=width,
        num_inference_steps=steps,
        output_type="latent",
        generator=generator(seed),
        **options,
    ).images


def family(name, outside=TEXT, **changes):
    return Family(
        name=name,
        build=partial(build, **changes),
        call=call,
        sizes={
            (256, 256, 1): f"1x16x16 + {TEXT} text",
            (208, 272, 1): f"1x13x17 + {TEXT} text",
        },
        guidance=("batched", "off"),
        outside=outside,
    )


FAMILIES = [
    family("sd3"),
    family("sd3.5-medium", outside=(0, TEXT), dual_attention_layers=(0,), qk_norm="rms_norm"),
]
