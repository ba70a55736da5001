"""The families that make pictures."""

from __future__ import annotations

from sparsediff.pipelines.model_card import BATCHED, SEQUENTIAL, ModelCard

SHORT = "1024x1024 pixels are 4,096 image tokens, too few to pay on a GPU; think of it from 2048x2048 (16,384) on"

IMAGES = (
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
)
