"""The Hopper kernel with 8-bit logits, its own source, under random interleavings of its three roles on a CPU."""

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from gluon_emulator import Descriptor, Pointer, run_kernel
from moving_maxima import Address, Redone, errors, make, mass_place, store_pair, store_vote

from sparsediff.kernels import block_lists
from sparsediff.kernels._block_sparse_8bit_sm90 import block_sparse_fwd_8bit_sm90
from sparsediff.kernels._block_sparse_reference import attend as reference
from sparsediff.kernels.quantize import quantize_pair_reference
from sparsediff.kernels.tuning import hopper_8bit_ring

MAGIC = 12582912.0
DIM = 128


def run_8bit(q, k, v, mask, seed, *, threshold=None, **replace):
    """Output and log-sum-exp of the emulated kernel, with a threshold vote and mass, and how many tiles it did again."""
    byproducts = threshold is not None
    batch, seq_q, heads, _ = q.shape
    pair = quantize_pair_reference(q, k, 128)
    totals, order, draw = block_lists.order_reference(mask.kv_num_blocks, batch, heads)
    lists = mask.kv_indices.contiguous()
    out = torch.full_like(q, float("nan"))
    lse = torch.full((batch, heads, seq_q), float("nan"))
    vote = torch.zeros(batch, heads, *mask.num_blocks, dtype=torch.uint8)
    mass = torch.zeros(vote.shape)
    space = torch.full((2 * 2 * (mask.num_blocks[1] + 1) * 128,), float("nan"))
    unused = Pointer(torch.zeros(1))
    redone = Redone()
    run_kernel(
        block_sparse_fwd_8bit_sm90,
        2,
        seed,
        Descriptor(pair.query.transpose(1, 2), 64, DIM),
        Descriptor(pair.key.transpose(1, 2), 128, DIM),
        Descriptor(v.transpose(1, 2), 128, DIM),
        Descriptor(out.transpose(1, 2), 64, DIM),
        Pointer(lse.view(-1)),
        Address(vote.view(-1), torch.zeros(64, dtype=torch.int64), 1),
        Pointer(mass.view(-1)),
        unused,
        Pointer(space),
        Pointer(totals),
        Pointer(lists.view(-1)),
        Pointer(order),
        Pointer(draw),
        *(Pointer(x.contiguous().view(-1)) for x in (pair.query_scale, pair.key_scale)),
        unused,
        Pointer(pair.error.contiguous().view(-1)),
        *lists.stride()[:2],
        DIM**-0.5,
        threshold or 0.0,
        heads,
        seq_q,
        k.shape[1],
        *mask.num_blocks,
        len(totals),
        RING=hopper_8bit_ring(False),
        BLOCK_N=128,
        BLOCK_D=DIM,
        WITH_LSE=True,
        WITH_VOTE=byproducts,
        WITH_MASS=byproducts,
        HAS_LSE_PREV=False,
        FP8_PV=False,
        replace={
            "are_beyond": redone,
            "_as_float": lambda b_s: b_s + MAGIC,
            "_maximum": lambda b_x, b_scale: (b_x.amax(1) - MAGIC) * b_scale,
            "_pack": lambda b_p, dtype, *_: b_p.to(dtype),
            "mass_place": mass_place,
            "store_pair": store_pair,
            "store_vote": store_vote,
            **replace,
        },
    )
    return out, lse + DIM**-0.5 * pair.shift, vote.bool(), mass, redone.count


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("spread", "limit"), [(1.0, 0.02), (8.0, 0.05), (60.0, 0.15)], ids=["usual", "wide", "extreme"]
)
def test_attention_under_maxima_that_move_late(seed, spread, limit):
    """Tiles are exponentiated under an old maximum, and again where that was too low, however far."""
    q, k, v, mask = make(seed, spread)
    out, lse, *_, redone = run_8bit(q, k, v, mask, seed)
    assert (redone > 0) == (spread > 1)
    error, lse_error = errors(out, lse, q, k, v, mask)
    assert error < limit
    assert lse_error < 0.05 * spread


def test_a_tile_that_is_not_done_again_is_noticed():
    q, k, v, mask = make(0, 60.0)
    out, lse, *_ = run_8bit(q, k, v, mask, 0, are_beyond=lambda *_: 0)
    assert not out.isfinite().all()
    assert not lse.isfinite()[0, 0].all()


@pytest.mark.parametrize(
    ("spread", "threshold"), [(1.0, 2.0), (60.0, 100.0)], ids=["usual", "extreme"]
)
def test_by_products_under_maxima_that_move_late(spread, threshold):
    """A tile leaves its mass under the maximum that it was exponentiated under last; votes see every maximum."""
    q, k, v, mask = make(1, spread)
    out, lse, vote, mass, redone = run_8bit(q, k, v, mask, 1, threshold=threshold)
    assert (redone > 0) == (spread > 1)
    plain_out, plain_lse, *_ = run_8bit(q, k, v, mask, 2)
    assert torch.equal(out, plain_out)
    assert torch.equal(lse, plain_lse)
    _, _, want_vote, want_mass = reference(
        *(x.double() for x in (q, k, v)),
        mask,
        scale=DIM**-0.5,
        vote_threshold=threshold,
        want_mass=True,
    )
    assert not (want_vote & ~vote).any(), "rounding must not cost a block its vote"
    assert 5 < want_vote.sum() <= vote.sum() < mask.to_dense().sum()
    assert (mass - want_mass).norm() / want_mass.norm() < 0.05
    rows = torch.tensor([[128.0, 128.0, 44.0], [128.0, 0.0, 44.0]])
    torch.testing.assert_close(mass.sum(-1)[0], rows, rtol=1e-4, atol=1e-4)
