"""Flux.2 and klein: text first, one image, reference images last; single blocks of a class of their own."""

from functools import partial

from families.registry import Family, embeddings, generator
from PIL import Image

from sparsediff.testing import seeded

TEXT, CHANNELS, REFERENCE = 20, 16, 64


def build(pipeline="Flux2Pipeline", **options):
    import diffusers

    with seeded(0):
        model = diffusers.Flux2Transformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=CHANNELS, axes_dims_rope=(2, 4, 6, 4),
            timestep_guidance_channels=8, guidance_embeds=pipeline == "Flux2Pipeline",
        ).eval()  # fmt: skip
        vae = diffusers.AutoencoderKLFlux2(
            latent_channels=4, layers_per_block=1, norm_num_groups=2,
            block_out_channels=(4, 4, 4, 4), mid_block_add_attention=False,
        ).eval()  # fmt: skip
    return getattr(diffusers, pipeline)(
        transformer=model,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        **options,
    )


def call(pipe, size, *, guidance, pad=0.0, steps=2, seed=0, **options):
    height, width, _ = size
    if guidance == "sequential":
        options["negative_prompt_embeds"] = embeddings(1, TEXT, CHANNELS, seed=1)
    return pipe(
        prompt_embeds=embeddings(1, TEXT, CHANNELS),
        guidance_scale=3.0 if guidance == "sequential" else 1.0,
        height=height,
        width=width,
        num_inference_steps=steps,
        output_type="latent",
        generator=generator(seed),
        **options,
    ).images


def call_with_reference(pipe, size, **options):
    return call(pipe, size, image=Image.new("RGB", (128, 128), "red"), **options)


KLEIN = partial(build, "Flux2KleinPipeline", is_distilled=False)

FAMILIES = [
    Family(
        name="flux2",
        build=build,
        call=call,
        sizes={
            (256, 256, 1): f"{TEXT} text + 1x16x16",
            (208, 272, 1): f"{TEXT} text + 1x13x17",
        },
        guidance=("off",),
        outside=TEXT,
        lora=("to_q", "to_v", "to_qkv_mlp_proj"),
    ),
    Family(
        name="flux2-klein-edit",
        build=KLEIN,
        call=call_with_reference,
        sizes={
            (256, 256, 1): f"{TEXT} text + 1x16x16 + {REFERENCE} image",
            (208, 272, 1): f"{TEXT} text + 1x13x17 + {REFERENCE} image",
        },
        guidance=("sequential", "off"),
        outside=TEXT + REFERENCE,
        lora=("to_q", "to_v", "to_qkv_mlp_proj"),
    ),
]
