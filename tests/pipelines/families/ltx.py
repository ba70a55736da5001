"""LTX-Video: packed tokens, conditions in front of them; and LTX-2: the same beside audio."""

import warnings
from functools import partial

import torch
from families.registry import Family, clip, embeddings, generator, padded
from PIL import Image

from sparsediff.testing import make_local, seeded

WORDS = (3, 8)
SIZES = {(192, 256, 17): "3x6x8", (224, 160, 25): "4x7x5"}


def transformer():
    from diffusers import LTXVideoTransformer3DModel

    return make_local(
        LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16,
            cross_attention_dim=32, num_layers=2, caption_channels=16,
        ).eval()
    )  # fmt: skip


def autoencoder():
    from diffusers import AutoencoderKLLTXVideo

    return AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
    ).eval()  # fmt: skip


def build(conditions=False):
    import diffusers

    with seeded(0):
        parts = {
            "transformer": transformer(),
            "vae": autoencoder() if conditions else None,
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
            "text_encoder": None,
            "tokenizer": None,
        }
    cls = diffusers.LTXConditionPipeline if conditions else diffusers.LTXPipeline
    return cls(**parts)


def call(pipe, size, *, guidance, pad=0.0, steps=2, seed=0, conditions=False):
    height, width, _ = size
    prompt, mask = padded(embeddings(1, 10, 16), WORDS[:1], pad)
    negative, negative_mask = padded(embeddings(1, 10, 16, seed=1), WORDS[1:], pad)
    extra = {}
    if conditions:
        from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

        image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
        # The first frame replaces latents, a later one brings tokens of its own.
        places = (0, 8)
        extra["conditions"] = [LTXVideoCondition(image=image, frame_index=i) for i in places]
    with warnings.catch_warnings():
        # The condition pipeline hands a tensor to numpy.
        warnings.simplefilter("ignore", DeprecationWarning)
        return pipe(
            prompt_embeds=prompt,
            prompt_attention_mask=mask,
            negative_prompt_embeds=negative,
            negative_prompt_attention_mask=negative_mask,
            **clip(size, guidance=guidance, steps=steps, seed=seed),
            **extra,
        ).frames


def build_with_audio(**changes):
    import diffusers
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    with seeded(0):
        model = diffusers.LTX2VideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16,
            cross_attention_dim=32, audio_in_channels=128, audio_out_channels=128,
            audio_num_attention_heads=2, audio_attention_head_dim=8, audio_cross_attention_dim=16,
            num_layers=2, caption_channels=16, **changes,
        ).eval()  # fmt: skip
        # Latents are scaled back by the autoencoders' statistics even where nothing is decoded.
        vae = diffusers.AutoencoderKLLTX2Video(
            latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1),
            spatial_compression_ratio=32, temporal_compression_ratio=8,
        ).eval()  # fmt: skip
        audio_vae = diffusers.AutoencoderKLLTX2Audio(
            base_channels=128, ch_mult=(1,), num_res_blocks=1
        ).eval()
        connectors = LTX2TextConnectors(
            caption_channels=16, text_proj_in_factor=2, video_connector_num_attention_heads=2,
            video_connector_attention_head_dim=8, video_connector_num_layers=1,
            video_connector_num_learnable_registers=None, audio_connector_num_attention_heads=2,
            audio_connector_attention_head_dim=8, audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=None,
        ).eval()  # fmt: skip
    return diffusers.LTX2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        audio_vae=audio_vae,
        text_encoder=None,
        tokenizer=None,
        connectors=connectors,
        transformer=make_local(model),
        vocoder=None,
    )


def call_with_audio(pipe, size, *, guidance, pad=0.0, steps=2, seed=0, **options):
    height, width, frames = size
    mask = torch.ones(1, 6, dtype=torch.long)
    return pipe(
        prompt_embeds=embeddings(1, 6, 32),
        prompt_attention_mask=mask,
        negative_prompt_embeds=embeddings(1, 6, 32, seed=1),
        negative_prompt_attention_mask=mask,
        height=height,
        width=width,
        num_frames=frames,
        frame_rate=24.0,
        num_inference_steps=steps,
        guidance_scale=1.0 if guidance == "off" else 3.0,
        audio_guidance_scale=1.0 if guidance == "off" else 3.0,
        output_type="latent",
        generator=generator(seed),
        **{
            "stg_scale": 0.0,
            "modality_scale": 1.0,
            "audio_stg_scale": 0.0,
            "audio_modality_scale": 1.0,
            **options,
        },
    ).frames


FAMILIES = [
    Family(name="ltx", build=build, call=call, sizes=SIZES, guidance=("batched", "off")),
    Family(
        name="ltx-condition",
        build=partial(build, conditions=True),
        call=partial(call, conditions=True),
        sizes={(192, 256, 17): "48 image + 3x6x8", (224, 160, 25): "35 image + 4x7x5"},
        guidance=("batched", "off"),
        outside=48,
    ),
    Family(
        name="ltx-2",
        build=build_with_audio,
        call=call_with_audio,
        sizes=SIZES,
        guidance=("batched", "off"),
    ),
]
