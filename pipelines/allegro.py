"""Allegro: video alone in self-attention (`attn1`); text comes in through cross-attention (`attn2`), which stays as it is.

The transformer takes a mask over the video too, which the pipeline does not use; a call with one runs dense and says so.
Both guidance branches come in one batch.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sparsediff.adapter import ModelAdapter
from sparsediff.pipelines.latents import video_grid
from sparsediff.token_grid import TokenGrid


class AllegroAdapter(ModelAdapter):
    """`AllegroTransformer3DModel`."""

    processors = frozenset({"AllegroAttnProcessor2_0"})
    attention = (("transformer_blocks", "attn1"),)

    def token_grid(self, model: nn.Module, arguments: Mapping[str, object]) -> TokenGrid:
        """The latent video."""
        return video_grid(model, arguments)
