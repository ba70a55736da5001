"""CogVideoX 1.0 and 1.5: text first, both guidance branches in one batch."""

from functools import partial

from families.registry import Family, embeddings, generator

from sparsediff.testing import make_local, seeded

TEXT = 20


def build(**changes):
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    sizes = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
        "time_embed_dim": 8, "text_embed_dim": 16, "num_layers": 2, "patch_size": 2,
        "max_text_seq_length": TEXT, "use_rotary_positional_embeddings": True,
    }  # fmt: skip
    with seeded(0):
        model = CogVideoXTransformer3DModel(**{**sizes, **changes}).eval()
    return CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=make_local(model),
        scheduler=CogVideoXDDIMScheduler(),
    )


def call(pipe, size, *, guidance, pad=0.0, steps=2, seed=0):
    height, width, frames = size
    return pipe(
        prompt_embeds=embeddings(1, TEXT, 16),
        negative_prompt_embeds=embeddings(1, TEXT, 16, seed=1),
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=1.0 if guidance == "off" else 3.0,
        output_type="latent",
        generator=generator(seed),
    ).frames


FAMILIES = [
    Family(
        name="cogvideox",
        build=build,
        call=call,
        sizes={
            (96, 128, 9): f"{TEXT} text + 3x6x8",
            (112, 80, 13): f"{TEXT} text + 4x7x5",
        },
        guidance=("batched", "off"),
        outside=TEXT,
    ),
    Family(
        name="cogvideox-1.5",
        build=partial(build, patch_size_t=2, sample_width=40, sample_height=40),
        call=call,
        sizes={
            (96, 128, 21): f"{TEXT} text + 3x6x8",
            (112, 80, 29): f"{TEXT} text + 4x7x5",
        },
        guidance=("batched", "off"),
        outside=TEXT,
    ),
]
