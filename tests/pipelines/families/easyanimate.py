"""EasyAnimate 5.1: text first, joint attention; the first blocks project the text by themselves."""

from families.registry import Family, embeddings, generator

from sparsediff.testing import make_local, seeded

TEXT, CHANNELS = 20, 16


def build():
    import diffusers

    with seeded(0):
        model = diffusers.EasyAnimateTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=16, out_channels=16,
            time_embed_dim=2, text_embed_dim=CHANNELS, num_layers=2, mmdit_layers=1, sample_width=16, sample_height=16,
            patch_size=2,
        ).eval()  # fmt: skip
        vae = diffusers.AutoencoderKLMagvit(
            in_channels=3, out_channels=3, latent_channels=16, layers_per_block=1,
            norm_num_groups=2, block_out_channels=(4, 4, 4, 4),
        ).eval()  # fmt: skip
    return diffusers.EasyAnimatePipeline(
        transformer=make_local(model),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
    )


def call(pipe, size, *, guidance, pad=0.0, steps=2, seed=0):
    height, width, frames = size
    prompt, mask = embeddings(1, TEXT, CHANNELS), embeddings(1, TEXT) > 0
    return pipe(
        prompt_embeds=prompt,
        prompt_attention_mask=mask,
        negative_prompt_embeds=embeddings(1, TEXT, CHANNELS, seed=1),
        negative_prompt_attention_mask=mask,
        guidance_scale=1.0 if guidance == "off" else 3.0,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=steps,
        output_type="latent",
        generator=generator(seed),
    ).frames


FAMILIES = [
    Family(
        name="easyanimate",
        build=build,
        call=call,
        sizes={
            (96, 128, 9): f"{TEXT} text + 3x6x8",
            (112, 80, 13): f"{TEXT} text + 4x7x5",
        },
        guidance=("batched", "off"),
        outside=TEXT,
    ),
]
