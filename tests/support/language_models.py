"""Tiny random pipelines of language models, of the real diffusers classes around real transformers models.

LLaDA2's modelling code comes with its weights and cannot be had offline.  In its place stand models of transformers that
are called alike, under its class names: `bidirectional` (EuroBERT: grouped keys, RoPE, no causality; the masked LM that
is nearest), `mixture` (Qwen3 MoE: experts and normed keys besides, made bidirectional by the flag that LLaDA2's attention
sets) and `direct` (attention that calls PyTorch without transformers' table, as older LLaDA2 code does).
"""

import importlib
import warnings

import diffusers
import pytest
import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from torch.nn import functional
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DiffusionGemmaTextConfig,
    EuroBertConfig,
    EuroBertForMaskedLM,
    Gemma4VisionConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.eurobert.modeling_eurobert import EuroBertAttention
from transformers.models.eurobert.modeling_eurobert import apply_rotary_pos_emb as rotate
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

from sparsediff.pipelines.cards import CARDS
from sparsediff.testing import CORPUS, seeded, word_tokenizer

MASK = 63  # the mask token
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip


class DirectAttention(EuroBertAttention):
    """Calls PyTorch by itself, on repeated keys."""

    def forward(self, hidden_states, position_embeddings, attention_mask, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (
            project(hidden_states).view(shape).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, k, *position_embeddings)
        k, v = (x.repeat_interleave(self.num_key_value_groups, 1) for x in (k, v))
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        return self.o_proj(out.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), None


def llada2_model(kind="bidirectional", attention="sdpa", **changes):
    """`LLaDA2MoeModelLM` in name and call."""
    with seeded(0):
        if kind == "mixture":
            experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
            sizes = {**SIZES, **experts, "use_cache": False, **changes}
            config, parent = Qwen3MoeConfig(**sizes), Qwen3MoeForCausalLM
        else:
            no_words = {"bos_token_id": None, "eos_token_id": None, "mask_token_id": MASK}
            config, parent = EuroBertConfig(**{**SIZES, **no_words, **changes}), EuroBertForMaskedLM
        config._attn_implementation = attention
        model = type("LLaDA2MoeModelLM", (parent,), {})(config).eval()
    base = {"mixture": Qwen3MoeAttention, "direct": DirectAttention}.get(kind, EuroBertAttention)
    attention_class = type("LLaDA2MoeAttention", (base,), {})
    for layer in model.model.layers:
        layer.self_attn.__class__ = attention_class
        layer.self_attn.is_causal = False
        # Random keys and queries are all alike: sharpen them, or every block is as good as any other.
        layer.self_attn.q_proj.weight.data *= 200
    return model


def llada2_pipeline(kind="bidirectional", **changes):
    """A `LLaDA2Pipeline`."""
    model = llada2_model(kind, **changes)
    pipe = LLaDA2Pipeline(model=model, scheduler=BlockRefinementScheduler(), tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def gemma_pipeline(**changes):
    """A `DiffusionGemmaPipeline` of three layers, the last two of which read everything; skips where diffusers has none."""
    if lacking := next(card.lacking for card in CARDS if card.family == "DiffusionGemma"):
        pytest.skip(lacking)
    text = {
        **SIZES, "num_hidden_layers": 3, "global_head_dim": 32, "num_global_key_value_heads": 1, "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"], "num_experts": 4, "top_k_experts": 2,
        "moe_intermediate_size": 16, **changes,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    # The pipeline imports it in the middle of a run; PyTorch's own deprecations are not what is tested.
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        importlib.import_module("torch._inductor.cudagraph_trees")
    with seeded(0):
        config = DiffusionGemmaConfig(
            text_config=DiffusionGemmaTextConfig(**text),
            vision_config=Gemma4VisionConfig(**vision),
            canvas_length=64,
        )
        model = DiffusionGemmaForBlockDiffusion(config).eval()
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    pipe = diffusers.DiffusionGemmaPipeline(
        model=model, scheduler=BlockRefinementScheduler(), processor=tokenizer
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write(pipe, prompt=200, length=120, steps=4, seed=0, **call):
    """Token ids `[1, length]` after a prompt of that many tokens; four or two blocks."""
    generator = torch.Generator().manual_seed(seed)
    call = {"output_type": "seq", "eos_early_stop": False, "generator": generator, **call}
    if isinstance(pipe, LLaDA2Pipeline):
        ids = torch.randint(0, 60, (1, prompt), generator=torch.Generator().manual_seed(1))
        return pipe(
            input_ids=ids, use_chat_template=False, gen_length=length, block_length=32, num_inference_steps=steps,
            mask_token_id=MASK, **{"threshold": 2.0, **call},
        ).sequences  # fmt: skip
    words = " ".join(CORPUS).split()
    text = " ".join(words[i * i % len(words)] for i in range(prompt))
    return pipe(
        prompt=text, gen_length=length, num_inference_steps=steps, confidence_threshold=None, **call
    ).sequences  # fmt: skip


def published_choice(query, key, select, block, prompt, scale, visible=None):
    """Sections 4.1 and 4.2 of arXiv:2509.24014, one row of blocks at a time."""
    key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    logits = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) * scale
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    weights = logits.softmax(-1)
    rows, columns = -(-query.shape[1] // block), -(-key.shape[1] // block)
    border = -(-prompt // block)  # a block on the border is the prompt's
    keep = torch.zeros(*weights.shape[:2], rows, columns, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, keep.shape[:3])).tolist():
        row = weights[b, h, i * block : (i + 1) * block]
        mass = torch.stack([part.sum() for part in row.split(block, dim=-1)])
        there = torch.ones(columns, dtype=torch.bool)
        if visible is not None:
            there = torch.stack([part.any() for part in visible[i * block].split(block, dim=-1)])
        for run in (range(border), range(border, columns)):
            seen = [j for j in run if there[j]]
            budget = -int(-(select * len(seen) - 1e-4) // 1)
            for j in sorted(seen, key=lambda j: -mass[j])[:budget]:
                keep[b, h, i, j] = True
    return keep
