"""Masks in all their forms."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsediff import BlockMask, TokenGrid
from sparsediff.block_mask import area_density, block_areas, forced_blocks, pack_bits, unpack_bits

lengths = st.integers(1, 300)
blocks = st.sampled_from([16, 32, 64])


@st.composite
def masks(draw):
    seq = draw(lengths), draw(lengths)
    size = draw(blocks), draw(blocks)
    shape = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        -(-seq[0] // size[0]),
        -(-seq[1] // size[1]),
    )
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    keep = torch.rand(shape, generator=g) < draw(st.floats(0, 1))
    return keep, BlockMask.from_dense(keep, size, seq)


@given(masks())
def test_every_form_round_trips(case):
    keep, mask = case
    assert torch.equal(mask.to_dense(), keep)
    assert torch.equal(
        BlockMask.from_bitmap(mask.to_bitmap(), mask.block_size, mask.seq_lengths).to_dense(), keep
    )
    assert torch.equal(BlockMask.from_flex(mask.to_flex()).to_dense(), keep)


@given(masks())
def test_lists_are_ascending_and_counted(case):
    keep, mask = case
    assert torch.equal(mask.kv_num_blocks, keep.sum(-1).int())
    for row in keep.flatten(0, 2).nonzero()[:, 0].unique().tolist():
        n = mask.kv_num_blocks.flatten()[row]
        listed = mask.kv_indices.flatten(0, 2)[row, :n]
        assert torch.equal(listed.long(), keep.flatten(0, 2)[row].nonzero()[:, 0])


@given(masks())
def test_density_counts_tokens_not_blocks(case):
    keep, mask = case
    (sq, sk), (bq, bk) = mask.seq_lengths, mask.block_size
    tokens = keep.repeat_interleave(bq, 2).repeat_interleave(bk, 3)[:, :, :sq, :sk]
    assert mask.density == pytest.approx(tokens.double().mean().item(), abs=1e-6)
    per_head = tokens.double().mean((2, 3)).float()
    assert torch.allclose(
        area_density(keep, mask.block_size, mask.seq_lengths), per_head, atol=1e-6
    )


@given(masks(), st.integers(1, 3), st.integers(1, 3))
def test_coarse_masks_never_lose_a_token(case, fq, fk):
    keep, mask = case
    coarse = mask.coarsen(fq, fk)
    back = coarse.refine(fq, fk)
    assert back.block_size == mask.block_size
    assert (back.to_dense() | ~keep).all(), "what was kept must still be kept"
    assert torch.equal(back.coarsen(fq, fk).to_dense(), coarse.to_dense())


@given(masks(), st.integers(0, 2**31))
def test_and_or_agree_with_booleans(case, seed):
    keep, mask = case
    other = torch.rand(keep.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    second = BlockMask.from_dense(other, mask.block_size, mask.seq_lengths)
    assert torch.equal((mask & second).to_dense(), keep & other)
    assert torch.equal((mask | second).to_dense(), keep | other)


@given(masks(), st.integers(0, 2**31))
def test_entries_past_the_count_are_never_read(case, seed):
    keep, mask = case
    junk = torch.randint(
        -5, 10_000, mask.kv_indices.shape, generator=torch.Generator().manual_seed(seed)
    ).int()
    past = torch.arange(mask.num_blocks[1]) >= mask.kv_num_blocks[..., None]
    spoilt = BlockMask(
        mask.kv_num_blocks,
        torch.where(past, junk, mask.kv_indices),
        mask.block_size,
        mask.seq_lengths,
    )
    assert torch.equal(spoilt.to_dense(), keep)


@given(st.integers(1, 70), st.integers(0, 2**31))
def test_bits_pack_to_the_byte(n, seed):
    keep = torch.rand(3, n, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(keep)
    assert packed.shape == (3, -(-n // 8))
    assert torch.equal(unpack_bits(packed, n), keep)


@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 70),
    st.booleans(),
    blocks,
    st.booleans(),
)
def test_forced_blocks_cover_every_text_token_and_nothing_needless(
    f, h, w, text, first, block, diagonal
):
    grid = TokenGrid.video(f, h, w, text=text, text_first=first)
    n = grid.num_tokens
    is_text = torch.zeros(n, dtype=torch.bool)
    for start, stop in grid.spans("text"):
        is_text[start:stop] = True
    forced = forced_blocks(grid, (block, block), diagonal=diagonal)
    touched = torch.tensor([is_text[i : i + block].any() for i in range(0, n, block)])
    expected = touched[:, None] | touched[None, :]
    if diagonal:
        expected = expected | torch.eye(len(touched), dtype=torch.bool)
    assert torch.equal(forced, expected)


def test_forced_diagonal_with_unequal_blocks():
    grid = TokenGrid.video(1, 10, 20)  # 200 tokens
    keep = forced_blocks(grid, (64, 32), diagonal=True)
    assert keep.shape == (4, 7)
    assert keep.int().tolist() == [
        [1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]


def test_a_reordered_sequence_has_its_text_at_the_end():
    grid = TokenGrid.video(1, 8, 16, text=5, text_first=True)
    assert forced_blocks(grid, (64, 64), reordered=True).int().tolist() == [
        [0, 0, 1],
        [0, 0, 1],
        [1, 1, 1],
    ]
    assert forced_blocks(grid, (64, 64)).int().tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]


def test_only_the_last_block_is_short():
    rows, columns = block_areas((64, 32), (130, 96))
    assert rows.tolist() == [64, 64, 2]
    assert columns.tolist() == [32, 32, 32]


def test_flex_masks_with_partial_blocks_are_refused():
    from torch.nn.attention.flex_attention import create_block_mask

    causal = create_block_mask(
        lambda b, h, q, k: q >= k, 1, 1, 128, 128, device="cpu", BLOCK_SIZE=64
    )
    with pytest.raises(ValueError, match="masks inside blocks"):
        BlockMask.from_flex(causal)


def test_flex_attention_reads_our_mask_as_we_mean_it():
    from torch.nn.attention.flex_attention import flex_attention

    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 256, 16, generator=g) for _ in range(3))
    keep = torch.rand(1, 2, 4, 4, generator=g) < 0.5
    keep[..., 0] = True
    mask = BlockMask.from_dense(keep, (64, 64), (256, 256))
    tokens = keep.repeat_interleave(64, 2).repeat_interleave(64, 3)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that uncompiled it is slow
        actual = flex_attention(q, k, v, block_mask=mask.to_flex())
    assert torch.allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": (0, 64)}, "block_size must be two sizes"),
        ({"seq_lengths": (130, 1000)}, r"kv_indices \[B, H, Mq, Nk=16\]"),
        ({"seq_lengths": (1000, 130)}, "make 16 rows"),
        ({"kv_num_blocks": torch.ones(1, 1, 3)}, "must be int32"),
    ],
)
def test_inconsistent_fields_are_refused(change, message):
    mask = BlockMask.full((64, 64), (130, 130))
    fields = {
        n: getattr(mask, n) for n in ("kv_num_blocks", "kv_indices", "block_size", "seq_lengths")
    }
    with pytest.raises((ValueError, TypeError), match=message):
        BlockMask(**{**fields, **change})


def test_masks_of_different_geometry_do_not_combine():
    with pytest.raises(ValueError, match="coarsen"):
        BlockMask.full((64, 64), (128, 128)) & BlockMask.full((32, 32), (128, 128))
    with pytest.raises(ValueError, match="cannot be split"):
        BlockMask.full((64, 64), (128, 128)).refine(3, 1)
