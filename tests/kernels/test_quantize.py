import pytest
import torch

from sparsediff.kernels.attention import _why_not_triton
from sparsediff.kernels.quantize import quantize_reference, quantize_triton


def make(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_logits_come_back_within_the_rounding_of_8_bits():
    q, k = make(1, 100, 2, 64), make(1, 130, 2, 64, seed=1)
    k[..., 3] += 30  # an outlier channel: gone with the mean
    pair = quantize_reference(q, k, 64)
    scale = pair.key_scale.repeat_interleave(64, -1)[..., :130]
    product = torch.einsum("bqhd,bkhd->bhqk", pair.query.float(), pair.key.float())
    logits = product * pair.query_scale[..., None] * scale[:, :, None] + pair.shift[..., None]
    exact = torch.einsum("bqhd,bkhd->bhqk", q, k)
    assert (logits - exact).abs().max() / 8 < 0.05  # after the usual 1 / sqrt(64)
    # 8-bit products must stay exact in the kernel's float accumulator.
    assert product.abs().max() < 2**22


@pytest.mark.skipif(
    bool(_why_not_triton(torch.device("cpu"), torch.float32, 64, (64, 64))),
    reason="needs TRITON_INTERPRET=1 (make test sets it)",
)
@pytest.mark.parametrize(("seq_q", "seq_k"), [(1, 1), (63, 65), (130, 200)])
def test_kernel_matches_the_reference(seq_q, seq_k):
    q, k = make(2, seq_q, 2, 64), make(2, seq_k, 2, 128, seed=1)[..., 64:]
    got, want = quantize_triton(q, k, 64), quantize_reference(q, k, 64)
    for name, x, y in zip(want._fields, got, want, strict=True):
        if x.dtype == torch.int8:
            # A value on the edge between two steps may fall on either side.
            assert (x.int() - y.int()).abs().max() <= 1, name
            assert (x != y).float().mean() < 1e-3, name
        else:
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
