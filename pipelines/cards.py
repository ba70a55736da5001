"""What there is to know about each model family before enabling it, for people and for the table of `sparsediff models`.

What an adapter already says (masks, presets) is read from the adapter; `tests/pipelines/test_cards.py` holds the rest to
diffusers itself: the pipelines that take a transformer, and the transformers that have no adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsediff.pipelines.releases import family_since, installed, reaches

CONFORMANCE = "conformance tests on tiny random weights"


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """One transformer class and who runs it.

    Attributes:
        family: what people call it.
        transformer: its class.
        pipelines: those of diffusers that take it.
        tokens: of one eligible attention call, in order.
        guidance: how its branches come: `"one after the other"`, `"in one batch"`, ...
        checked: names of its members in the conformance tests, or of a test module of its own.
        real: what was run at its real size.
        note: what to know beside that.
    """

    family: str
    transformer: str
    pipelines: tuple[str, ...]
    tokens: str
    guidance: str
    checked: tuple[str, ...]
    real: str = "not yet"
    note: str = ""

    @property
    def since(self) -> str:
        """The first release of diffusers that has it."""
        return family_since(self.transformer, self.pipelines)

    @property
    def lacking(self) -> str:
        """Why the installed diffusers does not have it; empty where it does."""
        if reaches(self.since):
            return ""
        return f"{self.family} came with diffusers {self.since}, this is {installed()}; pip install -U diffusers"


SEQUENTIAL, BATCHED = "one after the other", "in one batch"
SHORT = "1024x1024 pixels are 4,096 image tokens, too few to pay on a GPU; think of it from 2048x2048 (16,384) on"

CARDS = (
    ModelCard(
        family="Wan 2.1 and 2.2",
        transformer="WanTransformer3DModel",
        pipelines=(
            "WanPipeline",
            "WanImageToVideoPipeline",
            "WanVideoToVideoPipeline",
            "LucyEditPipeline",
        ),
        tokens="video",
        guidance=SEQUENTIAL,
        checked=("wan", "wan-2.2", "wan-ti2v", "wan-flf2v"),
        real="one step of 2.1 14B at 720p and of 2.2 5B at 704x1280, random weights, on one H200 (docs/performance.md)",
        note="Both experts of 2.2; first and last frame; one timestep a token (5B).",
    ),
    ModelCard(
        family="Wan VACE",
        transformer="WanVACETransformer3DModel",
        pipelines=("WanVACEPipeline",),
        tokens="reference frames and video, one grid",
        guidance=SEQUENTIAL,
        checked=("wan-vace",),
        note="The control layers run sparse too.",
    ),
    ModelCard(
        family="Wan Animate",
        transformer="WanAnimateTransformer3DModel",
        pipelines=("WanAnimatePipeline",),
        tokens="character's picture (exact) + video",
        guidance=SEQUENTIAL,
        checked=("wan-animate",),
        note="The face blocks' attention stays as it is.",
    ),
    ModelCard(
        family="ChronoEdit",
        transformer="ChronoEditTransformer3DModel",
        pipelines=("ChronoEditPipeline",),
        tokens="video",
        guidance=SEQUENTIAL,
        checked=("chronoedit",),
        note="Edits of a few frames are short sequences.",
    ),
    ModelCard(
        family="HunyuanVideo",
        transformer="HunyuanVideoTransformer3DModel",
        pipelines=(
            "HunyuanVideoPipeline",
            "HunyuanVideoImageToVideoPipeline",
            "HunyuanSkyreelsImageToVideoPipeline",
        ),
        tokens="video + text",
        guidance="an input of the model; one after the other with true_cfg_scale",
        checked=("hunyuan-video", "hunyuan-video-i2v"),
        note="SkyReels-V1 is this transformer.",
        real="one step at 720p, 129 frames, random weights, on one H200 (docs/performance.md)",
    ),
    ModelCard(
        family="Framepack",
        transformer="HunyuanVideoFramepackTransformer3DModel",
        pipelines=("HunyuanVideoFramepackPipeline",),
        tokens="history of three scales (exact) + section of the video + picture and text (exact)",
        guidance="an input of the model; one after the other with true_cfg_scale",
        checked=("framepack",),
        note="Each section is a run of its own and a short sequence: 9 latent frames at 640x640 are 14,400 tokens.",
    ),
    ModelCard(
        family="HunyuanVideo 1.5",
        transformer="HunyuanVideo15Transformer3DModel",
        pipelines=("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"),
        tokens="video + text and image features",
        guidance="the guider's choice, one call a branch",
        checked=("hunyuan-video-1.5",),
        real="one step at 720p, 121 frames, random weights, on one H200 (docs/performance.md)",
    ),
    ModelCard(
        family="LTX-Video",
        transformer="LTXVideoTransformer3DModel",
        pipelines=(
            "LTXPipeline",
            "LTXImageToVideoPipeline",
            "LTXConditionPipeline",
            "LTXI2VLongMultiPromptPipeline",
        ),
        tokens="conditions (exact) + video",
        guidance=BATCHED,
        checked=("ltx", "ltx-condition"),
    ),
    ModelCard(
        family="LTX-2",
        transformer="LTX2VideoTransformer3DModel",
        pipelines=(
            "LTX2Pipeline",
            "LTX2ConditionPipeline",
            "LTX2DFRPipeline",
            "LTX2DFRTemporalRefinePipeline",
            "LTX2HDRPipeline",
            "LTX2ImageToVideoPipeline",
            "LTX2InContextPipeline",
        ),
        tokens="video + keyframes and references (exact)",
        guidance="up to three calls a step, of one or two branches",
        checked=("ltx-2",),
        note="The video's self-attention only; audio and cross-attention stay as they are.",
        real="one step at 1088x1920, 121 frames, random weights, on one H200 (docs/performance.md)",
    ),
    ModelCard(
        family="CogVideoX 1.0 and 1.5",
        transformer="CogVideoXTransformer3DModel",
        pipelines=(
            "CogVideoXPipeline",
            "CogVideoXImageToVideoPipeline",
            "CogVideoXVideoToVideoPipeline",
            "CogVideoXFunControlPipeline",
        ),
        tokens="text + video",
        guidance=BATCHED,
        checked=("cogvideox", "cogvideox-1.5", "cogvideox-i2v", "cogvideox-v2v"),
        real="one step of 1.5 5B at 768x1360, 81 frames, random weights, on one H200 (docs/performance.md)",
    ),
    ModelCard(
        family="ConsisID",
        transformer="ConsisIDTransformer3DModel",
        pipelines=("ConsisIDPipeline",),
        tokens="text + video",
        guidance=BATCHED,
        checked=("consisid",),
        note="What extracts the face and shows it to the video stays as it is.",
    ),
    ModelCard(
        family="Mochi 1",
        transformer="MochiTransformer3DModel",
        pipelines=("MochiPipeline",),
        tokens="video + words of one sample",
        guidance=BATCHED,
        checked=("mochi",),
        note="Attends sample by sample; padding is never read.",
    ),
    ModelCard(
        family="MiniMax-H3",
        transformer="MiniMaxH3Transformer3DModel",
        pipelines=(),
        tokens="text + keyframes or references + audio (all exact) + video",
        guidance="none",
        checked=("minimax-h3",),
        note="In a modular pipeline only; a schedule by shares of the steps needs handle.begin_generation(num_steps).",
    ),
    ModelCard(
        family="SkyReels-V2",
        transformer="SkyReelsV2Transformer3DModel",
        pipelines=(
            "SkyReelsV2Pipeline",
            "SkyReelsV2ImageToVideoPipeline",
            "SkyReelsV2DiffusionForcingPipeline",
            "SkyReelsV2DiffusionForcingImageToVideoPipeline",
            "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        ),
        tokens="video",
        guidance=SEQUENTIAL,
        checked=("skyreels-v2", "skyreels-v2-df"),
    ),
    ModelCard(
        family="AnyFlow",
        transformer="AnyFlowTransformer3DModel",
        pipelines=("AnyFlowPipeline",),
        tokens="video",
        guidance=BATCHED,
        checked=("anyflow",),
        note="Of four steps, what a schedule leaves dense is a large share.",
    ),
    ModelCard(
        family="Cosmos 1.0, Predict 2 and 2.5, Transfer 2.5",
        transformer="CosmosTransformer3DModel",
        pipelines=(
            "CosmosTextToWorldPipeline",
            "CosmosVideoToWorldPipeline",
            "Cosmos2TextToImagePipeline",
            "Cosmos2VideoToWorldPipeline",
            "Cosmos2_5_PredictBasePipeline",
            "Cosmos2_5_TransferPipeline",
        ),
        tokens="video",
        guidance=SEQUENTIAL,
        checked=("cosmos", "cosmos-2.5"),
    ),
    ModelCard(
        family="Kandinsky 5",
        transformer="Kandinsky5Transformer3DModel",
        pipelines=(
            "Kandinsky5T2VPipeline",
            "Kandinsky5I2VPipeline",
            "Kandinsky5T2IPipeline",
            "Kandinsky5I2IPipeline",
        ),
        tokens="video",
        guidance=SEQUENTIAL,
        checked=("kandinsky-5",),
        note="Refused while the checkpoint's own sparse attention (NABLA) is on.",
    ),
    ModelCard(
        family="Kandinsky 6",
        transformer="Kandinsky6Transformer3DModel",
        pipelines=("Kandinsky6TI2VAPipeline",),
        tokens="video + picture (exact)",
        guidance=SEQUENTIAL,
        checked=("kandinsky-6", "kandinsky-6-i2v"),
        note="The video's self-attention only; sound, text and what goes between stay as they are.",
    ),
    ModelCard(
        family="Helios",
        transformer="HeliosTransformer3DModel",
        pipelines=("HeliosPipeline", "HeliosPyramidPipeline"),
        tokens="history of three scales (exact) + chunk of the video",
        guidance=SEQUENTIAL,
        checked=("helios",),
        note="Each chunk, and each resolution of the pyramid, is a run of its own, whose steps and noise levels count anew, and a "
        "short sequence: 9 latent frames at 384x640 are 8,640 tokens.",
    ),
    ModelCard(
        family="Motif-Video",
        transformer="MotifVideoTransformer3DModel",
        pipelines=("MotifVideoPipeline", "MotifVideoImage2VideoPipeline"),
        tokens="video + picture and text; twice the video in decoder blocks",
        guidance="the guider's choice, one call a branch",
        checked=("motif-video",),
        note="Attention to the text alone, beside the joint one, stays as it is.",
    ),
    ModelCard(
        family="EasyAnimate 5.1",
        transformer="EasyAnimateTransformer3DModel",
        pipelines=(
            "EasyAnimatePipeline",
            "EasyAnimateInpaintPipeline",
            "EasyAnimateControlPipeline",
        ),
        tokens="text + video",
        guidance=BATCHED,
        checked=("easyanimate",),
    ),
    ModelCard(
        family="Allegro",
        transformer="AllegroTransformer3DModel",
        pipelines=("AllegroPipeline",),
        tokens="video",
        guidance=BATCHED,
        checked=("allegro",),
    ),
    ModelCard(
        family="Flux.1",
        transformer="FluxTransformer2DModel",
        pipelines=(
            "FluxPipeline",
            "FluxImg2ImgPipeline",
            "FluxInpaintPipeline",
            "FluxFillPipeline",
            "FluxKontextPipeline",
            "FluxKontextInpaintPipeline",
            "FluxControlPipeline",
            "FluxControlImg2ImgPipeline",
            "FluxControlInpaintPipeline",
            "FluxControlNetPipeline",
            "FluxControlNetImg2ImgPipeline",
            "FluxControlNetInpaintPipeline",
            "VisualClozePipeline",
            "VisualClozeGenerationPipeline",
        ),
        tokens="text + image + references (exact)",
        guidance="an input of the model; one after the other with true_cfg_scale",
        checked=("flux", "flux-kontext"),
        note=f"{SHORT}. IP-Adapter's processors are refused by name.",
        real="one step at 2048x2048 and 4096x4096, random weights, on one H200 (docs/performance.md)",
    ),
    ModelCard(
        family="Chroma",
        transformer="ChromaTransformer2DModel",
        pipelines=("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline"),
        tokens="text + image",
        guidance=SEQUENTIAL,
        checked=("chroma",),
        note=f"{SHORT}. From a prompt calls run dense: diffusers weighs padding there instead of hiding it. They run sparse "
        "with what pipe.encode_prompt(...) gives and both masks as .bool(), text-to-image only, which hides padding and "
        "changes the picture. IP-Adapter's processors are refused by name.",
    ),
    ModelCard(
        family="Flux.2 and klein",
        transformer="Flux2Transformer2DModel",
        pipelines=(
            "Flux2Pipeline",
            "Flux2KleinPipeline",
            "Flux2KleinInpaintPipeline",
            "Flux2KleinKVPipeline",
        ),
        tokens="text + image + references (exact)",
        guidance="an input of the model (dev); one after the other (klein)",
        checked=("flux2", "flux2-klein-edit"),
        note=f"{SHORT}. With klein's cache of reference keys calls run dense.",
    ),
    ModelCard(
        family="Flux.3",
        transformer="Flux3Transformer2DModel",
        pipelines=(),
        tokens="text + image + references (exact); the image alone in its own blocks",
        guidance="the guider's choice, one call a branch",
        checked=("flux3", "flux3-edit"),
        note=f"{SHORT}. In a modular pipeline only; a schedule by shares of the steps needs "
        "handle.begin_generation(num_steps).",
    ),
    ModelCard(
        family="Qwen-Image, Edit, Layered",
        transformer="QwenImageTransformer2DModel",
        pipelines=(
            "QwenImagePipeline",
            "QwenImageImg2ImgPipeline",
            "QwenImageInpaintPipeline",
            "QwenImageControlNetPipeline",
            "QwenImageControlNetInpaintPipeline",
            "QwenImageEditPipeline",
            "QwenImageEditInpaintPipeline",
            "QwenImageEditPlusPipeline",
            "QwenImageLayeredPipeline",
        ),
        tokens="text + image or layers + references (exact)",
        guidance=SEQUENTIAL,
        checked=("qwen-image",),
        note=f"{SHORT}.",
    ),
    ModelCard(
        family="HunyuanImage 2.1",
        transformer="HunyuanImageTransformer2DModel",
        pipelines=("HunyuanImagePipeline", "HunyuanImageRefinerPipeline"),
        tokens="image + text",
        guidance="the guider's choice, one call a branch",
        checked=("hunyuan-image", "hunyuan-image-refiner"),
        note="2048x2048 pixels are 4,096 tokens, too few to pay on a GPU, and 16,384 in the refiner.",
    ),
    ModelCard(
        family="Z-Image",
        transformer="ZImageTransformer2DModel",
        pipelines=(
            "ZImagePipeline",
            "ZImageImg2ImgPipeline",
            "ZImageInpaintPipeline",
            "ZImageControlNetPipeline",
            "ZImageControlNetInpaintPipeline",
            "ZImageOmniPipeline",
        ),
        tokens="image + caption",
        guidance=BATCHED,
        checked=("z-image",),
        note=f"{SHORT}. Omni, with several images in one sequence, runs dense.",
    ),
    ModelCard(
        family="Stable Diffusion 3 and 3.5",
        transformer="SD3Transformer2DModel",
        pipelines=(
            "StableDiffusion3Pipeline",
            "StableDiffusion3Img2ImgPipeline",
            "StableDiffusion3InpaintPipeline",
            "StableDiffusion3ControlNetPipeline",
            "StableDiffusion3ControlNetInpaintingPipeline",
            "StableDiffusion3PAGPipeline",
            "StableDiffusion3PAGImg2ImgPipeline",
        ),
        tokens="image + text",
        guidance=BATCHED,
        checked=("sd3", "sd3.5-medium"),
        note=f"{SHORT}, which 3.0 cannot make. IP-Adapter is refused; what perturbed-attention guidance replaces runs dense.",
    ),
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
