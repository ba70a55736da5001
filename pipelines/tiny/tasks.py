"""What training needs to know of a family: how text is encoded and how the transformer is called.

Both must be exactly what the stock pipeline does at inference, padding included.
"""

from __future__ import annotations

import math
import random

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from .models import TEXT_TOKENS

TEXT_SLOTS = 40  # longest caption is 26 tokens; what is left of the slots is padding


class CountedPadding:
    """Cross-attention in which the last text slot stands for many identical ones.

    `WanPipeline` pads the text embeddings with zero rows to `max_sequence_length` and lets the video attend to
    them.  The rows are identical, so one key with `log(count)` added to its score gives the same result as `count`
    keys: 40 slots instead of 512, and the count may vary, so that the model works at any padding.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self) -> None:
        self.bias: Tensor | None = None  # [B, 1, 1, slots]

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None
    ):
        """Diffusers' processor signature; there is neither a mask nor a rotation in cross-attention."""
        del attention_mask, rotary_emb

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)

        q = heads(attn.norm_q(attn.to_q(hidden_states)))
        k = heads(attn.norm_k(attn.to_k(encoder_hidden_states)))
        v = heads(attn.to_v(encoder_hidden_states))
        weights = torch.softmax((q @ k.mT) * q.shape[-1] ** -0.5 + self.bias, dim=-1)
        out = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2, 3)
        return attn.to_out[0](out)


def padding_bias(valid: Tensor, total: int) -> Tensor:
    """`[B, 1, 1, slots]` for `valid` (bool `[B, slots]`, the last one False): 0, hidden, and log of the count."""
    bias = torch.where(valid, 0.0, -1e4)
    bias[:, -1] = (total - valid.sum(1)).float().log()
    return bias[:, None, None, :]


class WanTask:
    """`WanPipeline`: cross-attention to zero-padded UMT5 states."""

    def __init__(self, pipe: DiffusionPipeline, *, seed: int = 0) -> None:
        self.pipe, self.random = pipe, random.Random(seed)
        self.processor = CountedPadding()

    def prepare(self) -> None:
        """Install the training-time cross-attention."""
        for block in self.pipe.transformer.blocks:
            block.attn2.processor = self.processor

    def tokens(self, captions: list[str]) -> Tensor:
        """`[B, 40]` ids."""
        return self.pipe.tokenizer(
            captions,
            padding="max_length",
            max_length=TEXT_SLOTS,
            truncation=True,
            return_tensors="pt",
        ).input_ids

    def predict(self, noisy: Tensor, sigma: Tensor, ids: Tensor) -> Tensor:
        """Velocity `[B, 16, f, h, w]` for noisy latents at `sigma` in [0, 1]."""
        valid = ids > 0
        states = self.pipe.text_encoder(ids, valid.long()).last_hidden_state * valid[:, :, None]
        # half of the batches at the pipeline's default, the others anywhere down to 48
        full = TEXT_TOKENS["tiny-wan"]
        total = (
            full
            if self.random.random() < 0.5
            else round(math.exp(self.random.uniform(math.log(48), math.log(full))))
        )
        self.processor.bias = padding_bias(valid, total)
        return self.pipe.transformer(
            hidden_states=noisy,
            timestep=sigma * 1000,
            encoder_hidden_states=states,
            return_dict=False,
        )[0]


class CogVideoXTask:
    """`CogVideoXPipeline`: T5 states of padded text, joined with the video tokens, no mask anywhere."""

    def __init__(self, pipe: DiffusionPipeline, *, seed: int = 0) -> None:
        del seed  # nothing here is random
        self.pipe = pipe

    def prepare(self) -> None:
        """Nothing to change: the stock attention is what is trained."""

    def tokens(self, captions: list[str]) -> Tensor:
        """`[B, 226]` ids."""
        length = TEXT_TOKENS["tiny-cogvideox"]
        return self.pipe.tokenizer(
            captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids

    def predict(self, noisy: Tensor, sigma: Tensor, ids: Tensor) -> Tensor:
        """Velocity `[B, 16, f, h, w]` for noisy latents at `sigma` in [0, 1]."""
        states = self.pipe.text_encoder(ids)[0]
        frames, height, width = noisy.shape[2:]
        rotary = self.pipe._prepare_rotary_positional_embeddings(
            4 * height, 4 * width, frames, noisy.device
        )
        out = self.pipe.transformer(
            hidden_states=noisy.transpose(1, 2),
            encoder_hidden_states=states,
            timestep=sigma * 1000,
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
        return out.transpose(1, 2)


TASKS = {"tiny-wan": WanTask, "tiny-cogvideox": CogVideoXTask}
