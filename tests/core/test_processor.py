"""Wrapper processors by themselves; what they do in pipelines is tested there."""

import pytest
import torch

import sparsediff
from sparsediff import Custom, Schedule, processor
from sparsediff.pipelines import tiny
from sparsediff.testing import random_wan_pipeline

SPARSE = Custom(block=64, density=0.2, search="sparse")


@torch.no_grad()
def wan():
    """A transformer and a call of it."""
    g = torch.Generator().manual_seed(0)
    video, text = torch.randn(1, 16, 5, 16, 16, generator=g), torch.randn(1, 8, 32, generator=g)
    call = {
        "hidden_states": video,
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": text,
    }
    transformer = random_wan_pipeline().transformer
    return transformer, [block.attn1 for block in transformer.blocks], call


@torch.no_grad()
def cogvideox():
    g = torch.Generator().manual_seed(0)
    transformer = tiny.load("tiny-cogvideox").transformer
    channels, words = transformer.config.in_channels, transformer.config.text_embed_dim
    length = transformer.config.max_text_seq_length
    call = {
        "hidden_states": torch.randn(1, 4, channels, 16, 16, generator=g),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, length, words, generator=g),
    }
    return transformer, [block.attn1 for block in transformer.transformer_blocks], call


@pytest.mark.parametrize("model", [wan, cogvideox], ids=["dispatching", "catching"])
@torch.no_grad()
def test_a_processor_that_somebody_wrapped_goes_quiet(model, monkeypatch):
    """Whoever still calls ours after `disable` gets the stock processor."""
    monkeypatch.setattr("sparsediff.block_attention.CPU_BREAK_EVEN", 2.0)
    transformer, modules, call = model()
    stock = transformer(**call, return_dict=False)[0]
    handle = sparsediff.enable(transformer, SPARSE, schedule=Schedule())
    assert not torch.equal(transformer(**call, return_dict=False)[0], stock)
    ours = modules[0].processor
    modules[0].processor = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.warns(RuntimeWarning, match="replaced after sparsediff.enable"):
        handle.disable()
    assert torch.equal(transformer(**call, return_dict=False)[0], stock)


def test_dropout_is_not_lost(monkeypatch):
    monkeypatch.setattr(processor._eager, "layer", torch.tensor([-1, 0]))
    q = torch.randn(1, 8, 2, 16)
    assert (processor._backend(q, q, q, dropout_p=1.0) == 0).all()
