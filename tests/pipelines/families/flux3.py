"""Flux.3: blocks of the image alone, then of text, image and references."""

import torch
from diffusers import DiffusionPipeline
from families.registry import Family, embeddings, generator

from sparsediff.testing import make_local, seeded

TEXT, CHANNELS, REFERENCE = 20, 16, (8, 8)


class DenoisingLoop(DiffusionPipeline):
    """The modular pipeline's own steps around the transformer: diffusers has no other kind for it."""

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer, scheduler, guider):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, guider=guider)

    @torch.no_grad()
    def __call__(self, height, width, steps, seed, references=()):
        from diffusers.modular_pipelines.flux3 import before_denoise, denoise
        from diffusers.modular_pipelines.modular_pipeline import BlockState

        text_ids = before_denoise.Flux3TextRoPEInputsStep._prepare_text_ids
        prompt, negative = (embeddings(1, TEXT, CHANNELS, seed=i) for i in range(2))
        fields = {
            "prompt_embeds": prompt,
            "negative_prompt_embeds": negative,
            "txt_ids": text_ids(prompt),
            "negative_txt_ids": text_ids(negative),
            "img_ids": before_denoise._prepare_image_ids(height, width, 0.5),
        }
        if references:
            fields["image_cond_hidden_states"] = embeddings(
                1, sum(h * w for h, w in references), 4, seed=7
            )
            fields["image_cond_ids"] = torch.cat(
                [
                    before_denoise._prepare_image_ids(*size, 0.5, l_coord=-1 - i)
                    for i, size in enumerate(references)
                ]
            )
        self.scheduler.set_timesteps(steps)
        state = BlockState(
            latents=torch.randn(1, height * width, 4, generator=generator(seed)),
            num_inference_steps=steps,
            denoiser_input_fields=fields,
        )
        for i, t in enumerate(self.scheduler.timesteps):
            for step in (denoise.Flux3LoopDenoiser(), denoise.Flux3LoopAfterDenoiser()):
                step(self, state, i=i, t=t)
        self.maybe_free_model_hooks()
        return state.latents


def build():
    import diffusers
    from diffusers.guiders import ClassifierFreeGuidance

    with seeded(0):
        model = diffusers.Flux3Transformer2DModel(
            in_channels=4, cond_in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=CHANNELS, timestep_channels=16, axes_dims_rope=(4, 4, 4, 4),
        ).eval()  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return DenoisingLoop(make_local(model), scheduler, ClassifierFreeGuidance(guidance_scale=3.0))


def call(pipe, size, *, guidance, pad=0.0, steps=2, seed=0, **options):
    height, width, _ = size
    pipe.guider.guidance_scale = 1.0 if guidance == "off" else 3.0
    return pipe(height, width, steps, seed, **options)


def edit(pipe, size, **options):
    return call(pipe, size, references=[REFERENCE], **options)


FAMILIES = [
    Family(
        name="flux3",
        build=build,
        call=call,
        # in tokens
        sizes={(16, 16, 1): f"{TEXT} text + 1x16x16", (13, 17, 1): f"{TEXT} text + 1x13x17"},
        guidance=("sequential", "off"),
        outside=(TEXT, 0),  # none in the image's own blocks
        modular=True,
    ),
    Family(
        name="flux3-edit",
        build=build,
        call=edit,
        sizes={
            (16, 16, 1): f"{TEXT} text + 1x16x16 + 64 image",
            (13, 17, 1): f"{TEXT} text + 1x13x17 + 64 image",
        },
        guidance=("sequential", "off"),
        outside=(TEXT + 64, 0),
        modular=True,
    ),
]
