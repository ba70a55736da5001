"""CogVideoX 1.0 and 1.5: text first, both guidance branches in one batch; and ConsisID, a face between its blocks."""

from functools import partial

from families.registry import Family, embeddings, generator
from PIL import Image

from sparsediff.testing import make_local, seeded

TEXT = 20
FACE = {
    "is_train_face": True, "cross_attn_interval": 1, "cross_attn_dim_head": 8, "cross_attn_num_heads": 2,
    "LFE_id_dim": 8, "LFE_vit_dim": 8, "LFE_depth": 5, "LFE_dim_head": 4, "LFE_num_heads": 2, "LFE_num_id_token": 1,
    "LFE_num_querie": 4, "LFE_output_dim": 21,
}  # fmt: skip


def build(
    pipeline="CogVideoXPipeline",
    transformer="CogVideoXTransformer3DModel",
    **changes,
):
    import diffusers

    sizes = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
        "time_embed_dim": 8, "text_embed_dim": 16, "num_layers": 2, "patch_size": 2,
        "max_text_seq_length": TEXT, "use_rotary_positional_embeddings": True,
    }  # fmt: skip
    with seeded(0):
        model = getattr(diffusers, transformer)(**{**sizes, **changes}).eval()
        # What an image or a video comes in through.
        vae = None if pipeline == "CogVideoXPipeline" else _vae(diffusers.AutoencoderKLCogVideoX)
    return _pipeline_class(pipeline)(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=make_local(model),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )


def _pipeline_class(name):
    import diffusers

    # diffusers does not export it without OpenCV, which only key points of a face need.
    if name == "ConsisIDPipeline":
        from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline

        return ConsisIDPipeline
    return getattr(diffusers, name)


def _vae(vae_class):
    return vae_class(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4,
    ).eval()  # fmt: skip


def call(pipe, size, *, guidance, pad=0.0, steps=2, seed=0, **options):
    height, width, frames = size
    return pipe(
        prompt_embeds=embeddings(1, TEXT, 16),
        negative_prompt_embeds=embeddings(1, TEXT, 16, seed=1),
        height=height,
        width=width,
        **({} if "video" in options else {"num_frames": frames}),
        num_inference_steps=steps,
        guidance_scale=1.0 if guidance == "off" else 3.0,
        output_type="latent",
        generator=generator(seed),
        **options,
    ).frames


def call_with_image(pipe, size, **options):
    height, width, _ = size
    return call(pipe, size, image=Image.new("RGB", (width, height), "red"), **options)


def call_with_face(pipe, size, **options):
    # One face, for both branches of guidance.
    features = [embeddings(1, 3, 8, seed=i) for i in range(5)]
    return call_with_image(pipe, size, id_cond=embeddings(1, 8), id_vit_hidden=features, **options)


def call_with_video(pipe, size, **options):
    height, width, frames = size
    video = [Image.new("RGB", (width, height), (9 * i, 0, 90)) for i in range(frames)]
    # Four steps at half strength: two, in the middle of the schedule.
    options["steps"] = 2 * options.get("steps", 2)
    return call(pipe, size, video=video, strength=0.5, **options)


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
    Family(
        name="cogvideox-i2v",
        # The image's latents come as further channels.
        build=partial(build, "CogVideoXImageToVideoPipeline", in_channels=8),
        call=call_with_image,
        sizes={(96, 128, 9): f"{TEXT} text + 3x6x8", (112, 80, 13): f"{TEXT} text + 4x7x5"},
        guidance=("batched", "off"),
        outside=TEXT,
    ),
    Family(
        name="cogvideox-v2v",
        build=partial(build, "CogVideoXVideoToVideoPipeline"),
        call=call_with_video,
        sizes={(96, 128, 9): f"{TEXT} text + 3x6x8", (112, 80, 13): f"{TEXT} text + 4x7x5"},
        guidance=("batched", "off"),
        outside=TEXT,
    ),
    Family(
        name="consisid",
        # The image's latents come as further channels.
        build=partial(
            build, "ConsisIDPipeline", "ConsisIDTransformer3DModel", in_channels=8, **FACE
        ),
        call=call_with_face,
        sizes={(96, 128, 9): f"{TEXT} text + 3x6x8", (112, 80, 13): f"{TEXT} text + 4x7x5"},
        guidance=("batched", "off"),
        outside=TEXT,
    ),
]
