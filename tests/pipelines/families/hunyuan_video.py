"""HunyuanVideo: video first, then text whose padding is masked."""

from functools import partial

from families.registry import Family, embeddings, generator, padded

from sparsediff.testing import make_local, seeded

TEXT, WORDS = 24, 7


def build(**changes):
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )

    sizes = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
        "num_layers": 1, "num_single_layers": 2, "num_refiner_layers": 1, "patch_size": 2,
        "patch_size_t": 1, "guidance_embeds": True, "text_embed_dim": 16,
        "pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6),
    }  # fmt: skip
    with seeded(0):
        model = HunyuanVideoTransformer3DModel(**{**sizes, **changes}).eval()
    return HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        vae=None,
        transformer=make_local(model),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def call(pipe, size, *, guidance, pad=0.0, steps=2, seed=0):
    height, width, frames = size
    prompt, mask = padded(embeddings(2, TEXT, 16), (WORDS, TEXT - 1), pad)
    negative, negative_mask = padded(embeddings(2, TEXT, 16, seed=1), (3, 1), pad)
    return pipe(
        prompt_embeds=prompt,
        prompt_attention_mask=mask,
        pooled_prompt_embeds=embeddings(2, 8),
        negative_prompt_embeds=negative,
        negative_prompt_attention_mask=negative_mask,
        negative_pooled_prompt_embeds=embeddings(2, 8, seed=1),
        true_cfg_scale=1.0 if guidance == "off" else 3.0,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=steps,
        output_type="latent",
        generator=[generator(seed), generator(seed + 1)],
    ).frames


def family(name, **changes):
    return Family(
        name=name,
        build=partial(build, **changes),
        call=call,
        sizes={
            (96, 128, 9): f"3x6x8 + {TEXT} text",
            (112, 80, 13): f"4x7x5 + {TEXT} text",
        },
        guidance=("off", "sequential"),
        outside=TEXT,
        masks=True,
    )


# Image-to-video replaces the modulation of the first frame, in blocks of other classes.
FAMILIES = [
    family("hunyuan-video"),
    family("hunyuan-video-i2v", image_condition_type="token_replace"),
]
