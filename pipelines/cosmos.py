"""Cosmos 1.0, Predict 2, Predict 2.5 and Transfer 2.5: text, images and videos to video; text to image.

Self-attention (`attn1`) runs over the latent video alone; text, and in 2.5 an image, come in through cross-attention
(`attn2`), which stays as it is.  Frames that condition the others are part of the video.  Guidance takes a second call,
which the pipeline does not name.  The control branch of Transfer is a model of its own and stays as it is.

The stock processors take whatever attention backend is active in the process, and only PyTorch's own can be caught: with
another one such a model is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn

from sparsediff.adapter import ModelAdapter
from sparsediff.pipelines.latents import video_grid
from sparsediff.token_grid import TokenGrid


class CosmosAdapter(ModelAdapter):
    """`CosmosTransformer3DModel`."""

    processors = frozenset({"CosmosAttnProcessor2_0"})
    attention = (("transformer_blocks", "attn1"),)

    def check_model(self, model: nn.Module) -> None:
        """Refuse a backend whose calls we would not see."""
        backend, _ = _AttentionBackendRegistry.get_active_backend()
        if backend != AttentionBackendName.NATIVE:
            raise ValueError(
                f"{type(model).__name__} would attend on the active backend {backend.value!r}, where it cannot be caught; "
                "leave attention_backend(...), or unset DIFFUSERS_ATTN_BACKEND"
            )

    def token_grid(self, model: nn.Module, arguments: Mapping[str, object]) -> TokenGrid:
        """The latent video."""
        return video_grid(model, arguments)
