"""Flux.2 (dev and klein): one image, text first, reference images last.

The double blocks are those of Flux.1; the single blocks compute attention and feed-forward from one projection, in a
class of their own (`Flux2ParallelSelfAttention`).  Reference images keep exact rows and columns.  With klein's cache
of reference keys (`Flux2KleinKVPipeline` given images) queries and keys differ in length, or references attend among
themselves only: those calls run dense and say so.

A 1024x1024 image is 4,096 tokens, too few for sparse attention to pay on a GPU; 2048x2048 is 16,384, 4096x4096 65,536.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sparsediff.adapter import ModelAdapter
from sparsediff.pipelines.flux import FluxAdapter
from sparsediff.token_grid import TokenGrid


class Flux2Adapter(FluxAdapter):
    """`Flux2Transformer2DModel`."""

    processors = frozenset(
        {
            "Flux2AttnProcessor",
            "Flux2KVAttnProcessor",
            "Flux2KVParallelSelfAttnProcessor",
            "Flux2ParallelSelfAttnProcessor",
        }
    )

    presets = ModelAdapter.presets

    def token_grid(self, model: nn.Module, arguments: Mapping[str, object]) -> TokenGrid:
        """Text, then the image that `img_ids [B, S, 4]` describe, then reference images."""
        if arguments.get("kv_cache_mode") is not None:
            raise ValueError("reference images go through a key and value cache")
        return super().token_grid(model, arguments)
