"""Padding masks: no key that a mask hides takes part in attention, in a score or in a vote."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsediff import AdaSpa, AttentionSite, Auto, Custom, DraftAttention, LiteAttention, SparseD
from sparsediff.block_mask import BlockMask
from sparsediff.kernels import attend_blocks
from sparsediff.kernels.block_scores import block_mass, block_mass_triton
from sparsediff.padding import Packing, pack_padding, valid_keys
from sparsediff.token_grid import Segment, TokenGrid

GRID = (2, 6, 8)  # 96 tokens
segments = st.lists(st.integers(1, 40), max_size=2)


def grid_amid(before, after):
    inside = Segment(role="grid", length=96, shape=GRID)
    words = ([Segment(role="text", length=n) for n in sizes] for sizes in (before, after))
    return TokenGrid((*next(words), inside, *next(words)))


def draw(grid, batch, seed, share=0.5):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, grid.num_tokens, 2, 16, generator=g) for _ in range(3))
    valid = torch.rand(batch, grid.num_tokens, generator=g) < share
    start, stop = grid.grid_span
    valid[:, start:stop] = True
    return q, k, v, valid


def dense(q, k, v, valid):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=valid[:, None, None].expand(-1, 1, q.shape[2], -1)
    )
    return out.transpose(1, 2)


def site(grid, lengths):
    return AttentionSite(
        layer=0, num_layers=1, step=0, num_steps=4, sigma=1.0, branch="", grid=grid,
        kv_lengths=lengths,
    )  # fmt: skip


# -- which masks are read -----------------------------------------------------------------------------------------


def test_masks_of_every_accepted_shape_name_the_same_keys():
    valid = torch.tensor([[True, True, False], [True, False, False]])
    pairs = valid[:, None, :, None] & valid[:, None, None, :]
    for mask, kind in ((valid, "keys"), (valid[:, None, None], "keys"), (pairs, "pairs")):
        assert torch.equal(valid_keys(mask, kind), valid)


@pytest.mark.parametrize(
    ("shape", "dtype", "kind"),
    [
        ((2, 3), torch.float32, "keys"),  # additive: may weigh as well as hide
        ((2, 1, 3, 3), torch.bool, "keys"),  # another mask for every query
        ((2, 4, 1, 3), torch.bool, "keys"),  # another for every head
        ((2, 3, 3), torch.bool, "pairs"),
        ((2, 1, 2, 3), torch.bool, "pairs"),
        ((2, 3), torch.bool, "pairs"),
    ],
)
def test_other_masks_are_not_guessed_at(shape, dtype, kind):
    assert valid_keys(torch.ones(shape, dtype=dtype), kind) is None


# -- packing ------------------------------------------------------------------------------------------------------


@given(segments, segments, st.integers(1, 3), st.integers(0, 2**31))
def test_packing_puts_the_grid_first_and_padding_last(before, after, batch, seed):
    grid = grid_amid(before, after)
    q, *_, valid = draw(grid, batch, seed)
    packing = pack_padding(grid, valid, batch)
    assert packing.grid.num_tokens == grid.num_tokens
    assert packing.grid.shape == GRID
    assert packing.grid.grid_span == (0, 96)
    start, stop = grid.grid_span
    packed = packing.pack(q)[0]
    assert torch.equal(packing.unpack(packed), q)
    assert torch.equal(packed[:, :96], q[:, start:stop])
    for b, length in enumerate(packing.lengths.tolist()):
        assert length == valid[b].sum()
        outside = torch.cat([torch.arange(start), torch.arange(stop, grid.num_tokens)])
        words = outside[valid[b, outside]]
        assert torch.equal(packed[b, 96:length], q[b, words]), "words keep their order"


def test_padding_at_the_end_moves_nothing():
    grid = grid_amid([], [40])
    q, *_, valid = draw(grid, 2, 0, share=2.0)
    valid[0, 100:] = False
    packing = pack_padding(grid, valid, 2, last=True)
    assert packing.pack(q)[0] is q
    assert packing.unpack(q) is q
    assert packing.lengths.tolist() == [100, 136]


def test_without_a_mask_nothing_is_hidden():
    packing = Packing(grid=grid_amid([], []))
    assert packing.lengths is None
    assert packing.pack(torch.ones(1, 96, 1, 1))[0].sum() == 96


@given(segments, segments, st.integers(1, 2), st.integers(0, 2**31))
def test_attention_over_packed_tokens_is_masked_attention(before, after, batch, seed):
    grid = grid_amid(before, after)
    q, k, v, valid = draw(grid, batch, seed)
    packing = pack_padding(grid, valid, batch)
    mask = BlockMask.full((32, 32), (grid.num_tokens,) * 2)
    out = attend_blocks(*packing.pack(q, k, v), mask, kv_lengths=packing.lengths).out
    torch.testing.assert_close(packing.unpack(out), dense(q, k, v, valid), rtol=1e-5, atol=1e-5)


# -- scores and methods -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(136, 97), (96, 1), (40, 136)])
@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.parametrize("own", [True, False])
def test_block_mass_of_hidden_keys_is_zero_and_of_others_exact(lengths, kernel, own):
    if kernel == "triton" and not torch.cuda.is_available():
        from sparsediff.kernels.tuning import interpreting

        if not interpreting():
            pytest.skip("needs TRITON_INTERPRET=1 or a GPU")
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 136, 2, 64, generator=g) for _ in range(2))
    kv_lengths = torch.tensor(lengths, dtype=torch.int32)
    hidden = torch.arange(136) >= kv_lengths[:, None]
    logits = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / 8
    logits = logits.masked_fill(hidden[:, None, None], -torch.inf)
    lse = logits.logsumexp(-1)
    padded = torch.nn.functional.pad((logits - lse[..., None]).exp(), (0, 24, 0, 24))
    want = padded.unflatten(-1, (5, 32)).sum(-1).unflatten(-2, (5, 32)).sum(-2)
    given_lse = None if own else lse.float()
    if kernel == "triton":
        got = block_mass_triton(q, k, (32, 32), scale=0.125, lse=given_lse, kv_lengths=kv_lengths)
    else:
        got = block_mass(q, k, (32, 32), lse=given_lse, kv_lengths=kv_lengths)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


METHODS = [
    Auto(density=0.4, block=32),
    Custom(density=0.6, block=32, budget="row_top_p"),
    Custom(density=0.4, block=32, budget="head_adaptive", windows=("HWF", (1, 4, 8))),
    Custom(density=0.4, block=32, producer="pooled"),
    AdaSpa(sparsity=0.6, block=32),
    SparseD(select=0.4, block=32),
    DraftAttention(sparsity=0.5, pool_h=8, pool_w=8),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{getattr(m, 'budget', '')}")
def test_no_method_looks_at_padding(method):
    """What hidden keys hold changes no choice among the blocks of the video, however loud they are."""
    grid = TokenGrid.video(2, 9, 12, text=64)  # 216 tokens: some blocks hold video and words
    q, k, _, _ = draw(grid, 2, 5)
    lengths = torch.tensor([220, 250], dtype=torch.int32)
    here = site(grid, lengths)
    loud = k.clone()
    for b, length in enumerate(lengths.tolist()):
        loud[b, length:] = 20 * q[b, : grid.num_tokens - length]

    def choose(k):
        order, heads = method.order(here), None
        x, y = q, k
        if order is not None:
            if order.chosen_at_run_time:
                heads = method.choose_windows(q, k, here, None)
            x, y = order.apply(grid, q, k, heads=heads)
        size = method.block_size(grid)[0]
        video = grid.whole_blocks(size, reordered=order is not None)
        return method.keep_blocks(x, y, here)[..., video, video], heads

    (quiet, heads), (noisy, noisy_heads) = choose(k), choose(loud)
    assert torch.equal(quiet, noisy)
    assert (heads is None) == (noisy_heads is None)
    assert heads is None or torch.equal(heads, noisy_heads)


def test_a_vote_is_not_swayed_by_padding():
    grid = grid_amid([], [64])
    q, k, v, _ = draw(grid, 1, 7)
    lengths = torch.tensor([100], dtype=torch.int32)
    mask = BlockMask.full((32, 32), (160, 160))
    method = LiteAttention(threshold=-1.0, tile=(32, 32))
    loud = k.clone()
    loud[:, 100:] = 20 * q[:, :60]
    threshold = method.vote_threshold(site(grid, lengths))
    votes = [
        attend_blocks(q, x, v, mask, kv_lengths=lengths, vote_threshold=threshold).vote
        for x in (k, loud)
    ]
    assert torch.equal(*votes)
    assert not votes[0][..., 4].any(), "a block of padding alone is not visited"
    assert not torch.equal(
        votes[0], attend_blocks(q, loud, v, mask, vote_threshold=threshold).vote
    ), "without lengths it would have been"
