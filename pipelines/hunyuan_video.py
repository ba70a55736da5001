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
from sparsediff.pipelines.latents import history_tokens, video_grid
from sparsediff.token_grid import Segment, TokenGrid


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


class FramepackAdapter(HunyuanVideoAdapter):
    """`HunyuanVideoFramepackTransformer3DModel`: the same blocks, over one section of a longer video at a time.

    In front of the section stands its history, the farther the coarser: clean frames, then frames merged by two and by
    four along every axis.  History stays exact.  Behind it come the tokens of the first picture, then the words; a batch of
    one leaves padding out altogether.
    """

    presets = ModelAdapter.presets

    def token_grid(self, model: nn.Module, arguments: Mapping[str, object]) -> TokenGrid:
        """History, the latent video, then `image_embeds` and `encoder_hidden_states`, all of it."""
        text = arguments["image_embeds"].shape[1] + arguments["encoder_hidden_states"].shape[1]
        history = sum(
            history_tokens(arguments[name], patch)
            for name, patch in HISTORY.items()
            if arguments.get(name) is not None
        )
        return _after(history, video_grid(model, arguments, text=text))

    def call_grid(self, grid: TokenGrid, layer: str, tokens: int) -> TokenGrid:
        """As much text as the call has."""
        text = tokens - grid.grid_span[1]
        history = grid.grid_span[0]
        return _after(history, TokenGrid.video(*grid.shape, text=text)) if text >= 0 else grid


# Argument -> latents (frames, rows, columns) of one token.
HISTORY = {
    "latents_history_4x": (4, 8, 8),
    "latents_history_2x": (2, 4, 4),
    "latents_clean": (1, 2, 2),
}


def _after(history: int, grid: TokenGrid) -> TokenGrid:
    return TokenGrid((Segment(role="image", length=history), *grid.segments)) if history else grid
