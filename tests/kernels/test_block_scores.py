import pytest
import torch

from sparsediff.kernels.attention import _why_not_triton
from sparsediff.kernels.block_scores import (
    block_mass,
    block_mass_triton,
    block_means,
    pooled_scores,
)


def make(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("seq", [1, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_means_are_true_means(seq, dtype):
    x = make(2, seq, 3, 8, dtype=dtype)
    got = block_means(x, 64)
    assert got.dtype == torch.float32
    want = torch.stack([x[:, i : i + 64].double().mean(1) for i in range(0, seq, 64)], 2)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_pooled_scores_are_logits_of_means():
    q, k = make(1, 130, 2, 16), make(1, 70, 2, 16, seed=1)
    want = block_means(q, 64) @ block_means(k, 32).mT * 0.25
    torch.testing.assert_close(pooled_scores(q, k, (64, 32)), want)
    torch.testing.assert_close(pooled_scores(q, k, (64, 32), scale=0.5), want * 2)


def slow_mass(q, k, bq, bk, lse=None):
    s = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * q.shape[-1] ** -0.5
    p = (s - (s.logsumexp(-1) if lse is None else lse)[..., None]).exp()
    rows = [p[..., i : i + bq, :].sum(-2) for i in range(0, q.shape[1], bq)]
    return torch.stack(
        [
            torch.stack([r[..., j : j + bk].sum(-1) for j in range(0, k.shape[1], bk)], -1)
            for r in rows
        ],
        -2,
    )


@pytest.mark.parametrize("seq_q", [1, 64, 130])
@pytest.mark.parametrize("seq_k", [1, 65, 128])
@pytest.mark.parametrize("chunk_bytes", [1, 256 << 20])
def test_block_mass_is_exact_whatever_the_chunk(seq_q, seq_k, chunk_bytes):
    q, k = make(2, seq_q, 2, 16), make(2, seq_k, 2, 16, seed=1)
    got = block_mass(q, k, (64, 32), chunk_bytes=chunk_bytes)
    torch.testing.assert_close(got.double(), slow_mass(q, k, 64, 32), rtol=1e-4, atol=1e-5)
    rows = torch.tensor([min(64, seq_q - i) for i in range(0, seq_q, 64)], dtype=torch.float32)
    torch.testing.assert_close(got.sum(-1), rows.expand(2, 2, -1))


def test_block_mass_with_a_cached_lse():
    q, k, lse = make(1, 100, 2, 16), make(1, 90, 2, 16, seed=1), make(1, 2, 100, seed=2) + 4
    torch.testing.assert_close(
        block_mass(q, k, (64, 64), lse=lse).double(),
        slow_mass(q, k, 64, 64, lse.double()),
        rtol=1e-4,
        atol=1e-5,
    )
    lse[0, 0, :64] = -torch.inf
    assert (block_mass(q, k, (64, 64), lse=lse)[0, 0, 0] == 0).all()


@pytest.mark.skipif(
    bool(_why_not_triton(torch.device("cpu"), torch.float32, 64, (64, 64))),
    reason="needs TRITON_INTERPRET=1 (make test sets it)",
)
@pytest.mark.parametrize(("seq_q", "seq_k"), [(1, 65), (130, 64), (100, 200)])
@pytest.mark.parametrize("cached", [False, True])
def test_block_mass_kernel(seq_q, seq_k, cached):
    q, k = make(1, seq_q, 2, 64), make(1, seq_k, 2, 64, seed=1)
    lse = make(1, 2, seq_q, seed=2) + 4 if cached else None
    got = block_mass_triton(q, k, (64, 32), scale=64**-0.5, lse=lse)
    want = slow_mass(q, k, 64, 32, lse.double() if cached else None)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_wrong_layout_is_named():
    with pytest.raises(ValueError, match=r"key must be \[B, S, H, D\], got \[2, 3\]"):
        pooled_scores(make(1, 8, 1, 4), make(2, 3), (8, 8))
