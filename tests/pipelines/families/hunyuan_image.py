"""HunyuanImage 2.1: two kinds of text, mostly padding, and a guider; its refiner has one frame and one kind of text."""

from functools import partial

from families.registry import Family, embeddings, generator, padded

from sparsediff.testing import make_local, seeded

TEXT, GLYPHS = 14, 6
WORDS = {"": (5, 11), "negative_": (1, 2)}
WRITTEN = {"": (2, 0), "negative_": (0, 1)}


def build(pipeline="HunyuanImagePipeline", **changes):
    import diffusers
    from diffusers.guiders import ClassifierFreeGuidance

    sizes = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
        "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": (1, 1),
        "text_embed_dim": 16, "text_embed_2_dim": 12, "rope_axes_dim": (8, 8),
    }  # fmt: skip
    with seeded(0):
        model = diffusers.HunyuanImageTransformer2DModel(**{**sizes, **changes}).eval()
    glyphs = {"text_encoder_2": None, "tokenizer_2": None} if model.context_embedder_2 else {}
    return getattr(diffusers, pipeline)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=make_local(model),
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
        **glyphs,
    )


def call(pipe, size, *, guidance, pad=0.0, steps=2, seed=0, **options):
    height, width, _ = size
    texts = {}
    for number, prefix in enumerate(WORDS):
        embeds, mask = padded(embeddings(2, TEXT, 16, seed=number), WORDS[prefix], pad)
        texts |= {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_embeds_mask": mask}
        if pipe.transformer.context_embedder_2:
            embeds, mask = padded(embeddings(2, GLYPHS, 12, seed=number), WRITTEN[prefix], pad)
            texts |= {f"{prefix}prompt_embeds_2": embeds, f"{prefix}prompt_embeds_mask_2": mask}
    pipe.guider.guidance_scale = 1.0 if guidance == "off" else 3.0
    return pipe(
        **texts,
        height=height,
        width=width,
        num_inference_steps=steps,
        output_type="latent",
        generator=[generator(seed), generator(seed + 1)],
        **options,
    ).images


def refine(pipe, size, **options):
    height, width, _ = size
    image = embeddings(2, 4, 1, height // 16, width // 16, seed=7)
    return call(pipe, size, image=image, distilled_guidance_scale=3.5, **options)


FAMILIES = [
    Family(
        name="hunyuan-image",
        build=build,
        call=call,
        sizes={
            (512, 384, 1): f"1x16x12 + {TEXT + GLYPHS} text",
            (416, 544, 1): f"1x13x17 + {TEXT + GLYPHS} text",
        },
        guidance=("sequential", "off"),
        outside=TEXT + GLYPHS,
        masks=True,
        compiled=2,  # the model sorts words, whose number it reads
    ),
    Family(
        name="hunyuan-image-refiner",
        build=partial(
            build,
            "HunyuanImageRefinerPipeline",
            in_channels=8,
            patch_size=(1, 1, 1),
            text_embed_2_dim=None,
            rope_axes_dim=(4, 6, 6),
            guidance_embeds=True,
        ),
        call=refine,
        sizes={
            (256, 192, 1): f"1x16x12 + {TEXT} text",
            (208, 272, 1): f"1x13x17 + {TEXT} text",
        },
        guidance=("sequential", "off"),
        outside=TEXT,
        masks=True,
    ),
]
