"""CogVideoX 1.0 and 1.5: text-, image- and video-to-video; and ConsisID, which keeps a face on top of it.

One attention (`attn1`) over text and video together, text first.  T5 padding is attended like words, as in the stock model.
Both guidance branches come in one batch.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sparsediff.adapter import ModelAdapter, Preset
from sparsediff.pipelines.latents import patched
from sparsediff.token_grid import TokenGrid


class CogVideoXAdapter(ModelAdapter):
    """`CogVideoXTransformer3DModel`."""

    processors = frozenset({"CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"})
    attention = (("transformer_blocks", "attn1"),)
    presets = (
        Preset(
            method="adaspa",
            parameters={"sparsity": 0.8},
            provenance="published",
            source="arXiv:2502.21079, CogVideoX1.5 at 720p, 161 frames",
        ),
        Preset(
            method="auto",
            provenance="measured here",
            source="docs/methods.md, the bundled tiny-cogvideox only",
        ),
    )

    def token_grid(self, model: nn.Module, arguments: Mapping[str, object]) -> TokenGrid:
        """`hidden_states [B, F, C, H, W]` in patches of `(patch_size_t, patch_size, patch_size)`, after the text."""
        _, frames, _, height, width = arguments["hidden_states"].shape
        patch = model.config.patch_size
        patch_t = getattr(model.config, "patch_size_t", None) or 1
        return patched(
            (-(-frames // patch_t) * patch_t, height, width),
            (patch_t, patch, patch),
            text=arguments["encoder_hidden_states"].shape[1],
            text_first=True,
        )


class ConsisIDAdapter(CogVideoXAdapter):
    """`ConsisIDTransformer3DModel`: CogVideoX 1.0's blocks; a face comes in between them.

    What extracts the face and what shows it to the video (`perceiver_cross_attention`, 32 keys) attend by plain matrix
    products, and stay as they are.
    """

    presets = ModelAdapter.presets
