"""DiffusionGemma: text by denoising one canvas of tokens after another, against a cache of what came before.

`DiffusionGemmaPipeline` runs a causal encoder over each new stretch of context, which fills the cache, and then the
decoder once a step: the canvas (256 tokens) asks, cache and canvas are read.  Five layers of six read a window of the last
512 tokens, where there is nothing to choose; the sixth reads everything, and is what this library serves.  The decoder's
attention is bidirectional; its mask hides padding, and the unused end of a static cache.

The full layers of the published model have heads of 512 channels, for which there is a kernel on a CPU only.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sparsediff.pipelines.language_model import LanguageModelAdapter, attention_modules
from sparsediff.token_grid import TokenGrid


class DiffusionGemmaAdapter(LanguageModelAdapter):
    """`DiffusionGemmaForBlockDiffusion`; its encoder stays as it is."""

    attention_classes = frozenset({"DiffusionGemmaDecoderTextAttention"})

    def attention_layers(self, model: nn.Module) -> list[tuple[str, nn.Module, int]]:
        """`model.decoder.layers.N.self_attn`, those that read everything."""
        found = attention_modules(
            self._layers(model), "model.decoder.layers", self.attention_classes
        )
        return [layer for layer in found if not layer[1].is_sliding]

    def token_grid(self, model: nn.Module, arguments: Mapping[str, object]) -> TokenGrid:
        """The cache, of which the first call's was the prompt, and `decoder_input_ids [B, C]`, which ask."""
        context, prompt = self.context(arguments), arguments["prompt_tokens"]
        if arguments.get("decoder_input_ids") is None:
            raise ValueError("called without decoder_input_ids: the canvas is not told")
        canvas = arguments["decoder_input_ids"].shape[1]
        return TokenGrid.line(prompt, context - prompt + canvas, queries=canvas)

    def context(self, arguments: Mapping[str, object]) -> int:
        """Tokens in the cache."""
        cache = arguments.get("past_key_values")
        return 0 if cache is None else int(cache.get_seq_length())

    def remember(self, arguments: Mapping[str, object]) -> Mapping[str, object]:
        """All that the first canvas finds in the cache is prompt."""
        return {"prompt_tokens": self.context(arguments)}

    def _layers(self, model: nn.Module) -> nn.ModuleList:
        return model.model.decoder.layers
