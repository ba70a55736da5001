"""Motif-Video, text- and image-to-video.

Every block attends over video and text together, video first; in image-to-video the tokens of the picture stand before
the words.  Padded words are hidden by a mask over keys.  Attention from the video to the words alone (`cross_attn`), which
some blocks have beside, stays as it is.  A guider makes one call for each guidance branch, and names it.

The last single blocks may be decoder blocks.  They see no text, but the video twice: as it came in, then as the blocks
before have made it.  Both count as frames of one grid.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sparsediff.adapter import ModelAdapter
from sparsediff.pipelines.latents import video_grid
from sparsediff.token_grid import TokenGrid


class MotifVideoAdapter(ModelAdapter):
    """`MotifVideoTransformer3DModel`."""

    processors = frozenset({"MotifVideoAttnProcessor2_0"})
    attention = (("transformer_blocks", "attn"), ("single_transformer_blocks", "attn"))
    padding_mask = "keys"

    def token_grid(self, model: nn.Module, arguments: Mapping[str, object]) -> TokenGrid:
        """The latent video, then `image_embeds` and `encoder_hidden_states`."""
        beside = (arguments.get(name) for name in ("image_embeds", "encoder_hidden_states"))
        text = sum(x.shape[1] for x in beside if x is not None)
        return video_grid(model, arguments, text=text)

    def call_grid(self, grid: TokenGrid, layer: str, tokens: int) -> TokenGrid:
        """A decoder block's video is there twice."""
        frames, height, width = grid.shape
        if tokens != grid.num_tokens and tokens == 2 * frames * height * width:
            return TokenGrid.video(2 * frames, height, width)
        return grid
