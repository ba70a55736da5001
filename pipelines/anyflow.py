"""AnyFlow: text- and video-to-video in as many or few steps as asked for.

Built as Wan is: self-attention (`attn1`) runs over the latent video alone, text comes in through cross-attention (`attn2`),
which stays as it is.  Frames that are given are part of the video, at a noise level of their own.  Both guidance branches
come in one batch.  The transformer that goes on from earlier frames (FAR) is another class, with a cache of keys.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sparsediff.adapter import ModelAdapter
from sparsediff.pipelines.latents import patched
from sparsediff.pipelines.wan import WanAdapter
from sparsediff.token_grid import TokenGrid


class AnyFlowAdapter(WanAdapter):
    """`AnyFlowTransformer3DModel`."""

    processors = frozenset({"AnyFlowAttnProcessor"})
    presets = ModelAdapter.presets

    def token_grid(self, model: nn.Module, arguments: Mapping[str, object]) -> TokenGrid:
        """`hidden_states [B, F, C, H, W]` in patches of `config.patch_size`."""
        frames, _, height, width = arguments["hidden_states"].shape[1:]
        return patched((frames, height, width), model.config.patch_size)
