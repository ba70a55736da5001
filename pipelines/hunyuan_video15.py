"""HunyuanVideo 1.5, text- and image-to-video.

Every block attends over video and text together, video first.  The text is what the image encoder, ByT5 (words to be
written in the picture) and the language model say, 1,985 tokens: the valid ones come first, then the padding, to which
a text-to-video run counts all 729 tokens of the image.  The stock processor turns the padding into a mask over all pairs
of tokens, anew in every layer; where a call runs sparse nobody reads but its diagonal.  It is built all the same: a byte
for every pair of tokens.

A guider makes one call for each guidance branch, and names it.  The two refiner layers attend over text alone and stay
as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sparsediff.adapter import ModelAdapter
from sparsediff.pipelines.latents import video_grid
from sparsediff.token_grid import TokenGrid


class HunyuanVideo15Adapter(ModelAdapter):
    """`HunyuanVideo15Transformer3DModel`."""

    processors = frozenset({"HunyuanVideo15AttnProcessor2_0"})
    attention = (("transformer_blocks", "attn"),)
    padding_mask = "pairs"
    pads_last = True  # the model itself sorts valid text in front

    def token_grid(self, model: nn.Module, arguments: Mapping[str, object]) -> TokenGrid:
        """The latent video, then the tokens of both text encoders and of the image."""
        encoders = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
        text = sum(arguments[name].shape[1] for name in encoders)
        return video_grid(model, arguments, text=text)
