import pytest
import torch

from sparsediff.kernels import quantize
from sparsediff.kernels.attention import _why_not_triton

interpreted = pytest.mark.skipif(
    bool(_why_not_triton(torch.device("cpu"), torch.float32, 64, (64, 64))),
    reason="needs TRITON_INTERPRET=1 (make test sets it)",
)


def make(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def logits_of(pair, block):
    """What the kernel's logits stand for."""
    scale = pair.key_scale.repeat_interleave(block, -1)[..., : pair.key.shape[1]]
    product = torch.einsum("bqhd,bkhd->bhqk", pair.query.float(), pair.key.float())
    # 8-bit products must stay exact in the kernel's float accumulator.
    assert product.abs().max() < 2**22
    return product * pair.query_scale[..., None] * scale[:, :, None] + pair.shift[..., None]


@pytest.mark.parametrize("seq_k", [130, 9000])
def test_logits_come_back_within_the_rounding_of_8_bits(seq_k):
    q, k = make(1, 100, 2, 64), make(1, seq_k, 2, 64, seed=1)
    k[..., 3] += 30  # an outlier channel: gone with the mean
    error = logits_of(quantize.quantize_pair_reference(q, k, 64), 64) - torch.einsum(
        "bqhd,bkhd->bhqk", q, k
    )
    error /= 8  # the usual 1 / sqrt(64)
    assert error.square().mean().sqrt() < 0.011
    assert (
        error.abs().max() < 0.08
    )  # of 900,000 logits; the largest of them varies from seed to seed


def test_standard_error_bounds_the_error_of_logits():
    q, k = make(1, 200, 3, 128), make(1, 300, 3, 128, seed=1)
    q[..., ::32] *= 3
    k[..., ::32] = k[..., ::32] * 3 + 8
    pair = quantize.quantize_pair_reference(q, k, 128)
    error = (logits_of(pair, 128) - torch.einsum("bqhd,bkhd->bhqk", q, k)).abs()
    ratio = error / pair.error[..., None]
    assert ratio.max() < 6
    assert ratio.square().mean().sqrt() > 0.3, "a bound this loose would keep every block"


def unquantize(values, block, seq):
    v8 = values.value.view(torch.uint8).unflatten(-1, (-1, 32))
    there = torch.empty_like(v8)
    there[..., list(quantize.PV_ORDER)] = v8
    v = there.flatten(-2).view(torch.float8_e4m3fn).float()  # [B, H, D, S]
    factor = values.scale[..., :-1].exp2() * values.scale[..., -1:]
    v = v.unflatten(-1, (-1, block)) * factor[:, :, None, :, None]
    return v.flatten(-2)[..., :seq].permute(0, 3, 1, 2)


@pytest.mark.parametrize("seq", [1, 63, 128, 200])
def test_values_come_back_within_the_rounding_of_e4m3(seq):
    v = make(2, seq, 3, 64)
    v[:, 64:128] *= 1e-3
    v[0] *= 1e4
    values = quantize.quantize_values_reference(v, 64)
    error = (unquantize(values, 64, seq) - v).abs()
    block_top = torch.cat([x.abs().amax((1, 3), True).expand_as(x) for x in v.split(64, 1)], 1)
    assert (error <= v.abs() / 16 * 1.001 + block_top * 2**-18).all()
    padding = values.value[..., seq:] if seq % 64 == 0 else values.value[..., -32:]
    assert seq % 64 == 0 or (padding.float() == 0).any()


def test_values_of_zero_stay_zero():
    values = quantize.quantize_values_reference(torch.zeros(1, 100, 1, 32), 64)
    assert values.scale.isfinite().all()
    assert (values.value.float() == 0).all()


def test_order_of_values_is_a_permutation():
    assert sorted(quantize.PV_ORDER) == list(range(32))


FORMS = [
    {"with_shift": shift, "with_error": error} for shift in (False, True) for error in (False, True)
]


def assert_same_pair(got, want):
    for name, x, y in zip(want._fields, got, want, strict=True):
        if y is None:
            assert x is None, name
        elif x.dtype == torch.int8:
            # A value on the edge between two steps may fall on either side.
            assert (x.int() - y.int()).abs().max() <= 1, name
            assert (x != y).float().mean() < 1e-3, name
        else:
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("seq_q", "seq_k"), [(1, 1), (63, 65), (130, 200)])
def test_pair_kernel_matches_the_reference(seq_q, seq_k, form):
    q, k = make(2, seq_q, 2, 64), make(2, seq_k, 2, 128, seed=1)[..., 64:]
    got, want = (
        f(q, k, 64, **form)
        for f in (quantize.quantize_pair_triton, quantize.quantize_pair_reference)
    )
    assert (got.shift is not None, got.error is not None) == tuple(form.values())
    assert_same_pair(got, want)


