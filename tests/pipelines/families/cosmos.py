"""Cosmos 1.0 under its own scheduler, and Predict 2.5, whose conditioning frames are at another noise level."""

from families.registry import Family, clip, embeddings

from sparsediff.testing import make_local, seeded, wan_autoencoder


class Lenient:
    """Stands in for NVIDIA's guard models, without which the pipelines refuse to run."""

    def to(self, *args, **kwargs):
        return self

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, frames):
        return frames


def transformer(**changes):
    from diffusers import CosmosTransformer3DModel

    sizes = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
        "num_layers": 2, "mlp_ratio": 2, "text_embed_dim": 16, "adaln_lora_dim": 4,
        "max_size": (4, 32, 32), "patch_size": (1, 2, 2), "extra_pos_embed_type": None,
        # Stock code resizes that mask with torchvision.
        "concat_padding_mask": False,
    }  # fmt: skip
    return make_local(CosmosTransformer3DModel(**{**sizes, **changes}).eval())


def build():
    import diffusers

    with seeded(0):
        model = transformer(extra_pos_embed_type="learnable")
    return diffusers.CosmosTextToWorldPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=model,
        vae=None,
        scheduler=diffusers.EDMEulerScheduler(
            sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min"
        ),
        safety_checker=Lenient(),
    )


def build_predict():
    import diffusers

    with seeded(0):
        model = transformer(
            in_channels=17, out_channels=16, use_crossattn_projection=True,
            crossattn_proj_in_channels=16, encoder_hidden_states_channels=16,
        )  # fmt: skip
        vae = wan_autoencoder()
    return diffusers.Cosmos2_5_PredictBasePipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=model,
        vae=vae,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        ),
        safety_checker=Lenient(),
    )


def call(pipe, size, *, guidance, pad=0.0, steps=2, seed=0):
    return pipe(
        prompt_embeds=embeddings(1, 6, 16),
        negative_prompt_embeds=embeddings(1, 6, 16, seed=1),
        **clip(size, guidance=guidance, steps=steps, seed=seed),
    ).frames


FAMILIES = [
    Family(
        name="cosmos",
        build=build,
        call=call,
        sizes={(96, 128, 17): "3x6x8", (112, 80, 25): "4x7x5"},
        guidance=("sequential", "off"),
    ),
    Family(
        name="cosmos-2.5",
        build=build_predict,
        call=call,
        sizes={(96, 128, 9): "3x6x8", (112, 80, 13): "4x7x5"},
        guidance=("sequential", "off"),
    ),
]
