"""Allegro: video alone in self-attention."""

from families.registry import Family, embeddings, generator, padded

from sparsediff.testing import make_local, seeded

TEXT, CHANNELS = 20, 16


def build():
    import diffusers

    with seeded(0):
        model = diffusers.AllegroTransformer3DModel(
            num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4,
            num_layers=2, cross_attention_dim=48, sample_width=16, sample_height=16,
            sample_frames=5, caption_channels=CHANNELS,
        ).eval()  # fmt: skip
    # diffusers does this after a run, and `forward` notices: stock Allegro too is compiled again then.
    model._reset_stateful_cache()
    return diffusers.AllegroPipeline(
        transformer=make_local(model),
        scheduler=diffusers.DDIMScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
    )


def call(pipe, size, *, guidance, pad=0.0, steps=2, seed=0):
    height, width, frames = size
    prompt, mask = padded(embeddings(1, TEXT, CHANNELS), (7,), pad)
    negative, negative_mask = padded(embeddings(1, TEXT, CHANNELS, seed=1), (3,), pad)
    return pipe(
        prompt=None,
        negative_prompt=None,
        prompt_embeds=prompt,
        prompt_attention_mask=mask,
        negative_prompt_embeds=negative,
        negative_prompt_attention_mask=negative_mask,
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
        name="allegro",
        build=build,
        call=call,
        sizes={(96, 128, 12): "3x6x8", (112, 80, 16): "4x7x5"},
        guidance=("batched", "off"),
    ),
]
