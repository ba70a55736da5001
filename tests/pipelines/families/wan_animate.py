"""Wan Animate: the character's picture is a latent frame in front."""

from families.registry import Family, embeddings, generator
from PIL import Image

from sparsediff.testing import clip_vision, make_local, seeded, wan_autoencoder

FACE = 16


def build():
    import diffusers

    with seeded(0):
        model = diffusers.WanAnimateTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=36, latent_channels=16,
            out_channels=16, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, image_dim=4,
            rope_max_seq_len=32, motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
            motion_encoder_size=FACE, motion_style_dim=8, motion_dim=4, motion_encoder_dim=16,
            face_encoder_hidden_dim=16, face_encoder_num_heads=2, inject_face_latents_blocks=2,
        ).eval()  # fmt: skip
        vae = wan_autoencoder()
        encoder, processor = clip_vision()
    return diffusers.WanAnimatePipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        image_processor=processor,
        image_encoder=encoder,
        transformer=make_local(model),
    )


def call(pipe, size, *, guidance, pad=0.0, steps=2, seed=0):
    height, width, frames = size
    colours = ("red", "green", "blue")
    return pipe(
        image=Image.linear_gradient("L").resize((width, height)).convert("RGB"),
        pose_video=[Image.new("RGB", (width, height), colours[i % 3]) for i in range(frames)],
        face_video=[Image.new("RGB", (FACE, FACE), colours[i % 3]) for i in range(frames)],
        prompt_embeds=embeddings(1, 8, 16),
        negative_prompt_embeds=embeddings(1, 8, 16, seed=1),
        height=height,
        width=width,
        segment_frame_length=frames,
        num_inference_steps=steps,
        guidance_scale=1.0 if guidance == "off" else 3.0,
        output_type="latent",
        generator=generator(seed),
    ).frames


FAMILIES = [
    Family(
        name="wan-animate",
        build=build,
        call=call,
        sizes={(96, 128, 9): "48 image + 3x6x8", (112, 80, 13): "35 image + 4x7x5"},
        guidance=("off", "sequential"),
        outside=48,
    )
]
