"""The Hopper kernel, its own source, under random interleavings of its three roles on a CPU: maxima, votes, mass."""

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from gluon_emulator import Descriptor, Pointer, run_kernel
from moving_maxima import Redone, errors, make, mass_place, store_pair

from sparsediff.block_mask import BlockMask
from sparsediff.kernels import block_lists
from sparsediff.kernels._block_sparse_reference import attend as reference
from sparsediff.kernels._block_sparse_sm90 import block_sparse_fwd_sm90
from sparsediff.kernels.tuning import hopper_ring

THRESHOLD = -1.0
FORMS = [(128, 128), (64, 128), (128, 64), (64, 64)]


def store_votes(b_votes, b_entries, vote_row) -> None:
    for tile, entry in enumerate(b_entries):
        if ((b_votes >> tile) & 1).any():
            vote_row.data[int(vote_row.offset + entry)] = 1


BYPRODUCTS = {
    "load_entries": lambda p_list, last, _: [
        p_list.data[int(p_list.offset + max(int(last) - lane, 0))] for lane in range(32)
    ],
    "gather_votes": lambda b_votes, b_top, b_bar, tile: (
        b_votes | ((b_top >= b_bar).int() << (tile & 31))
    ),
    "store_votes": store_votes,
    "mass_place": mass_place,
    "store_pair": store_pair,
}


def run_hopper(
    q, k, v, mask, seed, *, byproducts=False, lengths=None, threshold=THRESHOLD, **replace
):
    """Output, log-sum-exp, vote and mass of the emulated kernel, and how many tiles it did again."""
    (batch, seq_q, heads, dim), block_n = q.shape, mask.block_size[1]
    ring, alias = hopper_ring(block_n, dim)
    counts, lists = mask.kv_num_blocks, mask.kv_indices.contiguous()
    if lengths is not None:
        counts = block_lists.visible_counts(counts, lists, lengths, block_n, batch, heads)
    totals, order, draw = block_lists.order_reference(counts, batch, heads)
    blocks = batch, heads, *mask.num_blocks
    out = torch.full_like(q, float("nan"))
    lse = torch.full((batch, heads, seq_q), float("nan"))
    vote, mass = torch.zeros(blocks, dtype=torch.uint8), torch.zeros(blocks)
    space = torch.full((2, 2, blocks[-1] + 1, 128), float("nan"))
    redone = Redone()
    run_kernel(
        block_sparse_fwd_sm90,
        2,
        seed,
        Descriptor(q.transpose(1, 2), 64, dim),
        Descriptor(k.transpose(1, 2), block_n, dim),
        Descriptor(v.transpose(1, 2), block_n, dim),
        Descriptor(out.transpose(1, 2), 64, dim),
        *(Pointer(x.view(-1)) for x in (lse, vote, mass, lse, space, totals, lists)),
        Pointer(totals if lengths is None else lengths),
        Pointer(order),
        Pointer(draw),
        *lists.stride()[:2],
        dim**-0.5,
        threshold,
        heads,
        seq_q,
        k.shape[1],
        *mask.num_blocks,
        len(totals),
        RING=ring,
        BLOCK_N=block_n,
        BLOCK_D=dim,
        ALIAS=alias,
        HAS_LENGTHS=lengths is not None,
        WITH_LSE=True,
        WITH_VOTE=byproducts,
        WITH_MASS=byproducts,
        HAS_LSE_PREV=False,
        replace={"are_beyond": redone, **BYPRODUCTS, **replace},
    )
    return out, lse, vote.bool(), mass, redone.count


@pytest.mark.parametrize(("dim", "block_n"), FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("spread", [1.0, 8.0, 60.0], ids=["usual", "wide", "extreme"])
def test_attention_under_maxima_that_move_late(dim, block_n, dtype, spread):
    """Tiles are exponentiated under an old maximum, and again where that was too low, however far."""
    q, k, v, mask = make(0, spread, dim=dim, block_n=block_n, dtype=dtype)
    out, lse, *_, redone = run_hopper(q, k, v, mask, 0)
    assert (redone > 0) == (spread > 1)
    error, lse_error = errors(out, lse, q, k, v, mask)
    assert error < 2 * torch.finfo(dtype).eps
    assert lse_error < 1e-5 * spread


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("dim", "block_n"), FORMS)
@pytest.mark.parametrize("length", [None, 450], ids=["all", "450 keys"])
def test_votes_and_mass_are_of_true_maxima(seed, dim, block_n, length):
    """By-products are what the reference says although tiles were done again, and change no bit of the output."""
    q, k, v, mask = make(seed, 8.0, dim=dim, block_n=block_n)
    lengths = None if length is None else torch.tensor([length], dtype=torch.int32)
    if length is not None:
        k[:, length:], v[:, length:] = float("nan"), float("inf")
    out, lse, vote, mass, redone = run_hopper(q, k, v, mask, seed, byproducts=True, lengths=lengths)
    assert redone > 0
    assert errors(out, lse, q, k, v, mask, kv_lengths=lengths)[0] < 0.01
    exact = reference(
        *(x.double() for x in (q, k, v)),
        mask,
        scale=dim**-0.5,
        vote_threshold=THRESHOLD,
        want_mass=True,
        kv_lengths=lengths,
    )
    assert torch.equal(vote, exact[2])
    assert torch.allclose(mass, exact[3].float(), rtol=1e-3, atol=1e-4)
    plain = run_hopper(q, k, v, mask, seed + 7, lengths=lengths)
    assert torch.equal(out, plain[0])


