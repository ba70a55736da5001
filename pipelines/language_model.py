"""What language models of transformers have in common: no attention processors, no timestep, a growing context.

Attention is caught at the one call of `scaled_dot_product_attention` inside each attention module
(`sparsediff.sdpa`), whether the module gets there through transformers' table of attention functions or by itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sparsediff.adapter import ModelAdapter, Preset
from sparsediff.block_clock import BlockClock
from sparsediff.sdpa import CaughtForward


class LanguageModelAdapter(ModelAdapter):
    """Base of the adapters; they name their attention modules and count their tokens."""

    presets = (
        Preset(
            method="sparse_d",
            parameters={"block": 128},
            provenance="guess",
            source="arXiv:2509.24014's setting for long contexts, published for Dream and LLaDA-1.5; not run on these weights",
        ),
    )
    modality = "text"
    reads_masks = True  # pipelines of language models wait for the device in every step anyhow

    def check_layer(self, name: str, module: nn.Module) -> None:
        """Refuse what does not call PyTorch's attention.

        Raises:
            ValueError: the model was loaded with another attention implementation.
        """
        chosen = module.config._attn_implementation
        if chosen != "sdpa":
            raise ValueError(
                f"{name} attends by {chosen!r}, which cannot be caught; load the model with attn_implementation='sdpa' "
                "or call model.set_attn_implementation('sdpa')"
            )

    def wrapper(self, module: nn.Module, state_key: int, layer: int) -> CaughtForward:
        """In place of the module's `forward`."""
        return CaughtForward(module, torch.tensor([state_key, layer]))

    def clock(self, pipe: object | None, num_steps: int | None) -> BlockClock:
        """Blocks of tokens, each with its steps."""
        return BlockClock(pipe, num_steps)

    def head_dim(self, model: nn.Module) -> int:
        """Channels of one attention head, in the layers that are eligible."""
        return self.attention_layers(model)[0][1].head_dim

    def num_heads(self, model: nn.Module) -> int:
        """Query heads of one layer."""
        return model.config.get_text_config().num_attention_heads

    def linear_weights(self, model: nn.Module) -> float:
        """Weights that a token meets in the layers: of a mixture of experts, the share that is chosen."""
        config = model.config.get_text_config()
        chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", 0)
        share = chosen / config.num_experts if getattr(config, "num_experts", None) else 1.0
        weights = [(name, p) for name, p in self._layers(model).named_parameters() if p.ndim > 1]
        return sum(
            p.numel() * (share if "experts" in name.split(".") else 1.0) for name, p in weights
        )

    def _layers(self, model: nn.Module) -> nn.ModuleList:
        """The stack that denoises."""
        raise NotImplementedError

    def timestep(self, arguments: object) -> Tensor | None:
        """There is none."""
        return None


def attention_modules(
    layers: nn.ModuleList, prefix: str, classes: frozenset[str]
) -> Iterator[tuple[str, nn.Module, int]]:
    """Name, module and depth of the modules of these classes, by exact name: remote code is not imported."""
    for depth, layer in enumerate(layers):
        for name, module in layer.named_modules():
            if type(module).__name__ in classes:
                yield f"{prefix}.{depth}.{name}", module, depth
