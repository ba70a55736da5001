"""Catching the attention call inside stock code that makes it itself."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional

from sparsediff.processor import STATES
from sparsediff.recorder import Recorder
from sparsediff.sdpa import CatchAttention, CaughtForward, dense_attention


class Attention(nn.Module):
    """Keys of one head for two of queries."""

    def __init__(self):
        super().__init__()
        self.project, self.out = nn.Linear(16, 32), nn.Linear(16, 16)

    def forward(self, x, mask=None, dropout=0.0):
        q, k, v = self.project(x).split([16, 8, 8], -1)
        q, k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in (q, k, v))
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=0.3, enable_gqa=True
        )
        return self.out(out.transpose(1, 2).flatten(2))


class State:
    """A run that attends densely and writes down who asked."""

    def __init__(self):
        self.calls, self.recorder = [], Recorder(method="", schedule="")

    def attend(self, index, query, key, value, attn_mask, scale, is_causal, enable_gqa):
        self.calls.append((index, tuple(query.shape), tuple(key.shape), scale, enable_gqa))
        call = {"attn_mask": attn_mask, "scale": scale, "is_causal": is_causal}
        return dense_attention(query, key, value, enable_gqa=enable_gqa, **call)


@pytest.fixture
def state():
    state = STATES[-1] = State()
    yield state
    del STATES[-1]


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return nn.Sequential(*(Attention() for _ in range(12))).eval()


def attach(layers):
    caught = [CaughtForward(m, torch.tensor([-1, i])) for i, m in enumerate(layers)]
    for module, forward in zip(layers, caught, strict=True):
        forward.attach(module)
    return caught


@torch.no_grad()
def test_the_call_is_seen_and_the_result_the_same(state, layers):
    x = torch.randn(2, 9, 16)
    mask = torch.rand(9, 9) > 0.2
    mask.fill_diagonal_(True)
    stock = layers[0](x, mask)
    attach(layers)
    assert torch.equal(layers[0](x, mask), stock)
    assert state.calls == [(0, (2, 9, 4, 4), (2, 9, 2, 4), 0.3, True)]


@torch.no_grad()
def test_outside_of_it_nothing_is_caught(state, layers):
    attach(layers)
    x = torch.randn(1, 9, 16)
    layers[0](x)
    functional.scaled_dot_product_attention(x[None], x[None], x[None])
    with pytest.raises(RuntimeError):
        layers[1](torch.randn(1, 9, 5))
    functional.scaled_dot_product_attention(x[None], x[None], x[None])
    assert len(state.calls) == 1


def test_what_needs_gradients_or_dropout_stays_stock(state, layers):
    attach(layers)
    x = torch.randn(1, 9, 16)
    layers[0](x).sum().backward()
    assert layers[0].project.weight.grad is not None
    with torch.no_grad():
        layers[0](x, dropout=0.5)
    assert state.calls == []


@torch.no_grad()
def test_all_layers_share_one_graph_and_come_and_go(state, layers):
    x, counter = torch.randn(1, 9, 16), CompileCounter()
    torch._dynamo.reset()
    stock = layers(x)
    for module in layers:
        module.compile(backend=counter, fullgraph=True)
    assert torch.equal(layers(x), stock)
    assert counter.frame_count == 1
    caught = attach(layers)
    for _ in range(2):
        assert torch.equal(layers(x), stock)
    assert counter.frame_count == 2
    assert [call[0] for call in state.calls] == list(range(12)) * 2
    for module, forward in zip(layers, caught, strict=True):
        assert forward.detach(module)
        assert "forward" not in vars(module)
    assert torch.equal(layers(x), stock)
    assert len(state.calls) == 24


@torch.no_grad()
def test_somebody_elses_forward_is_left_alone_and_ours_goes_quiet(state, layers):
    module = layers[0]
    (ours, *_) = attach(layers)
    theirs = module.forward = lambda x: 2 * ours(x)
    assert not ours.in_place(module)
    assert not ours.detach(module)
    assert module.forward is theirs
    x = torch.randn(1, 9, 16)
    assert torch.equal(module(x), 2 * Attention.forward(module, x))
    assert state.calls == []


@torch.no_grad()
def test_a_mode_around_any_code(state):
    x = torch.randn(1, 2, 9, 4)
    with CatchAttention(torch.tensor([-1, 7])):
        out = functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    assert torch.equal(out, functional.scaled_dot_product_attention(x, x, x, is_causal=True))
    assert [call[0] for call in state.calls] == [7]
