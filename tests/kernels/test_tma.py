"""The portable kernel with tiles loaded by TMA: who takes which tensor, and that nothing beyond a tensor's ends gets in."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton

from sparsediff.block_mask import BlockMask
from sparsediff.kernels import _block_sparse_triton, attention, tuning
from sparsediff.kernels._block_sparse_reference import attend as reference
from sparsediff.kernels.attention import attend_blocks, select_backend
from sparsediff.kernels.tma import readable, tile_descriptor

interpreted = pytest.mark.skipif(
    not tuning.interpreting(), reason="needs TRITON_INTERPRET=1 (make test sets it)"
)
EVERYTHING = {"want_lse": True, "want_mass": True, "vote_threshold": -1.0}
CUDA = torch.device("cuda", 0)


@pytest.fixture
def launches(monkeypatch):
    """Whether each launch of the kernel went through TMA."""
    seen = []
    launch_kernel = _block_sparse_triton.launch_kernel

    def remember(*arguments, **constants):
        seen.append(constants["TMA"])
        return launch_kernel(*arguments, **constants)

    monkeypatch.setattr(_block_sparse_triton, "launch_kernel", remember)
    return seen


def make_mask(seq_q, seq_k, block=(32, 32), *, heads=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows, columns = -(-seq_q // block[0]), -(-seq_k // block[1])
    keep = torch.rand(1, heads, rows, columns, generator=g) < 0.6
    keep[0, 0, -1] = False
    return BlockMask.from_dense(keep, block, (seq_q, seq_k))


def lay(x, row, head, first=0):
    """`x` `[B, S, H, D]` in memory with strides of `row` and `head`, and NaN between."""
    memory = torch.full((first + x.shape[0] * x.shape[1] * row,), math.nan, dtype=x.dtype)[first:]
    return memory.as_strided(x.shape, (x.shape[1] * row, row, head, 1)).copy_(x)


def random(seq, *, batch=2, heads=2, dim=64, seed=0):
    g = torch.Generator().manual_seed(seed + seq)
    return torch.randn(batch, seq, heads, dim, generator=g).half()


LAYOUTS = {
    "contiguous": (lambda x: x, True),
    "heads first": (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), True),
    "fused": (lambda x: torch.cat([x * math.nan, x, x], -1)[..., 64:128], True),
    "odd heads": (lambda x: lay(x, 2 * 65, 65), False),
    "odd rows": (lambda x: lay(x, 2 * 64 + 1, 64), False),
    "odd address": (lambda x: lay(x, 2 * 64, 64, first=1), False),
    "last stride": (lambda x: x.transpose(1, 3).contiguous().transpose(1, 3), False),
    "one head for all": (lambda x: x[:, :, :1].expand_as(x), False),
}


@interpreted
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_that_tma_cannot_read_take_pointers(layout, which, launches):
    place, takes_tma = LAYOUTS[layout]
    inputs = [random(70), random(100), random(100, seed=1)]
    inputs[which] = place(inputs[which])
    assert readable(inputs[which]) == takes_tma
    options = {"vote_threshold": -1.0, "return_lse": True, "return_mass": True}
    mask = make_mask(70, 100)
    got = attend_blocks(*inputs, mask, backend="triton_tma", **options)
    assert launches == [takes_tma] * 2, "the pass for mass takes the same way"
    want = attend_blocks(*inputs, mask, backend="triton", **options)
    assert launches[2:] == [False] * 2
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


@interpreted
@settings(max_examples=15)
@given(
    seq_q=st.sampled_from([1, 2, 31, 33, 61]),
    seq_k=st.sampled_from([1, 2, 31, 33, 61]),
    dim=st.sampled_from([64, 96, 128, 256]),
    gaps=st.tuples(*[st.sampled_from([0, 0, 8, 64, 3])] * 3),
    lengths=st.none() | st.tuples(st.integers(0, 70), st.integers(0, 70)),
    block=st.sampled_from([(16, 16), (32, 16), (16, 32), (64, 64)]),
)
def test_the_same_bits_as_with_pointers(seq_q, seq_k, dim, gaps, lengths, block):
    """In every head size, NaN in all gaps, and whatever way the tensors go."""
    inputs = [
        lay(random(seq, dim=dim, seed=i), 2 * (dim + gap), dim + gap)
        for i, (seq, gap) in enumerate(zip((seq_q, seq_k, seq_k), gaps, strict=True))
    ]
    mask = make_mask(seq_q, seq_k, block, seed=seq_k)
    options = dict(EVERYTHING, scale=dim**-0.5)
    if lengths is not None:
        options["kv_lengths"] = torch.tensor(lengths, dtype=torch.int32)
    got = _block_sparse_triton.attend_tma(*inputs, mask, **options)
    want = _block_sparse_triton.attend(*inputs, mask, **options)
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


@interpreted
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_nothing_past_the_head_size_is_attended(dim, launches):
    """A box is as wide as the next power of two; what lies past the head size is another head, or anything."""
    q, k, v = (lay(random(s, dim=dim, seed=s), 2 * 256, 256) for s in (33, 47, 48))
    v = v[:, :47]
    mask = make_mask(33, 47, (16, 16))
    out, lse, _, _ = _block_sparse_triton.attend_tma(q, k, v, mask, scale=dim**-0.5, want_lse=True)
    assert launches == [True]
    exact = reference(*(x.double() for x in (q, k, v)), mask, scale=dim**-0.5, want_lse=True)
    torch.testing.assert_close(out.double(), exact[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("wild", [math.nan, math.inf])
def test_an_empty_row_reads_a_block_and_shows_nothing_of_it(wild, launches):
    q, k, v = random(40), random(50), random(50, seed=1)
    k[:, :], v[:, :] = wild, wild
    nothing = torch.zeros(1, 1, 3, 4, dtype=torch.bool)
    mask = BlockMask.from_dense(nothing, (16, 16), (40, 50))
    out, lse, vote, mass = _block_sparse_triton.attend_tma(q, k, v, mask, scale=0.125, **EVERYTHING)
    assert launches == [True, True]
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    assert not vote.any()
    assert (mass == 0).all()


def test_one_form_of_a_descriptor_serves_many_tensors():
    first, second = random(5), random(5, seed=1)
    descriptors = [tile_descriptor(x, 16, 64) for x in (first, second, first)]
    assert [d.base.data_ptr() for d in descriptors] == [
        x.data_ptr() for x in (first, second, first)
    ]
    for d in descriptors:
        assert d.block_shape == [1, 1, 16, 64]
        assert torch.equal(d.base.as_strided(d.shape, d.strides), d.base.transpose(1, 2))


def test_what_holds_nothing_is_not_read():
    assert not readable(torch.empty(1, 0, 2, 64))


# -- the door --------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(
    ("dtype", "head_dim", "block", "message"),
    [
        (torch.float32, 64, (64, 64), "serves fp16 and bf16"),
        (torch.float16, 80, (64, 64), "head_dim 80 is not served"),
        (torch.bfloat16, 64, (40, 64), "use multiples of 16"),
    ],
)
def test_what_it_does_not_serve_is_told(dtype, head_dim, block, message):
    with pytest.raises(ValueError, match=f"backend 'triton_tma' cannot run here: .*{message}"):
        select_backend("cpu", dtype, head_dim, block, "triton_tma")


def choose(monkeypatch, capability, head_dim=128, block=(128, 128), name="auto", **options):
    """What is chosen on a card of that compute capability, under another version of Triton if one is named."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(triton, "__version__", options.pop("version", "3.7.1"))
    dtype = options.pop("dtype", torch.bfloat16)
    byproducts = options.pop("byproducts", False)
    return attention._select.__wrapped__(CUDA, dtype, head_dim, block, name, byproducts)


