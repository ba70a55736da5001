"""HunyuanVideo, text- and image-to-video, and what was trained on top of it with the same transformer (SkyReels-V1).

Both kinds of block attend over video and text together, video first: the double ones project the text by themselves, the
single ones get the two in one sequence.  Text is padded at its end; a mask, always there, hides the padded keys, and
padded rows are computed but never read.  By default guidance is an input of the model; `true_cfg_scale` adds a second
call.  Image-to-video either concatenates channels or replaces the modulation of the first frame; attention is the same.
The two refiner layers attend over text alone and stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sparsediff.adapter import ModelAdapter, Preset
from sparsediff.pipelines.latents import video_grid
from sparsediff.token_grid import TokenGrid


class HunyuanVideoAdapter(ModelAdapter):
    """`HunyuanVideoTransformer3DModel`."""

    processors = frozenset({"HunyuanVideoAttnProcessor2_0"})
    attention = (("transformer_blocks", "attn"), ("single_transformer_blocks", "attn"))
    padding_mask = "keys"
    pads_last = True  # the model counts the words of `encoder_attention_mask`, and shows as many
    presets = (
        Preset(
            method="draft_attention",
            parameters={"sparsity": 0.9},
            provenance="published",
            source="arXiv:2505.14708, 768x1280, 129 frames",
        ),
        Preset(
            method="adaspa",
            parameters={"sparsity": 0.8},
            provenance="published",
            source="arXiv:2502.21079, 720p, 129 frames",
        ),
    )

    def token_grid(self, model: nn.Module, arguments: Mapping[str, object]) -> TokenGrid:
        """The latent video, then the text `encoder_hidden_states [B, T, C]`."""
        return video_grid(model, arguments, text=arguments["encoder_hidden_states"].shape[1])
