"""Kandinsky 6: video beside sound; a picture comes as one more frame behind the video."""

from families.registry import Family, clip, embeddings
from PIL import Image

from sparsediff.testing import make_local, seeded


def build():
    import diffusers

    with seeded(0):
        model = diffusers.Kandinsky6Transformer3DModel(
            in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16, model_dim=32, ff_dim=32,
            num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6), in_audio_dim=4, out_audio_dim=4,
            ca_rope=True, cross_gates=True, fix_modulation=True, visual_token_type_num_embeddings=2,
        ).eval()  # fmt: skip
        vae = diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
        ).eval()
        sound = {
            "audio_vae": diffusers.MMAudioVAE(
                mel_bins=8, latent_channels=4, hidden_channels=8, channel_multipliers=(1,), layers_per_block=1
            ).eval(),
            "vocoder": diffusers.MMAudioVocoder(
                num_mels=8, upsample_initial_channel=8, upsample_rates=(2,), upsample_kernel_sizes=(4,),
                resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1,),),
            ).eval(),
        }  # fmt: skip
    return diffusers.Kandinsky6TI2VAPipeline(
        transformer=make_local(model),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        **sound,
    )


def call(pipe, size, *, guidance, pad=0.0, steps=2, seed=0, what="frames", **options):
    made = pipe(
        prompt_embeds=embeddings(1, 6, 16),
        pooled_prompt_embeds=embeddings(1, 8),
        negative_prompt_embeds=embeddings(1, 6, 16, seed=1),
        negative_pooled_prompt_embeds=embeddings(1, 8, seed=1),
        **clip(size, guidance=guidance, steps=steps, seed=seed),
        **options,
    )
    return getattr(made, what)


def call_with_image(pipe, size, **options):
    height, width, _ = size
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    return call(pipe, size, image=image, **options)


FAMILIES = [
    Family(
        name="kandinsky-6",
        build=build,
        call=call,
        sizes={(96, 128, 9): "3x6x8", (112, 80, 13): "4x7x5"},
        guidance=("sequential", "off"),
        lora=("to_query", "to_value"),
    ),
    Family(
        name="kandinsky-6-i2v",
        build=build,
        call=call_with_image,
        sizes={(96, 128, 9): "3x6x8 + 48 image", (112, 80, 13): "4x7x5 + 35 image"},
        guidance=("sequential", "off"),
        outside=48,
        lora=("to_query", "to_value"),
    ),
]
