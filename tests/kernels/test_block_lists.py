import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsediff.block_mask import pack_bits
from sparsediff.kernels import block_lists, block_scores
from sparsediff.kernels.attention import _why_not_triton

INTERPRETED = not _why_not_triton(torch.device("cpu"), torch.float32, 64, (64, 64))
interpreted = pytest.mark.skipif(
    not INTERPRETED,
    reason="needs TRITON_INTERPRET=1 (make test sets it)",
)


def random(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def dense(lists):
    """Ascending lists back to booleans; what stands past the count must not matter."""
    counts, indices = lists
    keep = torch.zeros(indices.shape, dtype=torch.bool)
    for row in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
        listed = indices[tuple(row)][: int(counts[tuple(row)])]
        assert (listed.diff() > 0).all()
        keep[tuple(row)][listed.long()] = True
    return keep


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 63, 64, 65])
def test_lists_hold_what_is_kept(columns):
    keep = random(2, 1, 3, columns) < 0.4
    assert torch.equal(dense(block_lists.lists_from_dense(keep)), keep)
    assert torch.equal(dense(block_lists.lists_from_bitmap(pack_bits(keep), columns)), keep)


@interpreted
@pytest.mark.parametrize("columns", [1, 7, 17, 65, 1025])
def test_compaction_kernel(columns):
    keep = random(1, 2, 2, columns) < 0.4
    keep[0, 0, 0] = False
    assert torch.equal(
        dense(block_lists.compact(keep.view(torch.uint8), columns, packed=False)), keep
    )
    assert torch.equal(dense(block_lists.compact(pack_bits(keep), columns, packed=True)), keep)


def visited(row, rows, columns, visits, ragged):
    """The columns of a row as they are to be visited, written out."""
    first = [columns - 1] if ragged else []
    others = list(range(columns - len(first)))
    if visits == "descending":
        others.reverse()
    if visits == "centre-out" and others:
        # The column under the middle of the row, were both sides drawn on one line; of a tie the later comes first.
        centre = min(math.floor((row + 0.5) / rows * columns + 1e-9), others[-1])
        others.sort(key=lambda column: (abs(column - centre), -column))
    return first + others


@settings(max_examples=40)
@given(
    rows=st.integers(1, 7),
    columns=st.one_of(st.integers(1, 9), st.sampled_from([17, 40])),
    visits=st.sampled_from(["descending", "ascending", "centre-out"]),
    ragged=st.booleans(),
    seed=st.integers(0, 999),
)
def test_lists_end_with_what_is_visited_first(rows, columns, visits, ragged, seed):
    keep = random(1, 2, rows, columns, seed=seed) < 0.6
    bitmap = pack_bits(keep)
    made = [
        block_lists.lists_from_dense(keep, visits, ragged=ragged),
        block_lists.lists_from_bitmap(bitmap, columns, visits, ragged=ragged),
    ]
    if INTERPRETED:
        order = {"visits": visits, "ragged": ragged}
        made.append(block_lists.compact(keep.view(torch.uint8), columns, packed=False, **order))
        made.append(block_lists.compact(bitmap, columns, packed=True, **order))
    for counts, indices in made:
        for head in range(2):
            for row in range(rows):
                walked = indices[0, head, row, : counts[0, head, row]].tolist()[::-1]
                order = visited(row, rows, columns, visits, ragged)
                assert walked == [j for j in order if keep[0, head, row, j]]


@interpreted
@pytest.mark.parametrize("visits", ["ascending", "centre-out"])
@pytest.mark.parametrize("ragged", [False, True])
def test_visiting_orders_over_several_chunks_of_columns(visits, ragged):
    """The kernel walks 1024 columns at a time."""
    keep = random(1, 1, 3, 1030) < 0.5
    got = block_lists.compact(
        keep.view(torch.uint8), 1030, packed=False, visits=visits, ragged=ragged
    )
    want = block_lists.dense_reference(keep, visits, ragged=ragged)
    assert torch.equal(got[0], want[0])
    for row in range(3):
        count = int(want[0][0, 0, row])
        assert torch.equal(got[1][0, 0, row, :count], want[1][0, 0, row, :count])