@pytest.mark.parametrize(
    ("call", "name", "reason"),
    [
        ({}, "gluon", "Hopper kernel"),
        ({"version": "3.9.0"}, "triton_tma", "proven under Triton 3.6 and 3.7, got 3.9.0"),
        ({"version": "3.9.0", "byproducts": True}, "triton_tma", "proven under"),
        ({"head_dim": 256}, "triton_tma", "serves head_dim 64, 96 and 128, got 256"),
        ({"block": (64, 128)}, "triton_tma", r"got \(64, 128\)"),
        ({"block": (64, 64)}, "gluon_pairs", "two rows"),
        ({"block": (64, 64), "byproducts": True}, "triton_tma", "no votes and no mass"),
        (
            {"block": (64, 64), "byproducts": True, "name": "gluon_pairs"},
            "triton_tma",
            "gluon_pairs finds no votes and no mass",
        ),
        ({"block": (32, 32)}, "triton", "triton_tma, not timed in tiles of fewer than 64 keys, by"),
        ({"dtype": torch.float32}, "triton", r"serves fp16 and bf16\)"),
    ],
)
def test_on_hopper_it_stands_between_gluon_and_pointers(monkeypatch, call, name, reason):
    choice = choose(monkeypatch, (9, 0), **call)
    assert choice.name == name, "else reports name a kernel that did not run"
    assert re.search(reason, choice.reason), choice.reason


@pytest.mark.parametrize("capability", [(10, 0), (12, 0)])
def test_on_newer_cards_it_runs_by_name_only(monkeypatch, capability):
    choice = choose(monkeypatch, capability)
    assert choice.name == "triton"
    assert "triton_tma, not timed on this card, by name only" in choice.reason
    assert choose(monkeypatch, capability, name="triton_tma").name == "triton_tma"


def test_older_cards_have_no_tma(monkeypatch):
    choice = choose(monkeypatch, (8, 9))
    assert choice.name == "triton"
    assert "tma" not in choice.reason
    with pytest.raises(ValueError, match=r"needs compute capability 9\.0 or newer, got 8\.9"):
        choose(monkeypatch, (8, 9), name="triton_tma")


def test_tiles_differ_only_where_a_table_says_so():
    assert tuning.get_tile((12, 0), 16, 256, (64, 64), tma=True).block_m == 32
    assert tuning.get_tile((12, 0), 16, 256, (64, 64)).block_m == 64
    assert tuning.get_tile((9, 0), 16, 128, (128, 128), tma=True) == tuning.get_tile(
        (9, 0), 16, 128, (128, 128)
    )
