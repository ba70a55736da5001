"""Flux.1 (dev, schnell, Krea, Fill, Canny, Depth, Kontext, ...): one image, text first.

Double blocks and single blocks alike attend over text and image together; the single blocks' processor sees the two
already joined.  Kontext appends the tokens of its reference image, told apart by the first position id; all of them
stay exact, which for a reference as large as the image leaves no more than a quarter of the pairs to choose from.
Guidance is an input of the model; `true_cfg_scale` adds a second call.

A 1024x1024 image is 4,096 tokens, too few for sparse attention to pay on a GPU; 2048x2048 is 16,384, 4096x4096 65,536.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sparsediff.adapter import ModelAdapter, Preset
from sparsediff.pipelines.image_ids import one_image, size_from_ids
from sparsediff.token_grid import TokenGrid


class FluxAdapter(ModelAdapter):
    """`FluxTransformer2DModel`."""

    processors = frozenset({"FluxAttnProcessor"})
    attention = (("transformer_blocks", "attn"), ("single_transformer_blocks", "attn"))
    presets = (
        Preset(
            method="paro_attention",
            parameters={"density": 0.5},
            provenance="published",
            source="arXiv:2506.16054, Flux.1 at 1024x1024; to be measured first with sparsediff calibrate",
        ),
    )

    def token_grid(self, model: nn.Module, arguments: Mapping[str, object]) -> TokenGrid:
        """Text, then the image that `img_ids [S, 3]` describe, then reference images."""
        image = arguments["img_ids"]
        height, width = size_from_ids(image)
        return one_image(
            (1, height, width),
            text=arguments["encoder_hidden_states"].shape[1],
            references=image.shape[-2] - height * width,
        )

    def timestep(self, arguments: Mapping[str, object]) -> Tensor | None:
        """Flux is called with noise levels from 0 to 1."""
        level = arguments.get("timestep")
        return None if level is None else level * 1000
