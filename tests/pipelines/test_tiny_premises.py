"""The probe that measures attention: it must not change what it only records."""

import pytest
import torch

from sparsediff.pipelines import tiny
from sparsediff.pipelines.tiny import evaluate, premises

CALL = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 2}  # 128 video tokens
PROMPTS = ["a red star moving left", "a blue ring"]


@pytest.fixture(scope="module", params=tiny.MODELS)
def pipe(request):
    return tiny.load(request.param)


def probed(pipe, **options):
    blocks = getattr(pipe.transformer, "blocks", None) or pipe.transformer.transformer_blocks
    family = {"WanPipeline": "tiny-wan", "CogVideoXPipeline": "tiny-cogvideox"}
    attention = premises.ATTENTION[family[type(pipe).__name__]]
    probe = premises.Probe(len(blocks), attention, **options)
    with premises.intercepted(pipe.transformer, probe):
        latents = evaluate.generate(pipe, PROMPTS, batch=2, output_type="latent", **CALL)
    return probe, latents


def test_recording_and_keeping_everything_change_nothing(pipe):
    stock = evaluate.generate(pipe, PROMPTS, batch=2, output_type="latent", **CALL)
    probe, recorded = probed(pipe, record=True)
    torch.testing.assert_close(recorded, stock, atol=5e-3, rtol=1e-3)
    tokens, layers, heads = 2 * 8 * 8, probe.layers, pipe.transformer.config.num_attention_heads
    assert len(probe.mass) == len(probe.lse) == len(probe.unconditional_overlap) == 2 * layers
    assert probe.mass[0].shape == (2, heads, tokens // 64, tokens // 64)
    assert probe.lse[0].shape == (2, heads, tokens)
    torch.testing.assert_close(
        probe.mass[0].float().sum(-1), torch.ones(2, heads, tokens // 64), atol=5e-3, rtol=0
    )
    _, full = probed(pipe, density=1.0)
    torch.testing.assert_close(full, stock, atol=5e-3, rtol=1e-3)
    assert torch.equal(
        evaluate.generate(pipe, PROMPTS, batch=2, output_type="latent", **CALL), stock
    )


def test_half_of_the_blocks_is_another_clip_and_a_dense_run_is_the_same(pipe):
    stock = evaluate.generate(pipe, PROMPTS, batch=2, output_type="latent", **CALL)
    _, sparse = probed(pipe, density=0.5)
    assert (sparse - stock).abs().max() > 0.1
    _, dense = probed(pipe, density=0.5, dense_steps=2)
    assert torch.equal(dense, stock)


def test_text_is_kept_whatever_the_density():
    text, tokens = 5, 128
    attention = premises.Attention(text_tokens=text, branches_in_batch=True)
    q, k, v = torch.randn(3, 2, 1, text + tokens, 8, generator=torch.Generator().manual_seed(0))
    probe = premises.Probe(1, attention, density=0.5)
    sparse = probe(q, k, v)
    scores = (q @ k.mT) * 8**-0.5
    kept = premises.top_blocks(premises.block_mass(scores.softmax(-1)[..., text:, text:]), 0.5)
    assert kept.sum(-1).eq(1).all()
    mask = torch.ones_like(scores, dtype=torch.bool)
    mask[..., text:, text:] = kept.repeat_interleave(64, -1).repeat_interleave(64, -2)
    expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(sparse, expected, atol=1e-5, rtol=1e-5)
