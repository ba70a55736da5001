"""SkyReels-V2: text- and image-to-video, and diffusion forcing, which makes long videos segment by segment.

Built as Wan is: self-attention (`attn1`) runs over the latent video alone, text and image come in through
cross-attention (`attn2`).  Diffusion forcing gives every latent frame a noise level of its own.  With a
`causal_block_size` it also hides later frames behind a mask over all pairs of tokens: such calls run dense.
"""

from __future__ import annotations

from sparsediff.adapter import ModelAdapter
from sparsediff.pipelines.wan import WanAdapter


class SkyReelsV2Adapter(WanAdapter):
    """`SkyReelsV2Transformer3DModel`."""

    processors = frozenset({"SkyReelsV2AttnProcessor"})
    presets = ModelAdapter.presets
    mask_reason = "a block-causal mask (diffusion forcing with causal_block_size)"
