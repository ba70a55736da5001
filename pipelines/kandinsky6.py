"""Kandinsky 6: text- and image-to-video with sound.

Of the attentions of a block only the video's self-attention is eligible; the sound's own, those on text and the two between
video and sound stay as they are.  The latent video has its channels last.  Image-to-video appends the picture as one more
latent frame, at the place of the first: its rows and columns stay exact, and it is cut off in the end.  Guidance takes a
second call, which the pipeline names.

The transformer for super-resolution is another class, which brings a sparse attention of its own (NABLA).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from sparsediff.pipelines.kandinsky5 import Kandinsky5Adapter
from sparsediff.pipelines.latents import patched
from sparsediff.pipelines.packed import video_amid
from sparsediff.token_grid import TokenGrid

# The pipeline passes the same tensor in every step: its values come to the host once a generation.
_frames: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class Kandinsky6Adapter(Kandinsky5Adapter):
    """`Kandinsky6Transformer3DModel`; heads are those of Kandinsky 5."""

    processors = frozenset({"Kandinsky6AttnProcessor"})

    def attention_layers(self, model: nn.Module) -> list[tuple[str, nn.Module, int]]:
        """`visual_transformer_blocks.N.video_dec_block.self_attention`."""
        return [
            (
                f"visual_transformer_blocks.{i}.video_dec_block.self_attention",
                block.self_attention,
                i,
            )
            for i, block in enumerate(_video_blocks(model))
        ]

    def check_model(self, model: nn.Module) -> None:
        """Nothing to refuse."""

    def token_grid(self, model: nn.Module, arguments: Mapping[str, object]) -> TokenGrid:
        """`hidden_states [B, F, H, W, C]` in patches; frames past `visual_rope_pos[0]` at its highest are references."""
        grid = patched(arguments["hidden_states"].shape[1:4], model.config.patch_size)
        frames, height, width = grid.shape
        places = arguments.get("visual_rope_pos")
        video = frames if places is None else _rising(places[0])
        return video_amid((video, height, width), 0, (frames - video) * height * width)

    def linear_weights(self, model: nn.Module) -> float:
        """Those of the video's half of every block."""
        halves = (
            part
            for fused, own in zip(
                model.visual_transformer_blocks, _video_blocks(model), strict=True
            )
            for part in (own, fused.va_cross_attention)
        )
        linears = (m for half in halves for m in half.modules() if isinstance(m, nn.Linear))
        return sum(m.in_features * m.out_features for m in linears)


def _video_blocks(model: nn.Module) -> list[nn.Module]:
    return [block.video_dec_block for block in model.visual_transformer_blocks]


def _rising(places: Tensor) -> int:
    """How many leading frames follow one another in time."""
    if places not in _frames:
        turns = (places.diff() <= 0).nonzero()
        _frames[places] = int(turns[0]) + 1 if len(turns) else len(places)
    return _frames[places]
