"""Motif-Video: joint blocks whose padded words are hidden, and decoder blocks that see the video twice."""

from families.registry import Family, embeddings, generator, padded

from sparsediff.testing import make_local, seeded, wan_autoencoder

TEXT = 12


def build(decoder_layers=1):
    import diffusers
    from diffusers.guiders import ClassifierFreeGuidance

    with seeded(0):
        model = diffusers.MotifVideoTransformer3DModel(
            in_channels=33, out_channels=16, num_attention_heads=2, attention_head_dim=16, num_layers=1,
            num_single_layers=1 + decoder_layers, num_decoder_layers=decoder_layers, text_embed_dim=16,
            image_embed_dim=8, rope_axes_dim=(4, 6, 6), enable_text_cross_attention_dual=True,
            enable_text_cross_attention_single=True,
        ).eval()  # fmt: skip
        vae = wan_autoencoder()
    return diffusers.MotifVideoPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=make_local(model),
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
    )


def call(pipe, size, *, guidance, pad=0.0, steps=2, seed=0, **options):
    height, width, frames = size
    prompt, mask = padded(embeddings(2, TEXT, 16), (5, 11), pad)
    negative, negative_mask = padded(embeddings(2, TEXT, 16, seed=1), (1, 2), pad)
    pipe.guider.guidance_scale = 1.0 if guidance == "off" else 3.0
    return pipe(
        prompt_embeds=prompt,
        prompt_attention_mask=mask,
        negative_prompt_embeds=negative,
        negative_prompt_attention_mask=negative_mask.bool(),
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=steps,
        output_type="latent",
        generator=[generator(seed), generator(seed + 1)],
        **options,
    ).frames


FAMILIES = [
    Family(
        name="motif-video",
        build=build,
        call=call,
        sizes={
            (96, 128, 9): f"3x6x8 + {TEXT} text",
            (112, 80, 13): f"4x7x5 + {TEXT} text",
        },
        guidance=("sequential", "off"),
        outside=(TEXT, 0),  # none in decoder blocks
        masks=True,
    ),
]
