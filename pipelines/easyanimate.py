"""EasyAnimate 5.1: text-to-video, inpainting (image-to-video) and control.

One attention over text and video together, text first; with a second (T5) encoder its tokens come right after the first
one's.  Text padding is attended like words, as in the stock model.  Both guidance branches come in one batch.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sparsediff.adapter import ModelAdapter
from sparsediff.pipelines.latents import video_grid
from sparsediff.token_grid import TokenGrid


class EasyAnimateAdapter(ModelAdapter):
    """`EasyAnimateTransformer3DModel`."""

    processors = frozenset({"EasyAnimateAttnProcessor2_0"})
    attention = (("transformer_blocks", "attn1"),)

    def token_grid(self, model: nn.Module, arguments: Mapping[str, object]) -> TokenGrid:
        """The latent video, after the text."""
        words = (arguments.get(f"encoder_hidden_states{name}") for name in ("", "_t5"))
        text = sum(x.shape[1] for x in words if x is not None)
        return video_grid(model, arguments, text=text, text_first=True)