@interpreted
@settings(max_examples=15)
@given(columns=st.integers(1, 40), data=st.data(), seed=st.integers(0, 999))
def test_top_k_kernel(columns, data, seed):
    scores = random(2, 2, 2, columns, seed=seed) - 0.5
    scores[0, 0] = scores[0, 0].mul(4).round()  # ties
    scores[1, 0, 0] = -torch.inf
    k = torch.tensor(
        [[data.draw(st.integers(0, columns)) for _ in range(2)] for _ in range(2)],
        dtype=torch.int32,
    )
    forced = random(1, 1, 2, columns, seed=seed + 1) < 0.1 if data.draw(st.booleans()) else None
    got, want = (
        block_lists.select(scores, k, forced),
        block_lists.top_k_reference(scores, k, forced),
    )
    assert torch.equal(got[0], want[0])
    assert torch.equal(dense(got), dense(want))


def test_top_k_prefers_the_lower_of_equals_and_keeps_the_forced():
    scores = torch.tensor([[[[1.0, 3.0, 3.0, 3.0, 0.0]]]])
    assert dense(block_lists.lists_from_top_k(scores, 2))[0, 0, 0].tolist() == [
        False,
        True,
        True,
        False,
        False,
    ]
    forced = torch.tensor([False, False, False, False, True])
    kept = dense(
        block_lists.lists_from_top_k(scores, torch.tensor([[1]], dtype=torch.int32), forced)
    )
    assert kept[0, 0, 0].tolist() == [False, True, False, False, True]


@interpreted
@pytest.mark.parametrize("rows", [1, 31, 33, 130])
def test_heaviest_rows_come_first_within_a_head(rows):
    counts = (random(1, 2, rows) * 5).int()
    for batch in (1, 2):
        got, want = (
            block_lists.order(counts, batch, 2),
            block_lists.order_reference(counts, batch, 2),
        )
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x, y)


@interpreted
@pytest.mark.parametrize("columns", [1, 2, 63, 64, 200])
@pytest.mark.parametrize("shared", [False, True])
def test_visible_counts_leave_out_blocks_past_the_length(columns, shared):
    keep = random(2, 1 if shared else 3, 150, columns) > 0.4
    counts, indices = block_lists.lists_from_dense(keep)
    # What a list holds past its count is arbitrary.
    indices[torch.arange(columns) >= counts[..., None]] = -(2**31)
    for lengths in ([0, 1], [32, 33], [columns * 16, columns * 32], [columns * 32 - 1, 2**30]):
        call = (counts, indices, torch.tensor(lengths, dtype=torch.int32), 32, 2, 3)
        assert torch.equal(
            block_lists.visible_counts(*call), block_lists.visible_counts_reference(*call)
        )


@interpreted
@pytest.mark.parametrize("seq", [1, 63, 64, 65, 200])
@pytest.mark.parametrize(("block", "dim"), [(64, 64), (128, 96), (48, 8)])
def test_mean_kernel(seq, block, dim):
    x = random(2, seq, 2, 2 * dim)[..., dim:]
    torch.testing.assert_close(
        block_scores.block_means_triton(x, block), block_scores.block_means_reference(x, block)
    )


def test_wrong_dtypes_are_named():
    with pytest.raises(TypeError, match="keep must be bool"):
        block_lists.lists_from_dense(torch.zeros(1, 1, 1, 1))
    with pytest.raises(ValueError, match="visits must be one of descending, ascending, centre-out"):
        block_lists.lists_from_dense(torch.ones(1, 1, 1, 1) > 0, "backwards")
    with pytest.raises(TypeError, match=r"bitmap must be uint8 \[B, H, Mq, 2\] for 9 blocks"):
        block_lists.lists_from_bitmap(torch.zeros(1, 1, 1, 1, dtype=torch.uint8), 9)
    with pytest.raises(TypeError, match="scores must be float32"):
        block_lists.lists_from_top_k(torch.zeros(1, 1, 1, 1).half(), 1)
    with pytest.raises(TypeError, match=r"k must be a number or int32 \[1, 1\]"):
        block_lists.lists_from_top_k(torch.zeros(1, 1, 1, 1), torch.zeros(1))
