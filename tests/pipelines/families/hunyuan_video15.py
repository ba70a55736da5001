"""HunyuanVideo 1.5: three kinds of text, mostly padding; a guider."""

from families.registry import Family, embeddings, generator, padded

from sparsediff.testing import make_local, seeded

TEXT, GLYPHS, IMAGE = 12, 6, 4


def build():
    import diffusers
    from diffusers.guiders import ClassifierFreeGuidance

    with seeded(0):
        model = diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16,
            num_layers=2, num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=12,
            image_embed_dim=8, rope_axes_dim=(4, 6, 6), target_size=16, task_type="t2v",
        ).eval()  # fmt: skip
        vae = diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1
        ).eval()
    pipe = diffusers.HunyuanVideo15Pipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=make_local(model),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=None,
        tokenizer_2=None,
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
    )
    pipe.vision_num_semantic_tokens = IMAGE
    return pipe


def call(pipe, size, *, guidance, pad=0.0, steps=2, seed=0):
    height, width, frames = size
    texts = {}
    for prefix, words, glyphs, number in (
        ("", (5, 11), (2, 0), 0),
        ("negative_", (1, 2), (0, 1), 1),
    ):
        embeds, mask = padded(embeddings(2, TEXT, 16, seed=number), words, pad)
        embeds_2, mask_2 = padded(embeddings(2, GLYPHS, 12, seed=number), glyphs, pad)
        texts |= {
            f"{prefix}prompt_embeds": embeds,
            f"{prefix}prompt_embeds_mask": mask,
            f"{prefix}prompt_embeds_2": embeds_2,
            f"{prefix}prompt_embeds_mask_2": mask_2,
        }
    pipe.guider.guidance_scale = 1.0 if guidance == "off" else 3.0
    return pipe(
        **texts,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=steps,
        output_type="latent",
        generator=[generator(seed), generator(seed + 1)],
    ).frames


FAMILIES = [
    Family(
        name="hunyuan-video-1.5",
        build=build,
        call=call,
        sizes={
            (96, 128, 9): f"3x6x8 + {TEXT + GLYPHS + IMAGE} text",
            (112, 80, 13): f"4x7x5 + {TEXT + GLYPHS + IMAGE} text",
        },
        guidance=("sequential", "off"),
        outside=TEXT + GLYPHS + IMAGE,
        masks=True,
        compiled=3,  # the model asks whether there is an image
    ),
]
