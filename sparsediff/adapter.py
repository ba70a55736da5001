"""Everything model-specific and nothing else: which attention modules are eligible, and where their tokens lie."""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sparsediff.clock import Clock
from sparsediff.padding import PaddingMask
from sparsediff.processor import SparseProcessor, unwrapped, wrap_processor
from sparsediff.schedule import Schedule
from sparsediff.sdpa import CaughtForward
from sparsediff.token_grid import TokenGrid

# Transformer class name -> "module:attribute".  Matched exactly: near names (Wan, WanAnimate2) differ in what counts.
ADAPTERS = {
    "AllegroTransformer3DModel": "sparsediff.pipelines.allegro:AllegroAdapter",
    "AnyFlowTransformer3DModel": "sparsediff.pipelines.anyflow:AnyFlowAdapter",
    "ChromaTransformer2DModel": "sparsediff.pipelines.chroma:ChromaAdapter",
    "ChronoEditTransformer3DModel": "sparsediff.pipelines.wan:ChronoEditAdapter",
    "CogVideoXTransformer3DModel": "sparsediff.pipelines.cogvideox:CogVideoXAdapter",
    "ConsisIDTransformer3DModel": "sparsediff.pipelines.cogvideox:ConsisIDAdapter",
    "CosmosTransformer3DModel": "sparsediff.pipelines.cosmos:CosmosAdapter",
    "DiffusionGemmaForBlockDiffusion": "sparsediff.pipelines.diffusion_gemma:DiffusionGemmaAdapter",
    "EasyAnimateTransformer3DModel": "sparsediff.pipelines.easyanimate:EasyAnimateAdapter",
    "Flux2Transformer2DModel": "sparsediff.pipelines.flux2:Flux2Adapter",
    "Flux3Transformer2DModel": "sparsediff.pipelines.flux3:Flux3Adapter",
    "FluxTransformer2DModel": "sparsediff.pipelines.flux:FluxAdapter",
    "HeliosTransformer3DModel": "sparsediff.pipelines.helios:HeliosAdapter",
    "HunyuanImageTransformer2DModel": "sparsediff.pipelines.hunyuan_image:HunyuanImageAdapter",
    "HunyuanVideo15Transformer3DModel": "sparsediff.pipelines.hunyuan_video15:HunyuanVideo15Adapter",
    "HunyuanVideoFramepackTransformer3DModel": "sparsediff.pipelines.hunyuan_video:FramepackAdapter",
    "HunyuanVideoTransformer3DModel": "sparsediff.pipelines.hunyuan_video:HunyuanVideoAdapter",
    "Kandinsky5Transformer3DModel": "sparsediff.pipelines.kandinsky5:Kandinsky5Adapter",
    "Kandinsky6Transformer3DModel": "sparsediff.pipelines.kandinsky6:Kandinsky6Adapter",
    "LLaDA2MoeModelLM": "sparsediff.pipelines.llada2:LLaDA2Adapter",
    "LTX2VideoTransformer3DModel": "sparsediff.pipelines.ltx2:LTX2Adapter",
    "LTXVideoTransformer3DModel": "sparsediff.pipelines.ltx:LTXAdapter",
    "MiniMaxH3Transformer3DModel": "sparsediff.pipelines.minimax_h3:MiniMaxH3Adapter",
    "MochiTransformer3DModel": "sparsediff.pipelines.mochi:MochiAdapter",
    "MotifVideoTransformer3DModel": "sparsediff.pipelines.motif_video:MotifVideoAdapter",
    "QwenImageTransformer2DModel": "sparsediff.pipelines.qwen_image:QwenImageAdapter",
    "SD3Transformer2DModel": "sparsediff.pipelines.sd3:SD3Adapter",
    "SkyReelsV2Transformer3DModel": "sparsediff.pipelines.skyreels_v2:SkyReelsV2Adapter",
    "WanAnimateTransformer3DModel": "sparsediff.pipelines.wan_animate:WanAnimateAdapter",
    "WanTransformer3DModel": "sparsediff.pipelines.wan:WanAdapter",
    "WanVACETransformer3DModel": "sparsediff.pipelines.wan:WanVACEAdapter",
    "ZImageTransformer2DModel": "sparsediff.pipelines.z_image:ZImageAdapter",
}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings for a model, and how far they can be trusted.

    Attributes:
        method: a name of `sparsediff.list_methods()`.
        parameters: of the method; what is left out keeps its default.
        schedule: when to stay dense; None takes the method's own choice.
        provenance: `"published"` by the method's authors for this model, `"measured here"`, or a `"guess"`.
        source: where it comes from, in one line.
    """

    method: str
    parameters: Mapping[str, object] = field(default_factory=dict)
    schedule: Schedule | None = None
    provenance: Literal["published", "measured here", "guess"]
    source: str


class ModelAdapter(ABC):
    """One a model family; stateless."""

    # Settings to begin with, the most trusted first.
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(method="auto", provenance="guess", source="the default; not run on these weights"),
    )

    # Stock processor classes that make one attention call over the whole sequence, by `dispatch_attention_fn` or by
    # `scaled_dot_product_attention`.
    processors: frozenset[str] = frozenset()

    # What the attention masks of eligible calls are: None (all run dense, for `mask_reason`), or padding outside the grid
    # and nothing else, `"keys"` or `"pairs"` (`sparsediff.padding.valid_keys`).
    padding_mask: ClassVar[PaddingMask | None] = None
    # Whether that padding is always the end of the sequence.
    pads_last: ClassVar[bool] = False
    mask_reason: ClassVar[str] = "an attention mask that this adapter does not understand"

    # Whether masks of any other kind are read, once a forward, to see which blocks they hide (`sparsediff.attention_mask`):
    # that waits for the device.
    reads_masks: ClassVar[bool] = False

    # What the tokens are: of a latent video or image, or words that a language model writes.
    modality: ClassVar[Literal["video", "text"]] = "video"

    # Whether timesteps count up to the finished sample.
    timesteps_rise: ClassVar[bool] = False

    # Where the eligible modules are, in execution order: (list of blocks, name within a block).
    attention: ClassVar[tuple[tuple[str, str], ...]] = ()

    def attention_layers(self, model: nn.Module) -> list[tuple[str, nn.Module, int]]:
        """The eligible self-attention modules, in execution order: name, module, depth in the model from 0."""
        modules = [
            (f"{blocks}.{i}.{name}", getattr(block, name))
            for blocks, name in self.attention
            for i, block in enumerate(getattr(model, blocks))
        ]
        return [(name, module, depth) for depth, (name, module) in enumerate(modules)]

    @abstractmethod
    def token_grid(self, model: nn.Module, arguments: Mapping[str, object]) -> TokenGrid:
        """The grid of one forward call, from its bound arguments.

        Raises:
            ValueError: if the shapes do not make a whole grid.
        """

    def call_grid(self, grid: TokenGrid, layer: str, tokens: int) -> TokenGrid:
        """The grid of one attention call of `tokens` queries in module `layer`, where not all calls see the same tokens."""
        return grid

    def check_model(self, model: nn.Module) -> None:  # noqa: B027, most have nothing to refuse
        """Refuse a model that is configured to attend in a way of its own.

        Raises:
            ValueError: the message says how to switch that off.
        """

    def check_layer(self, name: str, module: nn.Module) -> None:
        """Refuse an eligible module whose attention call would not be seen.

        Raises:
            ValueError: it does not have the stock processor, or runs with context parallelism.
        """
        stock = unwrapped(module.processor)
        if type(stock).__name__ not in self.processors:
            raise ValueError(
                f"{name} uses {type(stock).__name__}, not one of {', '.join(sorted(self.processors))}; "
                "restore the stock attention processor first"
            )
        if getattr(stock, "_parallel_config", None) is not None:
            raise ValueError(f"{name} runs with context parallelism, which is not supported yet")

    def wrapper(
        self, module: nn.Module, state_key: int, layer: int
    ) -> SparseProcessor | CaughtForward:
        """What takes the place of an eligible module's processor, or of its `forward`, in an enabled model."""
        return wrap_processor(unwrapped(module.processor), state_key, layer)

    def head_dim(self, model: nn.Module) -> int:
        """Channels of one attention head."""
        return model.config.attention_head_dim

    def num_heads(self, model: nn.Module) -> int:
        """Attention heads of one layer."""
        return model.config.num_attention_heads

    def linear_weights(self, model: nn.Module) -> float:
        """Weights that a token meets on its way: the linear layers inside the model's lists of blocks."""
        blocks = (m for m in model.children() if isinstance(m, nn.ModuleList))
        linears = (m for b in blocks for m in b.modules() if isinstance(m, nn.Linear))
        return sum(m.in_features * m.out_features for m in linears)

    def clock(self, pipe: object | None, num_steps: int | None) -> Clock:
        """What reads generations and steps off a pipeline; off the calls alone, of `num_steps` each, if there is none."""
        return Clock(pipe, num_steps)

    def context(self, arguments: Mapping[str, object]) -> int | None:
        """Tokens that a language model has before it or is at; None for a video."""
        return None

    def remember(self, arguments: Mapping[str, object]) -> Mapping[str, object]:
        """Of the first call of a generation, what `token_grid` wants among the arguments of every call."""
        return {}

    def timestep(self, arguments: Mapping[str, object]) -> Tensor | None:
        """The timestep argument, in units of `num_train_timesteps`."""
        return arguments.get("timestep")


def adapter_for(model: nn.Module) -> ModelAdapter:
    """The adapter of a transformer.

    Raises:
        ValueError: if its class is not supported; the message lists those that are.
    """
    return adapter_of(type(model).__name__)


def adapter_of(name: str) -> ModelAdapter:
    """The adapter of a transformer class.

    Raises:
        ValueError: if it is not supported; the message lists those that are.
    """
    if name not in ADAPTERS:
        raise ValueError(f"no adapter for {name}; supported: {', '.join(sorted(ADAPTERS))}")
    module, attribute = ADAPTERS[name].split(":")
    return getattr(importlib.import_module(module), attribute)()


def bind_forward(model: nn.Module, args: tuple, kwargs: dict) -> Mapping[str, object]:
    """The arguments of a forward call by name, however they were passed."""
    signature = inspect.signature(type(model).forward)
    return signature.bind_partial(model, *args, **kwargs).arguments


def weight_dtype(model: nn.Module) -> torch.dtype:
    """What most of a model's floating-point weights are in: diffusers keeps some layers of a 16-bit model in float32."""
    elements: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            elements[parameter.dtype] = elements.get(parameter.dtype, 0) + parameter.numel()
    return max(elements, key=elements.get, default=torch.float32)
