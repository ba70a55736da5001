"""Qwen-Image, Edit, Edit-Plus and Layered: one image (or its layers), text first, reference images last.

Every block attends over text and image together.  A text mask comes in only where prompts of a batch differ in length.
Reference images keep exact rows and columns.  Layered makes several images of one size at once, which count as the
frames of the grid; the image that it takes apart comes last.  Guidance branches come one after the other.

A 1024x1024 image is 4,096 tokens, too few for sparse attention to pay on a GPU; 2048x2048 is 16,384.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from sparsediff.adapter import ModelAdapter
from sparsediff.pipelines.flux import FluxAdapter
from sparsediff.pipelines.image_ids import one_image
from sparsediff.token_grid import TokenGrid


class QwenImageAdapter(FluxAdapter):
    """`QwenImageTransformer2DModel`: double blocks only; called with noise levels from 0 to 1, as Flux is."""

    processors = frozenset({"QwenDoubleStreamAttnProcessor2_0"})
    attention = (("transformer_blocks", "attn"),)
    padding_mask = "keys"
    presets = ModelAdapter.presets

    def token_grid(self, model: nn.Module, arguments: Mapping[str, object]) -> TokenGrid:
        """Text, then the image of `img_shapes[0][0] = (frames, height, width)`, then the others of that list."""
        # Of a batch the model itself looks at the first entry only.
        images = arguments["img_shapes"][0]
        images = images if isinstance(images, list) else [images]
        frames, height, width = images[0]
        if model.config.use_layer3d_rope:
            layers = images[:-1]
            if len(set(layers)) != 1:
                raise ValueError(f"layers of different sizes: {layers}")
            frames *= len(layers)
        return one_image(
            (frames, height, width),
            text=arguments["encoder_hidden_states"].shape[1],
            references=sum(math.prod(size) for size in images) - frames * height * width,
        )
