"""HunyuanImage 2.1: base, distilled, and the refiner that draws its images once more.

Every block attends over image and text together, image first; padded text is hidden by a mask over keys, always there.
Where there are two text encoders the model itself sorts valid words (ByT5's, then the language model's) in front of the
padding; the refiner has one, whose padding stands where the tokenizer put it.  A guider makes one call for each guidance
branch, and names it.  The two refiner layers of the text stay as they are.

The autoencoder shrinks an image 32 times: 2048x2048, the size it was made for, is 4,096 tokens, too few for sparse
attention to pay on a GPU.  The refiner's shrinks it 16 times: 16,384 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sparsediff.adapter import ModelAdapter
from sparsediff.pipelines.latents import patched
from sparsediff.token_grid import TokenGrid


class HunyuanImageAdapter(ModelAdapter):
    """`HunyuanImageTransformer2DModel`."""

    processors = frozenset({"HunyuanImageAttnProcessor"})
    attention = (("transformer_blocks", "attn"), ("single_transformer_blocks", "attn"))
    padding_mask = "keys"

    def token_grid(self, model: nn.Module, arguments: Mapping[str, object]) -> TokenGrid:
        """`hidden_states [B, C, H, W]`, or `[B, C, F, H, W]` in the refiner, then the words of the text encoders."""
        sizes = tuple(arguments["hidden_states"].shape[2:])
        patch = tuple(model.config.patch_size)
        text = arguments["encoder_hidden_states"].shape[1]
        second = arguments.get("encoder_hidden_states_2")
        if second is not None and model.context_embedder_2 is not None:
            text += second.shape[1]
        image = (1,) * (3 - len(sizes))
        return patched(image + sizes, image + patch, text=text)
