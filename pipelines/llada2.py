"""LLaDA2: text by refining one block of tokens after another.

`LLaDA2Pipeline` calls the model with everything up to the end of the block at work, `block_length` tokens more for each
block, and without a cache: every step attends from all of these tokens to all of them.  There is no guidance and no
progress bar of the pipeline.  The modelling code comes with the weights (`trust_remote_code`), so its classes are known
by name.  What mask they make of the pipeline's two-dimensional one is theirs: none where every token is valid, in the
code that was read; a mask of whole blocks is served as well, anything else runs dense.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sparsediff.pipelines.language_model import LanguageModelAdapter, attention_modules
from sparsediff.token_grid import TokenGrid


class LLaDA2Adapter(LanguageModelAdapter):
    """`LLaDA2MoeModelLM`."""

    attention_classes = frozenset({"LLaDA2MoeAttention", "LLaDA2MoeSdpaAttention"})

    def attention_layers(self, model: nn.Module) -> list[tuple[str, nn.Module, int]]:
        """`model.layers.N.attention`, all of them."""
        found = list(attention_modules(self._layers(model), "model.layers", self.attention_classes))
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no attention of the classes {', '.join(sorted(self.attention_classes))}; its "
                "modelling code is of another version than this library knows"
            )
        return found

    def token_grid(self, model: nn.Module, arguments: Mapping[str, object]) -> TokenGrid:
        """`input_ids [B, S]`: the prompt as long as the first call found it, then what is written."""
        tokens, prompt = self.context(arguments), arguments["prompt_tokens"]
        if prompt is None:
            raise ValueError("called with embeddings: they do not tell where the prompt ends")
        if not prompt < tokens:
            raise ValueError(f"{tokens} tokens, of which {prompt} were the prompt")
        return TokenGrid.line(prompt, tokens - prompt)

    def context(self, arguments: Mapping[str, object]) -> int:
        """Up to the end of the block at work."""
        ids = arguments.get("input_ids")
        return (arguments["inputs_embeds"] if ids is None else ids).shape[1]

    def remember(self, arguments: Mapping[str, object]) -> Mapping[str, object]:
        """The prompt ends where, in the first call, the mask tokens begin that fill the rest of the window."""
        ids = arguments.get("input_ids")
        if ids is None:
            return {"prompt_tokens": None}
        # The last token is one of them.  A prompt of the batch may end in more, but not all of them do.
        run = (ids == ids[:, -1:]).flip(1).long().cumprod(1).sum(1)
        return {"prompt_tokens": ids.shape[1] - int(run.min())}

    def _layers(self, model: nn.Module) -> nn.ModuleList:
        return model.get_decoder().layers
