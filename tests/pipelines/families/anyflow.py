"""AnyFlow: Wan with a second timestep, frames before channels; frames that are given keep a timestep of zero."""

from families.registry import Family, clip, embeddings

from sparsediff.testing import make_local, seeded


def build():
    import diffusers

    with seeded(0):
        model = diffusers.AnyFlowTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
            freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
        ).eval()  # fmt: skip
    return diffusers.AnyFlowPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=make_local(model),
        vae=None,
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(shift=5.0),
    )


def call(pipe, size, *, guidance, pad=0.0, steps=2, seed=0, **options):
    return pipe(
        prompt_embeds=embeddings(1, 8, 16),
        negative_prompt_embeds=embeddings(1, 8, 16, seed=1),
        **clip(size, guidance=guidance, steps=steps, seed=seed),
        **options,
    ).frames


def go_on(pipe, size, **options):
    # The first latent frame is given.
    height, width, _ = size
    return call(
        pipe, size, video_latents=embeddings(1, 1, 4, height // 8, width // 8, seed=7), **options
    )


FAMILIES = [
    Family(
        name="anyflow",
        build=build,
        call=go_on,
        sizes={(96, 128, 9): "3x6x8", (112, 80, 13): "4x7x5"},
        guidance=("batched", "off"),
    )
]
