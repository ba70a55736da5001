"""MiniMax-H3: one packed sequence of text, a keyframe, audio and the video."""

import torch
from diffusers import DiffusionPipeline
from families.registry import Family, embeddings, generator

from sparsediff.testing import make_local, seeded

TEXT, AUDIO = 6, 5


class DenoisingLoop(DiffusionPipeline):
    """What the modular pipeline does with the transformer and the scheduler: diffusers has no other kind for it."""

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, height, width, frames, steps, seed):
        from diffusers.modular_pipelines.minimax_h3 import before_denoise

        layout, plan = packing(before_denoise)
        positions, tags, video, audio, text, conditions, _ = layout(
            text_token_tags=torch.ones(TEXT, dtype=torch.long),
            num_latent_frames=frames,
            latent_height=height,
            latent_width=width,
            num_audio_latents=AUDIO,
            patch_size=(1, 2, 2),
            audio_channels=2,
            audio_tag=2,
            video_tag=0,
            keyframe_anchors=("first",),
        )
        self.scheduler.set_timesteps(steps + 1)  # one is collapsed
        latents = torch.randn(len(video), 16, generator=generator(seed))
        for t in self.scheduler.timesteps:
            level, rows = plan(
                video, audio, conditions, 0, TEXT, float(t), float(t), max(float(t), 0.9), 1.0
            )
            out, _ = self.transformer(
                hidden_states=latents[None],
                audio_hidden_states=embeddings(1, len(audio), 4),
                encoder_hidden_states=embeddings(1, TEXT, 16),
                timestep=level,
                timestep_indices=rows,
                token_tags=tags,
                position_ids=positions,
                video_indices=video,
                audio_indices=audio,
                text_indices=text,
                return_dict=False,
            )
            latents[conditions:] = self.scheduler.step(
                out[0, conditions:], t, latents[conditions:], return_dict=False
            )[0]
        self.maybe_free_model_hooks()
        return latents


def packing(module):
    """diffusers' own functions that lay out the sequence and its timesteps."""
    functions = {}
    for cls in vars(module).values():
        for name in ("build_packed_sequence", "build_row_timesteps"):
            # The layout for references has another signature.
            if isinstance(cls, type) and name in vars(cls) and "Ref2VA" not in cls.__name__:
                functions[name] = getattr(cls, name)
    return functions["build_packed_sequence"], functions["build_row_timesteps"]


def build():
    import diffusers

    with seeded(0):
        model = diffusers.MiniMaxH3Transformer3DModel(
            num_attention_heads=2, attention_head_dim=24, hidden_size=32, num_layers=2,
            num_refiner_layers=1, ffn_dim=32, in_channels=4, audio_in_channels=4, text_dim=16,
            freq_dim=16, time_embed_hidden_dim=16, time_embed_dim=16, rope_freq_dim=4,
        ).eval()  # fmt: skip
    return DenoisingLoop(make_local(model), diffusers.MiniMaxH3Scheduler())


def call(pipe, size, *, guidance, pad=0.0, steps=2, seed=0):
    height, width, frames = size
    return pipe(height, width, frames, steps, seed)


FAMILIES = [
    Family(
        name="minimax-h3",
        build=build,
        call=call,
        # in latents
        sizes={
            (12, 16, 3): f"{TEXT} text + 48 image + {2 * AUDIO} audio + 3x6x8",
            (14, 10, 4): f"{TEXT} text + 35 image + {2 * AUDIO} audio + 4x7x5",
        },
        outside=TEXT + 48 + 2 * AUDIO,
        modular=True,
    )
]
