"""MiniMax-H3: video with sound, from text, keyframes or references.

One attention over everything: text, keyframes or reference clips, audio, then the video that is made, packed into one
sequence whose tokens the model knows by coordinates and tags alone.  All but that video stays exact.  There is no mask,
and no call for guidance.  The two refiner layers attend over text alone and stay as they are.

diffusers has a modular pipeline for it only, which counts its steps where nobody else sees them: steps are told apart
by the timesteps of the calls, and a `Schedule` by shares of the steps needs `handle.begin_generation(num_steps)`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from sparsediff.adapter import ModelAdapter
from sparsediff.pipelines.packed import runs, volume_beside
from sparsediff.token_grid import Segment, TokenGrid

# What the model's `token_tags` say of a token that is not of the video being made.
ROLES = ("image", "text", "audio")

# The pipeline passes the same tensor in every step: its values come to the host once a generation.
_grids: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class MiniMaxH3Adapter(ModelAdapter):
    """`MiniMaxH3Transformer3DModel`."""

    processors = frozenset({"MiniMaxH3AttnProcessor"})
    attention = (("transformer_blocks", "attn"),)

    def token_grid(self, model: nn.Module, arguments: Mapping[str, object]) -> TokenGrid:
        """What `position_ids [S, 3]` and `token_tags [S]` say."""
        positions = arguments["position_ids"]
        if positions not in _grids:
            _grids[positions] = _with_roles(volume_beside(positions), arguments["token_tags"])
        return _grids[positions]

    def timestep(self, arguments: Mapping[str, object]) -> Tensor | None:
        """The noisiest of the call's timesteps, which say how much is done, from 0 to 1."""
        done = arguments.get("timestep")
        return None if done is None else (1 - done.min()) * 1000


def _with_roles(grid: TokenGrid, tags: Tensor) -> TokenGrid:
    start, stop = grid.grid_span
    video = next(s for s in grid.segments if s.role == "grid")

    def beside(tags: Tensor) -> list[Segment]:
        return [
            Segment(role=ROLES[int(tags[first])], length=last - first) for first, last in runs(tags)
        ]

    tags = tags.cpu()
    return TokenGrid((*beside(tags[:start]), video, *beside(tags[stop:])))
