"""Stable Diffusion 3 and 3.5: one image, text last.

All guidance branches come in one batch; skip-layer guidance adds a call.  The first 13 blocks of 3.5 medium have a
second attention over the image alone.

3.0 takes images up to 1536x1536 (9,216 tokens), 3.5 up to 3072x3072 (36,864); below 2048x2048 (16,384) sparse attention
does not pay on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sparsediff.adapter import ModelAdapter
from sparsediff.pipelines.latents import patched
from sparsediff.token_grid import TokenGrid


class SD3Adapter(ModelAdapter):
    """`SD3Transformer2DModel`."""

    processors = frozenset({"FusedJointAttnProcessor2_0", "JointAttnProcessor2_0"})

    def attention_layers(self, model: nn.Module) -> list[tuple[str, nn.Module, int]]:
        """`transformer_blocks.N.attn`, and `attn2` where there is one."""
        return [
            (f"transformer_blocks.{i}.{name}", getattr(block, name), i)
            for i, block in enumerate(model.transformer_blocks)
            for name in ("attn", "attn2")
            if getattr(block, name) is not None
        ]

    def token_grid(self, model: nn.Module, arguments: Mapping[str, object]) -> TokenGrid:
        """`hidden_states [B, C, H, W]` in patches of `config.patch_size`, then the text."""
        patch = model.config.patch_size
        return patched(
            (1, *arguments["hidden_states"].shape[-2:]),
            (1, patch, patch),
            text=arguments["encoder_hidden_states"].shape[1],
        )

    def call_grid(self, grid: TokenGrid, layer: str, tokens: int) -> TokenGrid:
        """`attn2` sees the image alone."""
        return TokenGrid.video(*grid.shape) if layer.endswith(".attn2") else grid
