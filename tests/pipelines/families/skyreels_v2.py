"""SkyReels-V2: plain, and diffusion forcing with all frames at one noise level."""

from functools import partial

from families.registry import Family, clip, embeddings

from sparsediff.testing import make_local, seeded

SIZES = {(96, 128, 9): "3x6x8", (112, 80, 13): "4x7x5"}


def build(pipeline="SkyReelsV2Pipeline"):
    import diffusers

    with seeded(0):
        model = diffusers.SkyReelsV2Transformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
            freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
            inject_sample_info="Forcing" in pipeline,
        ).eval()  # fmt: skip
    return getattr(diffusers, pipeline)(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=make_local(model),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
        ),
    )


def call(pipe, size, *, guidance, pad=0.0, steps=2, seed=0, **options):
    return pipe(
        prompt=None,
        prompt_embeds=embeddings(1, 8, 16),
        negative_prompt_embeds=embeddings(1, 8, 16, seed=1),
        **clip(size, guidance=guidance, steps=steps, seed=seed),
        **options,
    ).frames


FAMILIES = [
    Family(name="skyreels-v2", build=build, call=call, sizes=SIZES, guidance=("sequential", "off")),
    Family(
        name="skyreels-v2-df",
        build=partial(build, "SkyReelsV2DiffusionForcingPipeline"),
        call=call,
        sizes=SIZES,
        guidance=("sequential", "off"),
    ),
]
