"""Chroma: Flux.1 without its guidance and modulation layers; one image, text first.

Every block attends over text and image together.  All padding of the prompt but one token is meant to be hidden, by a mask
over pairs of tokens; guidance takes a second call, with a mask of its own.

The pipelines make that mask of numbers, 1 and 0, which PyTorch adds to the logits: padding is weighed, not hidden
(diffusers issue 12116).  Such calls run dense and say so.  With a mask of booleans, which `ChromaPipeline` takes beside
embeddings, padding is hidden and calls run sparse; image-to-image and inpainting turn that into numbers again.

A 1024x1024 image is 4,096 tokens, too few for sparse attention to pay on a GPU; 2048x2048 is 16,384.
"""

from __future__ import annotations

from sparsediff.adapter import ModelAdapter
from sparsediff.pipelines.flux import FluxAdapter


class ChromaAdapter(FluxAdapter):
    """`ChromaTransformer2DModel`: blocks, processor, ids and noise levels of Flux.1."""

    padding_mask = "pairs"
    mask_reason = "a mask of numbers, which weighs padding instead of hiding it: pass prompt_embeds with prompt_attention_mask.bool()"
    presets = ModelAdapter.presets
