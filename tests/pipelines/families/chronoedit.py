"""ChronoEdit: Wan with a rotary embedding of its own; an edit is a short video."""

from families.registry import Family, clip, embeddings
from PIL import Image

from sparsediff.testing import clip_vision, make_local, seeded, wan_autoencoder


def build():
    import diffusers

    with seeded(0):
        model = diffusers.ChronoEditTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=36, out_channels=16,
            text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, image_dim=4, rope_max_seq_len=32,
            rope_temporal_skip_len=8,
        ).eval()  # fmt: skip
        vae = wan_autoencoder()
        encoder, processor = clip_vision()
    return diffusers.ChronoEditPipeline(
        tokenizer=None,
        text_encoder=None,
        image_encoder=encoder,
        image_processor=processor,
        transformer=make_local(model),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    )


def call(pipe, size, *, guidance, pad=0.0, steps=2, seed=0, **options):
    height, width, _ = size
    return pipe(
        image=Image.linear_gradient("L").resize((width, height)).convert("RGB"),
        prompt_embeds=embeddings(1, 8, 16),
        negative_prompt_embeds=embeddings(1, 8, 16, seed=1),
        **clip(size, guidance=guidance, steps=steps, seed=seed),
        **options,
    ).frames


FAMILIES = [
    Family(
        name="chronoedit",
        build=build,
        call=call,
        # Without reasoning in between it makes the first and the last frame only.
        sizes={(128, 160, 5): "2x8x10", (144, 112, 5): "2x9x7"},
        guidance=("sequential", "off"),
    )
]
