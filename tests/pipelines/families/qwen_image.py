"""Qwen-Image: text first, and a mask where prompts differ in length; Edit appends reference images."""

from families.registry import Family, embeddings, generator, padded

from sparsediff.testing import make_local, seeded

TEXT, WORDS, CHANNELS = 24, (7, 23), 16


def build(**changes):
    import diffusers

    sizes = {
        "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": CHANNELS, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    with seeded(0):
        model = diffusers.QwenImageTransformer2DModel(**{**sizes, **changes}).eval()
    return diffusers.QwenImagePipeline(
        transformer=make_local(model),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,
        text_encoder=None,
        tokenizer=None,
    )


def call(pipe, size, *, guidance, pad=0.0, steps=2, seed=0):
    height, width, _ = size
    prompt, mask = padded(embeddings(2, TEXT, CHANNELS), WORDS, pad)
    negative, negative_mask = padded(embeddings(2, TEXT, CHANNELS, seed=1), (3, 1), pad)
    return pipe(
        prompt_embeds=prompt,
        prompt_embeds_mask=mask,
        negative_prompt_embeds=negative,
        negative_prompt_embeds_mask=negative_mask,
        true_cfg_scale=1.0 if guidance == "off" else 3.0,
        height=height,
        width=width,
        num_inference_steps=steps,
        output_type="latent",
        generator=[generator(seed), generator(seed + 1)],
    ).images


FAMILIES = [
    Family(
        name="qwen-image",
        build=build,
        call=call,
        sizes={
            (256, 256, 1): f"{TEXT} text + 1x16x16",
            (208, 272, 1): f"{TEXT} text + 1x13x17",
        },
        guidance=("off", "sequential"),
        outside=TEXT,
        masks=True,
    ),
]
