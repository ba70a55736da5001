"""Wan 2.1 and 2.2: text-, image- and video-to-video, VACE, and ChronoEdit, which edits a picture as a short video.

Self-attention (`attn1`) runs over the latent video alone; text and image conditioning come in through cross-attention
(`attn2`, the same class and processor), which stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sparsediff.adapter import ModelAdapter, Preset
from sparsediff.pipelines.latents import video_grid
from sparsediff.token_grid import TokenGrid


class WanAdapter(ModelAdapter):
    """`WanTransformer3DModel`, each expert of Wan 2.2 being one, and `ChronoEditTransformer3DModel`, a copy of it."""

    processors = frozenset({"WanAttnProcessor"})
    attention = (("blocks", "attn1"),)
    presets = (
        Preset(
            method="draft_attention",
            parameters={"sparsity": 0.75},
            provenance="published",
            source="arXiv:2505.14708, Wan 2.1 at 768x1280 and 512x768, 81 frames",
        ),
        Preset(
            method="lite_attention",
            parameters={"threshold": -10.0},
            provenance="published",
            source="arXiv:2511.11062, Wan 2.1 and 2.2 14B at 720p",
        ),
        Preset(
            method="auto",
            provenance="measured here",
            source="docs/methods.md, the bundled tiny-wan only",
        ),
    )

    def token_grid(self, model: nn.Module, arguments: Mapping[str, object]) -> TokenGrid:
        """The latent video."""
        return video_grid(model, arguments)


class ChronoEditAdapter(WanAdapter):
    """`ChronoEditTransformer3DModel`: Wan's image-to-video under another class, with a copy of its processor."""

    presets = ModelAdapter.presets


class WanVACEAdapter(WanAdapter):
    """`WanVACETransformer3DModel`: control layers run before the main ones, over the same tokens.

    Reference images sit in front as extra latent frames and count as frames of the grid.
    """

    presets = ModelAdapter.presets

    def attention_layers(self, model: nn.Module) -> list[tuple[str, nn.Module, int]]:
        """`vace_blocks.N.attn1`, each as deep as the main layer that it controls, then `blocks.N.attn1`."""
        depths = model.config.vace_layers
        control = [
            (f"vace_blocks.{i}.attn1", block.attn1, depths[i])
            for i, block in enumerate(model.vace_blocks)
        ]
        return control + super().attention_layers(model)
