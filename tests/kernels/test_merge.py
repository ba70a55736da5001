"""Attention over parts of the keys, merged."""

from itertools import pairwise

import pytest
import torch

from sparsediff import BlockMask
from sparsediff.kernels import attend_blocks, block_sparse_attention, merge_attention
from sparsediff.kernels._block_sparse_reference import attend as reference
from sparsediff.testing import assert_close_to_exact


def inputs(tokens_q, tokens_k, dtype=torch.float32, batch=2, heads=3, dim=16):
    g = torch.Generator().manual_seed(tokens_q + tokens_k)
    q = torch.randn(batch, tokens_q, heads, dim, generator=g)
    k, v = (torch.randn(batch, tokens_k, heads, dim, generator=g) for _ in range(2))
    return [x.to(dtype) for x in (q, k, v)]


def attend(q, k, v, keep, block):
    mask = BlockMask.from_dense(keep, block, (q.shape[1], k.shape[1]))
    return block_sparse_attention(q, k, v, mask, return_lse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens_k", [97, 256, 300])
@pytest.mark.parametrize("cuts", [(1,), (3, 4), (1, 2, 3, 4, 5)], ids=str)
def test_shards_of_the_keys_merge_into_the_whole(tokens_k, cuts, dtype):
    """Each shard holds a slice of the keys and the columns of the mask over it, as sequence-parallel ranks do."""
    block, tokens_q = (32, 16), 70
    q, k, v = inputs(tokens_q, tokens_k, dtype)
    columns = -(-tokens_k // 16)
    g = torch.Generator().manual_seed(1)
    keep = torch.rand(2, 3, 3, columns, generator=g) < 0.4
    keep[0, 1, 2] = False  # a row that attends nowhere
    whole, whole_lse = attend(q, k, v, keep, block)
    mask = BlockMask.from_dense(keep, block, (tokens_q, tokens_k))
    exact, exact_lse, _, _ = reference(
        q.double(), k.double(), v.double(), mask, scale=0.25, want_lse=True
    )
    edges = [0, *cuts, columns]
    parts = [
        attend(q, k[:, a * 16 : b * 16], v[:, a * 16 : b * 16], keep[..., a:b].contiguous(), block)
        for a, b in pairwise(edges)
    ]
    out, lse = merge_attention(*zip(*parts, strict=True))
    assert out.dtype == dtype
    assert_close_to_exact(out, exact, whole)
    assert torch.allclose(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    assert torch.allclose(lse, whole_lse, rtol=1e-5, atol=1e-5)
    assert (out[0, 64:, 1] == 0).all()
    assert (lse[0, 1, 64:] == -torch.inf).all()


def test_text_beside_video_merges():
    """The joint recipe: text attends densely, video sparsely to video and densely to text."""
    text, video, block = 24, 128, (16, 16)
    q, k, v = inputs(text + video, text + video)
    g = torch.Generator().manual_seed(2)
    keep = torch.rand(2, 3, 8, 8, generator=g) < 0.3
    ones = torch.ones(1, 1, 8, 2, dtype=torch.bool)
    to_video = attend(q[:, text:], k[:, text:], v[:, text:], keep, block)
    to_text = attend(q[:, text:], k[:, :text], v[:, :text], ones, block)
    out, _ = merge_attention([to_video[0], to_text[0]], [to_video[1], to_text[1]])
    seen = torch.cat(
        [
            torch.ones(2, 3, video, text, dtype=torch.bool),
            keep.repeat_interleave(16, -1).repeat_interleave(16, -2),
        ],
        -1,
    )
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(1, 2) for x in (q[:, text:], k, v)), attn_mask=seen
    ).transpose(1, 2)
    assert torch.allclose(out.double(), exact, atol=1e-5)


@pytest.mark.parametrize("visits", ["descending", "centre-out"])
def test_shards_evolve_by_votes_of_their_own(visits):
    """LiteAttention over shards: every shard thins its own columns, and what is left merges exactly."""
    block, cuts = (16, 16), [slice(0, 3), slice(3, 8)]
    q, k, v = inputs(64, 128)
    keep = torch.ones(2, 3, 4, 8, dtype=torch.bool)
    for _ in range(2):
        parts = []
        for cut in cuts:
            tokens = slice(cut.start * 16, cut.stop * 16)
            shape = (64, tokens.stop - tokens.start)
            mask = BlockMask.from_dense(keep[..., cut].contiguous(), block, shape, visits=visits)
            parts.append(
                attend_blocks(
                    q, k[:, tokens], v[:, tokens], mask, return_lse=True, vote_threshold=1.0
                )
            )
        out, lse = merge_attention([p.out for p in parts], [p.lse for p in parts])
        whole, whole_lse = attend(q, k, v, keep, block)
        assert torch.allclose(out, whole, atol=1e-5)
        assert torch.allclose(lse, whole_lse, atol=1e-5)
        following = torch.cat([p.vote for p in parts], -1)
        assert (following <= keep).all()
        assert not torch.equal(following, keep) or not keep.all(), "something is to be dropped"
        assert all(following[..., cut].any(-1).all() for cut in cuts), "each shard keeps its first"
        keep = following


def test_parts_that_do_not_belong_together_are_refused():
    out, lse = torch.zeros(1, 4, 2, 8), torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="at least one"):
        merge_attention([], [])
    with pytest.raises(ValueError, match="got 1 and 2"):
        merge_attention([out], [lse, lse])
    with pytest.raises(ValueError, match="every part must be"):
        merge_attention([out, out], [lse, lse.mT])
