"""Framepack: history in front of the section, a picture's tokens before the words."""

from families.registry import Family, embeddings, generator, padded
from PIL import Image

from sparsediff.testing import make_local, seeded

TEXT, WORDS, PICTURE = 10, 7, 4


def build():
    import diffusers
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    with seeded(0):
        model = diffusers.HunyuanVideoFramepackTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
            num_single_layers=2, num_refiner_layers=1, patch_size=2, patch_size_t=1,
            guidance_embeds=True, text_embed_dim=16, pooled_projection_dim=8,
            rope_axes_dim=(4, 6, 6), has_image_proj=True, image_proj_dim=8, has_clean_x_embedder=True,
        ).eval()  # fmt: skip
        encoder = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                image_size=8, patch_size=4,
            )
        ).eval()  # fmt: skip
        vae = diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
        ).eval()
    return diffusers.HunyuanVideoFramepackPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=make_local(model),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=None,
        tokenizer_2=None,
        image_encoder=encoder,
        feature_extractor=SiglipImageProcessor(size={"height": 8, "width": 8}),
    )


def call(pipe, size, *, guidance, pad=0.0, steps=2, seed=0):
    height, width, frames = size
    prompt, mask = padded(embeddings(1, TEXT, 16), (WORDS,), pad)
    negative, negative_mask = padded(embeddings(1, TEXT, 16, seed=1), (WORDS,), pad)
    return pipe(
        image=Image.linear_gradient("L").resize((width, height)).convert("RGB"),
        prompt_embeds=prompt,
        prompt_attention_mask=mask,
        pooled_prompt_embeds=embeddings(1, 8),
        negative_prompt_embeds=negative,
        negative_prompt_attention_mask=negative_mask,
        negative_pooled_prompt_embeds=embeddings(1, 8, seed=1),
        true_cfg_scale=1.0 if guidance == "off" else 3.0,
        height=height,
        width=width,
        num_frames=frames,
        latent_window_size=(frames - 1) // 4 + 1,
        num_inference_steps=steps,
        output_type="latent",
        generator=generator(seed),
    ).frames[0]


FAMILIES = [
    Family(
        name="framepack",
        build=build,
        call=call,
        sizes={
            # clean history of 2 frames, then 2 merged by 2, then 16 merged by 4
            (96, 128, 9): f"{96 + 12 + 16} image + 3x6x8 + {PICTURE + TEXT} text",
            (112, 80, 13): f"{70 + 12 + 16} image + 4x7x5 + {PICTURE + TEXT} text",
        },
        guidance=("off", "sequential"),
        outside=96 + 12 + 16 + PICTURE + WORDS,
        masks=True,
        compiled=0,  # reads the number of words, and lists no repeated blocks
    )
]