@pytest.mark.parametrize("threshold", [-1000.0, 2.0, 1000.0])
@pytest.mark.parametrize("spread", [1.0, 60.0])
def test_votes_far_beyond_what_probabilities_can_show(threshold, spread):
    """A bar that underflows is reached by all blocks, one that overflows by none but the first."""
    q, k, v, mask = make(2, spread)
    _, _, vote, *_ = run_hopper(q, k, v, mask, 2, byproducts=True, threshold=threshold)
    exact = reference(
        *(x.double() for x in (q, k, v)), mask, scale=q.shape[-1] ** -0.5, vote_threshold=threshold
    )
    assert torch.equal(vote, exact[2])


def test_equal_is_not_beyond():
    """At a threshold of 0 a block that only reaches the maximum of those before it has no vote."""
    q, k, v, mask = make(5, 1.0)
    k[:] = k[:, :1]
    _, _, vote, *_ = run_hopper(q, k, v, mask, 5, byproducts=True, threshold=0.0)
    exact = reference(
        *(x.double() for x in (q, k, v)), mask, scale=q.shape[-1] ** -0.5, vote_threshold=0.0
    )
    assert torch.equal(vote, exact[2])
    assert vote.sum() < mask.to_dense().sum()


def test_lists_longer_than_the_bits_of_votes():
    """Votes are stored every 32 tiles, mass is summed 64 blocks at a time."""
    g = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(1, n, 1, 64, generator=g).bfloat16() for n in (130, 4500, 4500))
    keep = torch.rand(1, 1, 2, 71, generator=g) < 0.95
    mask = BlockMask.from_dense(keep, (128, 64), (130, 4500))
    out, lse, vote, mass, _ = run_hopper(q, k, v, mask, 6, byproducts=True)
    assert mask.kv_num_blocks.min() > 64
    assert errors(out, lse, q, k, v, mask)[0] < 0.01
    options = {"scale": 64**-0.5, "vote_threshold": THRESHOLD, "want_mass": True}
    exact = reference(*(x.double() for x in (q, k, v)), mask, **options)
    assert torch.equal(vote, exact[2])
    assert torch.allclose(mass, exact[3].float(), rtol=1e-3, atol=1e-4)


def test_nothing_hides_nan_and_what_comes_before_it_is_kept():
    """A row of NaN stays one, and its neighbours are not touched by it."""
    q, k, v, mask = make(3, 8.0)
    want, *_ = run_hopper(q, k, v, mask, 3)
    q[:, 5] = float("nan")
    out, lse, *_ = run_hopper(q, k, v, mask, 3)
    assert out[:, 5].isnan().all()
    assert lse[..., 5].isnan().all()
    others = torch.arange(q.shape[1]) != 5
    assert torch.allclose(out[:, others].float(), want[:, others].float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("steep", [(8.0, 0.2), (0.2, 8.0)], ids=["rising", "falling"])
def test_rows_whose_later_tiles_are_far_larger_or_far_smaller(steep):
    """Blocks are visited from the last one to the first."""
    q, k, v, mask = make(4, 2.0)
    k *= torch.linspace(*steep, k.shape[1])[:, None, None].to(k.dtype)
    out, lse, *_, redone = run_hopper(q, k, v, mask, 4)
    assert redone > 0 or steep[0] < steep[1]
    error, lse_error = errors(out, lse, q, k, v, mask)
    assert error < 0.01
    assert lse_error < 1e-4


@pytest.mark.parametrize(("dim", "block_n"), FORMS)
def test_a_tile_that_is_not_done_again_is_noticed(dim, block_n):
    q, k, v, mask = make(0, 60.0, dim=dim, block_n=block_n)
    out, lse, *_ = run_hopper(q, k, v, mask, 0, are_beyond=lambda *_: 0)
    assert not out.isfinite().all()
    assert not lse.isfinite()[0, 0].all()
