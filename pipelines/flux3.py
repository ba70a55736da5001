"""Flux.3: one image, text first, reference images last.

The first blocks attend within the image, within the references and within the text, each by itself; of these the image's are
eligible.  The blocks after them attend over text, image and references together, and references keep exact rows and
columns there.  There is no mask.  diffusers has modular pipelines for it only, whose guider makes one call for each guidance
branch.

A 1024x1024 image is 4,096 tokens, too few for sparse attention to pay on a GPU; 2048x2048 is 16,384.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sparsediff.adapter import ModelAdapter
from sparsediff.pipelines.flux import FluxAdapter
from sparsediff.pipelines.image_ids import one_image, size_from_ids
from sparsediff.token_grid import TokenGrid


class Flux3Adapter(FluxAdapter):
    """`Flux3Transformer2DModel`; called with noise levels from 0 to 1, as Flux.1 is."""

    processors = frozenset({"Flux3AttnProcessor"})
    presets = ModelAdapter.presets

    def attention_layers(self, model: nn.Module) -> list[tuple[str, nn.Module, int]]:
        """`mode_blocks.image.N.attn`, then `single_transformer_blocks.N.attn`."""
        lists = {
            "mode_blocks.image": model.mode_blocks["image"],
            "single_transformer_blocks": model.single_transformer_blocks,
        }
        modules = [
            (f"{name}.{i}.attn", block.attn)
            for name, blocks in lists.items()
            for i, block in enumerate(blocks)
        ]
        return [(name, module, depth) for depth, (name, module) in enumerate(modules)]

    def token_grid(self, model: nn.Module, arguments: Mapping[str, object]) -> TokenGrid:
        """Text, then the image that `img_ids [S, 4]` describe, then `image_cond_hidden_states`."""
        references = arguments.get("image_cond_hidden_states")
        return one_image(
            (1, *size_from_ids(arguments["img_ids"])),
            text=arguments["encoder_hidden_states"].shape[1],
            references=0 if references is None else references.shape[1],
        )

    def call_grid(self, grid: TokenGrid, layer: str, tokens: int) -> TokenGrid:
        """The image's own blocks see it alone."""
        return TokenGrid.video(*grid.shape) if layer.startswith("mode_blocks.") else grid
