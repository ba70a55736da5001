"""LTX-Video: text- and image-to-video, and generation under conditions.

Self-attention (`attn1`) runs over the latent video alone; text comes in through cross-attention (`attn2`).  The pipeline
packs the video, so the transformer sees a list of tokens: text-to-video tells it the size, `LTXConditionPipeline` and the
pipeline for long videos only the coordinates of every token.  Conditions and guides stand beside the video, as tokens of
their own, and stay exact.  Both guidance branches come in one batch.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sparsediff.adapter import ModelAdapter
from sparsediff.pipelines.packed import video_amid, volume_beside
from sparsediff.token_grid import TokenGrid


class LTXAdapter(ModelAdapter):
    """`LTXVideoTransformer3DModel`."""

    processors = frozenset({"LTXVideoAttnProcessor"})
    attention = (("transformer_blocks", "attn1"),)

    def token_grid(self, model: nn.Module, arguments: Mapping[str, object]) -> TokenGrid:
        """`num_frames, height, width` if the pipeline says them, else what `video_coords` say.

        Patches of the transformer are single latents; the autoencoder has done the rest.
        """
        tokens = arguments["hidden_states"].shape[1]
        shape = tuple(arguments.get(name) for name in ("num_frames", "height", "width"))
        coordinates = arguments.get("video_coords")
        # The pipeline for long videos passes coordinates, and ones for sizes.
        if coordinates is not None and (None in shape or shape == (1, 1, 1)):
            return volume_beside(coordinates)
        if None in shape:
            raise ValueError("neither the size of the latent video nor its coordinates")
        frames, height, width = shape
        beside = tokens - frames * height * width
        if beside < 0:
            raise ValueError(f"{tokens} tokens for a latent video of {frames}x{height}x{width}")
        return video_amid(shape, 0, beside)
