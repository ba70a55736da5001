"""What there is to know about each model family before enabling it, for people and for the table of `sparsediff models`.

What an adapter already says (masks, presets) is read from the adapter; `tests/pipelines/test_cards.py` holds the rest to
diffusers itself: the pipelines that take a transformer, and the transformers that have no adapter.
"""

from __future__ import annotations

from sparsediff.pipelines.image_cards import IMAGES
from sparsediff.pipelines.model_card import ModelCard
from sparsediff.pipelines.video_cards import VIDEO

CONFORMANCE = "conformance tests on tiny random weights"

LANGUAGE = (
    ModelCard(
        family="LLaDA2",
        transformer="LLaDA2MoeModelLM",
        pipelines=("LLaDA2Pipeline",),
        tokens="prompt (chosen apart) + what is written",
        guidance="none",
        checked=("test_language_models", "test_llada2"),
        note="docs/language-models.md says what was tested with what.",
    ),
    ModelCard(
        family="DiffusionGemma",
        transformer="DiffusionGemmaForBlockDiffusion",
        pipelines=("DiffusionGemmaPipeline",),
        tokens="cache + canvas, which asks",
        guidance="none",
        checked=("test_language_models",),
        note="The layers that read everything; heads of 512 channels have a kernel on a CPU only.",
    ),
)

CARDS = (*VIDEO, *IMAGES, *LANGUAGE)

# Transformers of diffusers without an adapter, all for video and some for images, and why; enable() refuses them with the list
# of those that have one.
NOT_SPARSE = {
    "AnyFlowFARTransformer3DModel": "reads earlier frames from a key and value cache: queries and keys differ in length",
    "Cosmos3OmniTransformer": "two attention calls in one, causal and over shared keys (grouped heads)",
    "JoyImageEditPlusTransformer3DModel": "no adapter yet: several images of different sizes in one sequence",
    "JoyImageEditTransformer3DModel": "no adapter yet: reference images beside the edited one",
    "Kandinsky6SRTransformer3DModel": "brings a sparse attention of its own (NABLA), always, and asks for the flex backend",
    "LatteTransformer3DModel": "attention is factorised, within frames and along time: short sequences already",
    "QwenImage21Transformer2DModel": "the image asks alone, of keys that a cache holds beside its own (text, references): orders of "
    "tokens want as many queries as keys",
    "SanaVideoTransformer3DModel": "linear attention: there is nothing quadratic to leave out",
    "SanaWMLTX2RefinerTransformer3DModel": "no adapter yet: LTX-2's blocks as a refiner",
    "SanaWMTransformer3DModel": "linear attention in most layers: there is nothing quadratic to leave out",
    "WanAnimate2Transformer3DModel": "brings block masks of its own, and asks for the flex backend",
}

# What people ask for that this version of diffusers does not hold.
ABSENT = {
    "LongCat-Video": "diffusers has LongCat-Image and LongCat-AudioDiT",
    "Wan 2.2 S2V": "speech to video is in Wan's own repository",
}
