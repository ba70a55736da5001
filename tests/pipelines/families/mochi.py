"""Mochi 1: video first, then the words of each sample: the stock processor attends sample by sample."""

import warnings

from families.registry import Family, embeddings, generator, padded

from sparsediff.testing import make_local, seeded

TEXT, CHANNELS = 20, 16


def build():
    import diffusers

    with seeded(0):
        model = diffusers.MochiTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, num_layers=2, pooled_projection_dim=16,
            in_channels=12, time_embed_dim=8, text_embed_dim=CHANNELS, max_sequence_length=TEXT,
        ).eval()  # fmt: skip
    return diffusers.MochiPipeline(
        transformer=make_local(model),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
    )


def call(pipe, size, *, guidance, pad=0.0, steps=2, seed=0):
    height, width, frames = size
    prompt, mask = padded(embeddings(1, TEXT, CHANNELS), (17,), pad)
    negative, negative_mask = padded(embeddings(1, TEXT, CHANNELS, seed=1), (3,), pad)
    with warnings.catch_warnings():
        # Stock Mochi asks for automatic casting to float32, which a CPU does not have and does not need.
        warnings.filterwarnings("ignore", "In CPU autocast", UserWarning)
        return pipe(
            prompt_embeds=prompt,
            prompt_attention_mask=mask.bool(),
            negative_prompt_embeds=negative,
            negative_prompt_attention_mask=negative_mask.bool(),
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
        name="mochi",
        build=build,
        call=call,
        sizes={
            (96, 128, 13): f"3x6x8 + {TEXT} text",
            (112, 80, 19): f"4x7x5 + {TEXT} text",
        },
        guidance=("batched", "off"),
        outside=(3, 17),
        by_sample=True,
    ),
]
