"""LTX-2 (2.0, 2.3, 2.5): video with sound.

Of the six attentions of a block only the video's self-attention (`attn1`) is eligible; the audio's own, the two between
video and audio and the two on text stay as they are.  Keyframes, in-context references and guides stand behind the video
in the same sequence, and stay exact.  In-context references may come with a mask of strengths between 0 and 1, for every
pair of tokens: such calls run dense.  Layers that guidance perturbs (STG) make no attention call at all.

Guidance takes up to three calls a step, of one or two branches each; the pipeline names them.
"""

from __future__ import annotations

from sparsediff.pipelines.ltx import LTXAdapter


class LTX2Adapter(LTXAdapter):
    """`LTX2VideoTransformer3DModel`."""

    processors = frozenset({"LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor"})
    mask_reason = "a mask that weighs pairs of tokens (strength of in-context references)"
