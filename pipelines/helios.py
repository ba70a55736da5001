"""Helios: long videos from text, an image or a video, a chunk of frames at a time; in one resolution or up a pyramid.

Built as Wan is: self-attention (`attn1`) runs over the video alone, text comes in through cross-attention (`attn2`, the same
class and processor), which stays as it is.  In front of the chunk stands its history, the farther the coarser: frames
merged by four along every axis, by two, and whole ones, among them the first of the video.  History stays exact.
Guidance takes a second call, which the pipeline names.

Every chunk is a run of its own, and in the pyramid every resolution of a chunk.  Nine latent frames at 384x640, the default,
are 8,640 tokens and 2,516 of history.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sparsediff.adapter import ModelAdapter
from sparsediff.pipelines.latents import history_tokens, video_grid
from sparsediff.pipelines.packed import video_amid
from sparsediff.pipelines.wan import WanAdapter
from sparsediff.token_grid import TokenGrid

# Scale of the history -> patches of the transformer (along every axis) in one token.
HISTORY = {"long": 4, "mid": 2, "short": 1}


class HeliosAdapter(WanAdapter):
    """`HeliosTransformer3DModel`."""

    processors = frozenset({"HeliosAttnProcessor"})
    presets = ModelAdapter.presets

    def token_grid(self, model: nn.Module, arguments: Mapping[str, object]) -> TokenGrid:
        """History, then the latent video; of the history what comes with its indices."""
        patch = model.config.patch_size
        history = sum(
            history_tokens(arguments[f"latents_history_{scale}"], [n * times for n in patch])
            for scale, times in HISTORY.items()
            if arguments.get(f"latents_history_{scale}") is not None
            and arguments.get(f"indices_latents_history_{scale}") is not None
        )
        return video_amid(video_grid(model, arguments).shape, history, 0)
