"""Joined lists of neighbouring rows: the launch against sets, and what the sets promise."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsediff.block_mask import BlockMask
from sparsediff.kernels import block_pairs
from sparsediff.kernels.attention import _why_not_triton
from sparsediff.kernels.block_lists import lists_from_dense

interpreted = pytest.mark.skipif(
    bool(_why_not_triton(torch.device("cpu"), torch.float32, 64, (64, 64))),
    reason="needs TRITON_INTERPRET=1 (make test sets it)",
)
BLOCK = 64


@st.composite
def masks(draw):
    """Lists of rows that agree in part, in some order of visits, with wild numbers past the counts; and key lengths."""
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    rows, columns = draw(st.integers(1, 5)), draw(st.one_of(st.integers(1, 6), st.just(33)))
    seq_k = columns * BLOCK - draw(st.sampled_from([0, 1, 63]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    density = draw(st.sampled_from([0.1, 0.5, 0.9]))
    keep = torch.rand(batch, heads, rows, columns, generator=g) < density
    agree = torch.rand(batch, heads, rows // 2, columns, generator=g) < draw(
        st.sampled_from([0.0, 0.5, 1.0])
    )
    keep[:, :, 1::2] = torch.where(agree, keep[:, :, : 2 * (rows // 2) : 2], keep[:, :, 1::2])
    if draw(st.booleans()):
        keep[0, 0, 0] = False
    visits = draw(st.sampled_from(["descending", "ascending", "centre-out"]))
    counts, indices = lists_from_dense(keep, visits, ragged=seq_k % BLOCK != 0)
    past = torch.arange(columns) >= counts[..., None]
    indices = indices.masked_fill(past, 2**31 - 1)
    lengths = None
    if draw(st.booleans()):
        lengths = torch.tensor(
            [draw(st.sampled_from([0, 1, 64, 65, seq_k - 1, seq_k, 2**30])) for _ in range(batch)],
            dtype=torch.int32,
        )
    return keep, counts, indices, seq_k, lengths


def decode(word):
    """The fields of a packed word."""
    sizes = (17, 17, 17, 7, 1, 1, 1)
    numbers = []
    for bits in sizes:
        numbers.append(word & ((1 << bits) - 1))
        word >>= bits
    return block_pairs.RowNumbers(*numbers)


@settings(max_examples=60)
@given(masks())
def test_every_row_finds_its_blocks_in_the_walk_of_its_pair(case):
    keep, counts, indices, seq_k, lengths = case
    made = block_pairs.pair_rows_reference(counts, indices, seq_k, kv_lengths=lengths)
    for b, h, p in torch.cartesian_prod(*(torch.arange(n) for n in made.totals.shape)).tolist():
        length = seq_k if lengths is None else min(int(lengths[b]), seq_k)
        walk = made.walk[b, h, p, : made.totals[b, h, p]].tolist()
        assert len(set(walk)) == len(walk)
        wanted = set()
        common = []
        for row in range(2):
            numbers = decode(int(made.rows[b, h, p, row]))
            positions = numbers.positions(row)
            own = [walk[u] for u in positions]
            wanted |= set(own)
            common.append(numbers.before - numbers.lead)
            m = 2 * p + row
            kept = keep[b, h, m].nonzero().flatten().tolist() if m < keep.shape[2] else []
            kept = {n for n in kept if n * BLOCK < length}
            assert numbers.idle == (not kept)
            if not kept:
                assert len(own) == 1
                continue
            assert set(own) == kept
            assert len(own) == numbers.count
            # Only the first block may be visible in part.
            assert numbers.visible == min(BLOCK, length - own[0] * BLOCK)
            assert all(length - n * BLOCK >= BLOCK for n in own[1:])
            # Between two of its stages a consumer lets at most one pass, before the first two: the ring relies on it.
            assert positions[0] <= 2
            assert all(y - x in (1, 2) for x, y in pairwise(positions))
        assert wanted == set(walk)
        # Turns on the tensor cores come in equal numbers.
        assert common[0] == common[1]


@interpreted
@settings(max_examples=60)
@given(masks())
def test_the_launch_makes_what_the_sets_make(case):
    _, counts, indices, seq_k, lengths = case
    got = block_pairs.pair_rows(counts, indices, seq_k, kv_lengths=lengths)
    want = block_pairs.pair_rows_reference(counts, indices, seq_k, kv_lengths=lengths)
    assert torch.equal(got.totals, want.totals)
    assert torch.equal(got.rows, want.rows)
    listed = want.walk >= 0
    assert torch.equal(got.walk[listed], want.walk[listed])


@interpreted
def test_several_chunks_of_columns():
    keep = torch.rand(1, 1, 3, 1030, generator=torch.Generator().manual_seed(0)) < 0.4
    counts, indices = lists_from_dense(keep)
    got = block_pairs.pair_rows(counts, indices, 1030 * BLOCK - 5)
    want = block_pairs.pair_rows_reference(counts, indices, 1030 * BLOCK - 5)
    assert torch.equal(got.totals, want.totals)
    assert torch.equal(got.rows, want.rows)
    listed = want.walk >= 0
    assert torch.equal(got.walk[listed], want.walk[listed])


@interpreted
def test_one_mask_for_all_heads_and_samples():
    mask = BlockMask.full((64, 64), (300, 300))
    lengths = torch.tensor([300, 100, 0], dtype=torch.int32)
    got = block_pairs.pair_rows(mask.kv_num_blocks, mask.kv_indices, 300)
    assert got.walk.shape == (1, 1, 3, 5)
    assert got.walk[0, 0, 0].tolist() == [4, 3, 2, 1, 0]
    got = block_pairs.pair_rows(mask.kv_num_blocks, mask.kv_indices, 300, kv_lengths=lengths)
    assert got.totals.flatten().tolist() == [5, 5, 5, 2, 2, 2, 1, 1, 1]


def test_numbers_fit_their_word():
    most = block_pairs.RowNumbers(2**17 - 1, 2**17 - 1, 2**17 - 1, 64, 1, 1, 1)
    assert decode(most.pack()) == most
    assert most.pack() < 2**63
