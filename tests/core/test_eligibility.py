"""What keeps a call dense, and that nothing else does."""

import re

import pytest
import torch

from sparsediff import SparseD, TokenGrid
from sparsediff.eligibility import packing_of, why_not_sparse
from sparsediff.pipelines.hunyuan_video import HunyuanVideoAdapter
from sparsediff.pipelines.wan import WanAdapter

GRID = TokenGrid.video(2, 8, 8, text=22)
TOKENS, HEADS, DIM = 150, 4, 8


def reason(adapter=None, grid=GRID, *, q=None, k=None, v=None, dtype=torch.float32, **call):
    shapes = [{"s": TOKENS, "h": HEADS, "d": DIM} | (changes or {}) for changes in (q, k, v)]
    tensors = (torch.zeros(2, x["s"], x["h"], x["d"], dtype=dtype) for x in shapes)
    call = {"attn_mask": None, "is_causal": False, "enable_gqa": False, **call}
    return why_not_sparse(
        adapter or HunyuanVideoAdapter(), SparseD(block=32), grid, *tensors, **call
    )


def mask(*shape, dtype=torch.bool):
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"attn_mask": mask(2, TOKENS)},
        {"attn_mask": mask(1, 1, 1, TOKENS)},
        {"q": {"h": 8}, "enable_gqa": True},
        {"grid": TokenGrid.line(100, 50, queries=50), "q": {"s": 50}},
    ],
    ids=["plain", "padding", "padding of all", "shared key heads", "a cache"],
)
def test_what_can_run_sparse(call):
    assert reason(**call) is None


@pytest.mark.parametrize(
    ("call", "why"),
    [
        ({"attn_mask": mask(2, TOKENS), "adapter": WanAdapter()}, "does not understand"),
        ({"attn_mask": mask(2, TOKENS, dtype=torch.float32)}, "does not understand"),
        ({"attn_mask": mask(2, 1, TOKENS, TOKENS)}, "does not understand"),
        ({"attn_mask": mask(TOKENS, TOKENS)}, "does not understand"),
        ({"attn_mask": mask(2, TOKENS - 1)}, "does not understand"),
        ({"is_causal": True}, "causal"),
        ({"dtype": torch.float64}, "float64 tensors"),
        ({"q": {"h": 8}}, "differ in shape"),
        ({"q": {"h": 6}, "enable_gqa": True}, "differ in shape"),
        ({"q": {"s": 50}}, "differ in shape"),
        ({"v": {"d": 4}}, "keys .* and values .* differ in shape"),
        (
            {"grid": TokenGrid.video(2, 8, 8)},
            "a sequence of 150 tokens, where the grid 2x8x8 has 128",
        ),
        (
            {"grid": TokenGrid.video(1, 8, 8), **{x: {"s": 64} for x in "qkv"}},
            "too few: fewer than 4",
        ),
    ],
)
def test_what_cannot(call, why):
    assert re.search(why, reason(**call))


def test_padding_is_a_length_and_masks_that_are_read_are_none():
    valid = torch.arange(TOKENS) < torch.tensor([[140], [150]])
    packing = packing_of(HunyuanVideoAdapter(), GRID, valid, 2)
    assert packing.lengths.tolist() == [140, 150]
    assert packing.grid == GRID
    assert packing_of(HunyuanVideoAdapter(), GRID, None, 2).lengths is None