@interpreted
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("seq", [1, 63, 64, 65, 130, 4097])
def test_pair_kernel_at_ragged_lengths(seq, block):
    q, k = make(1, seq, 1, 24), make(1, seq, 1, 24, seed=1)
    k[..., 5] += 30
    got, want = (
        f(q, k, block) for f in (quantize.quantize_pair_triton, quantize.quantize_pair_reference)
    )
    assert_same_pair(got, want)


@interpreted
@pytest.mark.parametrize(("seq_q", "seq_k"), [(0, 70), (70, 0)])
def test_one_side_may_be_empty(seq_q, seq_k):
    q, k = make(1, seq_q, 2, 64), make(1, seq_k, 2, 64)
    pair = quantize.quantize_pair_triton(q, k, 64, with_shift=False, with_error=True)
    want = quantize.quantize_pair_reference(q, k, 64, with_shift=False, with_error=True)
    torch.testing.assert_close(pair.query_scale, want.query_scale)
    torch.testing.assert_close(pair.key_scale, want.key_scale)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_is_not_asked_for_changes_nothing_else(form):
    q, k = make(1, 100, 2, 64), make(1, 150, 2, 64, seed=1)
    full = quantize.quantize_pair_reference(q, k, 64)
    some = quantize.quantize_pair(q, k, 64, **form)
    assert (some.shift is not None, some.error is not None) == tuple(form.values())
    for x, y in zip(some, full, strict=True):
        assert x is None or torch.equal(x, y)


@pytest.mark.parametrize("seq", [1, 63, 64, 65, 130, 4097, 9000])
def test_mean_is_made_of_blocks_that_weigh_the_same(seq):
    k = make(1, seq, 2, 8)
    sample = quantize._sample(k)
    tokens = sample.shape[1]
    assert tokens == seq if seq < 64 else tokens % 64 == 0
    assert tokens >= min(seq, quantize.MEAN_TOKENS) - 63
    means = quantize.block_means(sample, quantize.MEAN_BLOCK).mean(2)
    torch.testing.assert_close(means, sample.mean(1))


@interpreted
@pytest.mark.parametrize("run", [quantize.quantize_pair_triton, quantize.quantize_pair_reference])
def test_zeros_have_a_scale(run):
    pair = run(torch.zeros(1, 70, 1, 32), torch.zeros(1, 70, 1, 32), 64)
    torch.testing.assert_close(pair.query_scale, torch.full((1, 1, 70), 1e-6 / 127))
    torch.testing.assert_close(pair.key_scale, torch.full((1, 1, 2), 1e-6 / 127))
    assert not pair.query.any()
    assert not pair.key.any()


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("wild", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", [FORMS[0], FORMS[3]], ids=str)
@pytest.mark.parametrize("run", [quantize.quantize_pair_triton, quantize.quantize_pair_reference])
def test_numbers_that_no_byte_holds_spoil_the_scale(run, form, wild):
    """Else attention would hide them: a maximum drops NaN, and 8 bits have no place for it."""
    q, k = make(1, 70, 2, 64), make(1, 9000, 2, 64, seed=1)
    q[0, 5, 1, 7] = wild
    k[0, 131, 0, 3] = wild  # not among the tokens that make the mean
    pair = run(q, k, 64, **form)
    assert (~pair.query_scale.isfinite()).nonzero().tolist() == [[0, 1, 5]]
    assert (~pair.key_scale.isfinite()).nonzero().tolist() == [[0, 0, 2]]


@interpreted
@pytest.mark.parametrize("seq", [1, 64, 130])
def test_value_kernel_matches_the_reference(seq):
    # Numbers that e4m3 has: Triton's interpreter loses a carry when it rounds.
    v = make(2, seq, 2, 128)[..., 64:].mul(100).to(torch.float8_e4m3fn).float()
    v[:, ::64, :, 7] = 448
    got, want = (
        f(v, 64) for f in (quantize.quantize_values_triton, quantize.quantize_values_reference)
    )
    assert torch.equal(got.value.view(torch.uint8), want.value.view(torch.uint8))
    torch.testing.assert_close(got.scale, want.scale)
