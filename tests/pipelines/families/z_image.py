"""Z-Image: one stream, image first, captions padded to 32; a mask only where captions of a batch differ in length."""

import torch
from families.registry import Family, embeddings, generator

from sparsediff.testing import make_local, seeded

CHANNELS = 16


def build():
    import diffusers

    with seeded(0):
        model = diffusers.ZImageTransformer2DModel(
            dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=CHANNELS,
            axes_dims=[4, 6, 6], axes_lens=[256, 32, 32],
        ).eval()  # fmt: skip
    # diffusers 0.38 leaves them to what is in memory, for weights to be loaded over.
    for learned in (model.x_pad_token, model.cap_pad_token):
        torch.nn.init.zeros_(learned)
    return diffusers.ZImagePipeline(
        transformer=make_local(model),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,
        text_encoder=None,
        tokenizer=None,
    )


def call(pipe, size, *, guidance, pad=0.0, steps=2, seed=0):
    height, width, _ = size
    return pipe(
        # 20 and 60 words: 32 and 64 tokens
        prompt_embeds=[embeddings(20, CHANNELS)],
        negative_prompt_embeds=[embeddings(60, CHANNELS, seed=1)],
        guidance_scale=0.0 if guidance == "off" else 3.0,
        height=height,
        width=width,
        num_inference_steps=steps,
        output_type="latent",
        generator=generator(seed),
    ).images


FAMILIES = [
    Family(
        name="z-image",
        build=build,
        call=call,
        sizes={
            (256, 256, 1): "1x16x16 + 32 text",
            # 221 tokens of the image are padded to 224
            (208, 272, 1): "1x13x17 + 35 text",
        },
        guidance=("off", "batched"),
        outside=32,
        # Of the image's, the caption's and the joint blocks.  Stock diffusers cannot trace the rest.
        compiled=3,
    ),
]
