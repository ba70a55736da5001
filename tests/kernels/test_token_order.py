"""Moving tokens: the kernel, run by Triton's interpreter, and plain torch against a loop."""

import pytest
import torch

from sparsediff.kernels.attention import _why_not_triton
from sparsediff.kernels.token_order import (
    gather_tokens,
    gather_tokens_reference,
    gather_tokens_triton,
)

INTERPRETED = not _why_not_triton(torch.device("cpu"), torch.float32, 64, (64, 64))
FORMS = (gather_tokens_reference, *([gather_tokens_triton] if INTERPRETED else []))


def make(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_index(orders, seq):
    g = torch.Generator().manual_seed(seq)
    return torch.stack([torch.randperm(seq, generator=g) for _ in range(orders)]).int()


def one_by_one(x, index, heads):
    moved = torch.empty_like(x)
    for h in range(x.shape[2]):
        moved[:, :, h] = x[:, index[0 if heads is None else heads[h]].long(), h]
    return moved


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seq", [1, 63, 64, 65, 127, 128, 129, 251])
@pytest.mark.parametrize("dim", [16, 64, 96])
def test_every_head_its_own_order(form, seq, dim):
    tensors = [make(2, seq, 5, dim, seed=i) for i in range(3)]
    index, heads = make_index(2, seq), torch.tensor([1, 0, 0, 1, 1], dtype=torch.int32)
    for rows in (heads, None):
        moved = form(tuple(tensors), index, rows)
        for x, y in zip(tensors, moved, strict=True):
            assert y.is_contiguous()
            assert torch.equal(y, one_by_one(x, index, rows))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seq", [1, 65, 130])
def test_every_clip_and_head_its_own_order(form, seq):
    x, index = make(3, seq, 2, 64), make_index(3, seq)
    heads = torch.tensor([[0, 2], [1, 1], [2, 0]], dtype=torch.int32)
    (moved,) = form((x,), index, heads)
    for b in range(3):
        assert torch.equal(moved[b : b + 1], one_by_one(x[b : b + 1], index, heads[b]))
    (moved,) = form((x,), index, torch.stack([heads[:, 1], heads[:, 0]], 1).flip(1))
    assert torch.equal(moved[:1], one_by_one(x[:1], index, heads[0]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_count_and_dtype(form, count, dtype):
    tensors = tuple(make(1, 70, 3, 64, seed=i, dtype=dtype) for i in range(count))
    index = make_index(1, 70)
    moved = form(tensors, index)
    assert len(moved) == count
    for x, y in zip(tensors, moved, strict=True):
        assert torch.equal(y, one_by_one(x, index, None))


@pytest.mark.parametrize("form", FORMS)
def test_any_strides(form):
    """Fused projections, head-major tensors and a last dimension that is not dense."""
    fused = make(1, 70, 3 * 4 * 64)
    tensors = (
        fused.chunk(3, -1)[1].unflatten(-1, (4, 64)),
        make(1, 4, 70, 64, seed=1).transpose(1, 2),
        make(1, 70, 4, 128, seed=2)[..., ::2],
    )
    index, heads = make_index(3, 70), torch.tensor([2, 0, 1, 0], dtype=torch.int32)
    for x, y in zip(tensors, form(tensors, index, heads), strict=True):
        assert torch.equal(y, one_by_one(x, index, heads))


@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_move(form):
    (moved,) = form((make(0, 5, 2, 8),), make_index(1, 5))
    assert moved.shape == (0, 5, 2, 8)


def test_tensors_that_do_not_fit_are_refused():
    x, index = make(1, 8, 2, 4), make_index(1, 8)
    for tensors, heads, message in (
        ((x,) * 4, None, "one to 3 tensors"),
        ((x[0],), None, "one to 3 tensors"),
        ((x, x[:, :4]), None, r"\[1, 8, 2, 4\] and \[1, 4, 2, 4\]"),
        ((x[:, :4],), None, "made for 8 tokens, the tensor has 4"),
        ((x,), torch.zeros(3, dtype=torch.int32), "made for 3 heads, the tensor has 2"),
    ):
        with pytest.raises(ValueError, match=message):
            gather_tokens(tensors, index, heads)
