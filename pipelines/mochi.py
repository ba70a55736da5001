"""Mochi 1: video first, then the words of the prompt.

The stock processor attends sample by sample, over the video and that sample's words only, whose number it reads from
the text mask: padding is never attended to, and the calls of two samples differ in length.  Each sample chooses its own
blocks.  Both guidance branches come in one batch.  The scheduler counts up: a timestep says how much is done.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sparsediff.adapter import ModelAdapter
from sparsediff.pipelines.latents import video_grid
from sparsediff.token_grid import TokenGrid


class MochiAdapter(ModelAdapter):
    """`MochiTransformer3DModel`."""

    processors = frozenset({"MochiAttnProcessor2_0"})
    attention = (("transformer_blocks", "attn1"),)
    timesteps_rise = True

    def token_grid(self, model: nn.Module, arguments: Mapping[str, object]) -> TokenGrid:
        """The latent video, then all of the text."""
        return video_grid(model, arguments, text=arguments["encoder_hidden_states"].shape[1])

    def call_grid(self, grid: TokenGrid, layer: str, tokens: int) -> TokenGrid:
        """The words of one sample only."""
        words = tokens - grid.grid_span[1]
        text = grid.num_tokens - grid.grid_span[1]
        return TokenGrid.video(*grid.shape, text=words) if 0 <= words <= text else grid
