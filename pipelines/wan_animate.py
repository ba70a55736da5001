"""Wan Animate: a character from an image, moved by a video of poses and faces.

As in Wan, self-attention (`attn1`) runs over the latent video alone.  The latent in front of the first frame is the
character's picture: it is what the others look back to and is cut off in the end, so its rows and columns stay exact.  The
attention of the face blocks, frame by frame, stays as it is.  Long videos are made in segments, each a run of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sparsediff.adapter import ModelAdapter
from sparsediff.pipelines.latents import video_grid
from sparsediff.pipelines.packed import video_amid
from sparsediff.pipelines.wan import WanAdapter
from sparsediff.token_grid import TokenGrid


class WanAnimateAdapter(WanAdapter):
    """`WanAnimateTransformer3DModel`; its processor is a copy of Wan's under the same name."""

    presets = ModelAdapter.presets

    def token_grid(self, model: nn.Module, arguments: Mapping[str, object]) -> TokenGrid:
        """`hidden_states [B, C, 1 + F, H, W]`: the character, then the video."""
        frames, height, width = video_grid(model, arguments).shape
        return video_amid((frames - 1, height, width), height * width, 0)
