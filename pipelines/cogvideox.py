"""CogVideoX 1.0 and 1.5: text-, image- and video-to-video.

One attention (`attn1`) over text and video together, text first.  T5 padding is attended like words, as in the stock model.
Both guidance branches come in one batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from sparsediff.adapter import ModelAdapter
from sparsediff.token_grid import TokenGrid


class CogVideoXAdapter(ModelAdapter):
    """`CogVideoXTransformer3DModel`."""

    processors = frozenset({"CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"})
    attention = (("transformer_blocks", "attn1"),)

    def token_grid(self, model: nn.Module, arguments: Mapping[str, object]) -> TokenGrid:
        """`hidden_states [B, F, C, H, W]` in patches of `(patch_size_t, patch_size, patch_size)`, after the text."""
        _, frames, _, height, width = arguments["hidden_states"].shape
        patch, patch_t = model.config.patch_size, model.config.patch_size_t or 1
        if height % patch or width % patch:
            raise ValueError(
                f"latent frames {height}x{width} are not a multiple of the patch {patch}"
            )
        text = arguments["encoder_hidden_states"].shape[1]
        grid = (-(-frames // patch_t), height // patch, width // patch)
        return TokenGrid.video(*grid, text=text, text_first=True)

    def dispatching(self, stock: object) -> object:
        """The stock processors call PyTorch's attention themselves."""
        return DispatchingProcessor()


class DispatchingProcessor:
    """What `CogVideoXAttnProcessor2_0` and its fused form compute, ending in `dispatch_attention_fn`."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Joint attention; returns video `[B, V, C]` and text `[B, T, C]`."""
        text = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        batch, tokens, _ = joint.shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        if getattr(attn, "fused_projections", False):
            query, key, value = attn.to_qkv(joint).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(joint), attn.to_k(joint), attn.to_v(joint)
        query, key, value = (
            x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value)
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (
                torch.cat([x[:, :, :text], apply_rotary_emb(x[:, :, text:], image_rotary_emb)], 2)
                for x in (query, key)
            )
        out = dispatch_attention_fn(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=attention_mask,
            backend=self._attention_backend,
        )
        out = attn.to_out[1](attn.to_out[0](out.flatten(2, 3)))
        words, video = out.split([text, tokens - text], dim=1)
        return video, words
