"""Kandinsky 5: text- and image-to-video, text-to-image.

Self-attention of the visual blocks (`self_attention`) runs over the latent video alone; the text blocks have one of
their own, which stays as it is, and text comes into the visual blocks through cross-attention.  The latent video has its
channels last.  Guidance takes a second call, which the pipeline does not name.

Checkpoints for ten seconds bring a sparse attention of their own (NABLA: `attention_type="nabla"`), which chooses
blocks of 8x8 patches in every call and needs the flex backend.  Two ways of choosing do not go together: such a model is
refused until its own is switched off.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sparsediff.adapter import ModelAdapter
from sparsediff.pipelines.latents import patched
from sparsediff.token_grid import TokenGrid

NABLA = (
    "this checkpoint brings a sparse attention of its own (NABLA); switch it off with "
    "transformer.register_to_config(attention_type='regular') before sparsediff.enable()"
)


class Kandinsky5Adapter(ModelAdapter):
    """`Kandinsky5Transformer3DModel`."""

    processors = frozenset({"Kandinsky5AttnProcessor"})
    attention = (("visual_transformer_blocks", "self_attention"),)

    def check_model(self, model: nn.Module) -> None:
        """Refuse NABLA."""
        if model.config.attention_type == "nabla":
            raise ValueError(NABLA)

    def token_grid(self, model: nn.Module, arguments: Mapping[str, object]) -> TokenGrid:
        """`hidden_states [B, F, H, W, C]` in patches of `config.patch_size`."""
        if arguments.get("sparse_params") is not None:
            raise ValueError(NABLA)
        return patched(arguments["hidden_states"].shape[1:4], model.config.patch_size)

    def head_dim(self, model: nn.Module) -> int:
        """Channels of one attention head: one share for each axis of the rotary embedding."""
        return sum(model.config.axes_dims)

    def num_heads(self, model: nn.Module) -> int:
        """Attention heads of one layer."""
        return model.config.model_dim // self.head_dim(model)
