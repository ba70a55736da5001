"""Helios: history of three scales in front of a chunk; and up a pyramid of resolutions."""

import warnings
from functools import partial

from families.registry import Family, clip, embeddings

from sparsediff.testing import make_local, seeded

# Of 16 frames merged by 4, of 2 merged by 2, and whole ones: the first of the video and the one before.
HISTORY = {(6, 8): 4 * 4 + 12 + 96, (7, 5): 4 * 4 + 12 + 70}


def build(pipeline="HeliosPipeline", *, scheduler="HeliosScheduler", distilled=None, **options):
    import diffusers

    with seeded(0):
        model = diffusers.HeliosTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=16, freq_dim=16,
            ffn_dim=32, num_layers=2, rope_dim=(4, 4, 4), is_amplify_history=True,
        ).eval()  # fmt: skip
        # Every chunk is decoded, whatever is asked for: by a decoder that makes nothing larger.
        vae = diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1], num_res_blocks=1, temperal_downsample=[]
        ).eval()
    with warnings.catch_warnings():
        # The scheduler gives NumPy tensors for numbers.
        warnings.filterwarnings("ignore", "__array_wrap__ must accept", DeprecationWarning)
        scheduler = getattr(diffusers, scheduler)(**options)
    return getattr(diffusers, pipeline)(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=scheduler,
        transformer=make_local(model),
        **({} if distilled is None else {"is_distilled": distilled}),
    )


def call(pipe, size, *, guidance, pad=0.0, steps=2, seed=0, **options):
    arguments = clip(size, guidance=guidance, steps=steps, seed=seed)
    if "pyramid_num_inference_steps_list" in options:
        # The steps of each resolution: it takes no other number.
        del arguments["num_inference_steps"]
    return pipe(
        prompt_embeds=embeddings(1, 8, 16),
        negative_prompt_embeds=embeddings(1, 8, 16, seed=1),
        **{**arguments, "num_latent_frames_per_chunk": (size[2] - 1) // 4 + 1, **options},
    ).frames


FAMILIES = [
    Family(
        name="helios",
        build=partial(build, stages=1),
        call=call,
        sizes={
            (96, 128, 9): f"{HISTORY[6, 8]} image + 3x6x8",
            (112, 80, 13): f"{HISTORY[7, 5]} image + 4x7x5",
        },
        guidance=("sequential", "off"),
        outside=HISTORY[6, 8],
    ),
]
