"""Kandinsky 5 video: channels last."""

import torch
from families.registry import Family, clip, embeddings

from sparsediff.testing import make_local, seeded


def build():
    import diffusers
    from diffusers.models.transformers.transformer_kandinsky import Kandinsky5Modulation

    with seeded(0):
        model = diffusers.Kandinsky5Transformer3DModel(
            in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16,
            model_dim=32, ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6),
        ).eval()  # fmt: skip
        # Fresh modulations are zero, and nothing that attention does would come through.
        for module in model.modules():
            if isinstance(module, Kandinsky5Modulation):
                torch.nn.init.normal_(module.out_layer.weight, std=0.3)
    return diffusers.Kandinsky5T2VPipeline(
        transformer=make_local(model),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    )


def call(pipe, size, *, guidance, pad=0.0, steps=2, seed=0):
    lengths = torch.tensor([0, 6], dtype=torch.int32)
    return pipe(
        prompt_embeds_qwen=embeddings(1, 6, 16),
        prompt_embeds_clip=embeddings(1, 8),
        prompt_cu_seqlens=lengths,
        negative_prompt_embeds_qwen=embeddings(1, 6, 16, seed=1),
        negative_prompt_embeds_clip=embeddings(1, 8, seed=1),
        negative_prompt_cu_seqlens=lengths,
        **clip(size, guidance=guidance, steps=steps, seed=seed),
    ).frames


FAMILIES = [
    Family(
        name="kandinsky-5",
        build=build,
        call=call,
        sizes={(96, 128, 9): "3x6x8", (112, 80, 13): "4x7x5"},
        guidance=("sequential", "off"),
        lora=("to_query", "to_value"),
        tolerance=3e-3,  # queries and keys are rounded to bfloat16, whatever the model's dtype
    ),
]
