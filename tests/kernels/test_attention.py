import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsediff.block_mask import BlockMask
from sparsediff.kernels import _block_sparse_cpu, _block_sparse_reference
from sparsediff.kernels.attention import (
    AttentionOutput,
    _why_not_triton,
    attend_blocks,
    available_backends,
    block_sparse_attention,
    select_backend,
)
from sparsediff.testing import assert_close_to_exact

# `make test` sets TRITON_INTERPRET=1; without it, and without a GPU, the Triton kernel cannot run.
INTERPRETED = not _why_not_triton(torch.device("cpu"), torch.float32, 64, (64, 64))
BACKENDS = ("reference", "cpu", *(["triton", "triton_tma"] if INTERPRETED else []))
# What a backend is tried in where it does not serve float32
DTYPES = {"triton_tma": torch.float16}
LENGTHS = (1, 63, 64, 65, 127, 128, 129, 251)


def make_inputs(seq_q, seq_k, *, batch=1, heads=2, head_dim=64, dtype=None, backend="", seed=0):
    dtype = dtype or DTYPES.get(backend, torch.float32)
    g = torch.Generator().manual_seed(seed)
    shapes = ((batch, s, heads, head_dim) for s in (seq_q, seq_k, seq_k))
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


def make_mask(seq_q, seq_k, block_size, *, density=0.5, batch=1, heads=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    blocks = -(-seq_q // block_size[0]), -(-seq_k // block_size[1])
    keep = torch.rand(batch, heads, *blocks, generator=g) < density
    return spoil(BlockMask.from_dense(keep, block_size, (seq_q, seq_k)))


def spoil(mask):
    """The same mask with wild numbers where its lists must not be read: past each row's count."""
    column = torch.arange(mask.num_blocks[1])
    wild = torch.where(column % 2 == 0, 2**31 - 1, -(2**27) - 1).int()
    lists = torch.where(column < mask.kv_num_blocks[..., None], mask.kv_indices, wild)
    return replace(mask, kv_indices=lists)


def token_mask(mask, seq_k=None):
    (bq, bk), (sq, sk) = mask.block_size, mask.seq_lengths
    return mask.to_dense().repeat_interleave(bq, -2).repeat_interleave(bk, -1)[..., :sq, :sk]


def exact_attention(query, key, value, mask, scale=None, kv_lengths=None):
    """Float64 softmax over the kept tokens, written without blocks: `out [B, S, H, D]` and `lse [B, H, S]`."""
    q, k, v = (x.double().transpose(1, 2) for x in (query, key, value))
    keep = token_mask(mask)
    if kv_lengths is not None:
        keep = keep & (torch.arange(key.shape[1]) < kv_lengths[:, None])[:, None, None]
    scores = (q @ k.mT * (scale or query.shape[-1] ** -0.5)).masked_fill(~keep, -math.inf)
    return scores.softmax(-1).nan_to_num(0.0).matmul(v).transpose(1, 2), scores.logsumexp(-1)


def sdpa(query, key, value, keep):
    """PyTorch's attention under a token mask; rows that attend to nothing give zeros."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep).nan_to_num(0.0).transpose(1, 2)


def check(query, key, value, mask, backend, **options):
    exact, exact_lse = exact_attention(query, key, value, mask, **options)
    keep = token_mask(mask)
    if (lengths := options.get("kv_lengths")) is not None:
        keep = keep & (torch.arange(key.shape[1]) < lengths[:, None])[:, None, None]
    result = attend_blocks(query, key, value, mask, return_lse=True, backend=backend, **options)
    assert result.out.dtype == query.dtype
    assert result.out.is_contiguous()
    assert_close_to_exact(result.out, exact, sdpa(query, key, value, keep))
    torch.testing.assert_close(result.lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    return result


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seq_q", LENGTHS)
@pytest.mark.parametrize("block_size", [(64, 64), (128, 64), (64, 128)])
def test_awkward_lengths_match_float64(backend, seq_q, block_size):
    for seq_k in (seq_q, 130, 1):
        mask = make_mask(seq_q, seq_k, block_size, seed=seq_q)
        check(*make_inputs(seq_q, seq_k, seed=seq_q, backend=backend), mask, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_errs_no_more_than_pytorch(backend, dtype):
    if backend.startswith("triton") and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 as bit patterns")
    check(*make_inputs(200, 330, dtype=dtype, head_dim=64), make_mask(200, 330, (64, 64)), backend)


@settings(max_examples=20)
@given(
    seq_q=st.integers(1, 50),
    seq_k=st.integers(1, 50),
    block_size=st.sampled_from([(16, 16), (32, 16), (16, 32)]),
    density=st.floats(0, 1),
    batch=st.integers(1, 2),
    shared=st.sampled_from([(False, False), (True, False), (False, True), (True, True)]),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_random_masks_and_ragged_lengths(
    seq_q, seq_k, block_size, density, batch, shared, seed, data
):
    mask = make_mask(
        seq_q,
        seq_k,
        block_size,
        density=density,
        batch=1 if shared[0] else batch,
        heads=1 if shared[1] else 2,
        seed=seed,
    )
    lengths = None
    if data.draw(st.booleans()):
        lengths = torch.tensor(
            [data.draw(st.integers(0, seq_k)) for _ in range(batch)], dtype=torch.int32
        )
    results = []
    for backend in BACKENDS:
        inputs = make_inputs(seq_q, seq_k, batch=batch, heads=2, seed=seed, backend=backend)
        results.append(check(*inputs, mask, backend, kv_lengths=lengths))
    torch.testing.assert_close(results[0].out, results[1].out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_rows_give_zeros_and_minus_infinity(backend):
    keep = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    keep[0, 1, 1] = False
    mask = spoil(BlockMask.from_dense(keep, (64, 64), (150, 150)))
    result = check(*make_inputs(150, 150, backend=backend), mask, backend)
    assert (result.out[0, 64:128, 1] == 0).all()
    assert (result.lse[0, 1, 64:128] == -math.inf).all()
    assert result.lse[0, 0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_kept_at_all(backend):
    result = attend_blocks(
        *make_inputs(65, 65, backend=backend),
        make_mask(65, 65, (64, 64), density=0),
        vote_threshold=-1,
        return_mass=True,
        backend=backend,
    )
    assert (result.out == 0).all()
    assert not result.vote.any()
    assert (result.mass == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs(backend):
    wide = torch.randn(1, 2, 130, 3 * 64, generator=torch.Generator().manual_seed(0))
    wide = wide.to(DTYPES.get(backend, torch.float32))
    q, k, v = (x.transpose(1, 2) for x in wide.chunk(3, -1))
    assert not q.is_contiguous()
    check(q, k, v, make_mask(130, 130, (64, 64)), backend)


# NumPy, in Triton's interpreter, warns of infinities whose scores are masked afterwards.
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_past_the_length_do_not_leak_even_if_nan(backend):
    q, k, v = make_inputs(130, 200, batch=2, backend=backend)
    mask = make_mask(130, 200, (64, 64), density=1)
    lengths = torch.tensor([70, 0], dtype=torch.int32)
    want = attend_blocks(q, k, v, mask, kv_lengths=lengths, return_mass=True, backend=backend)
    k[0, 70:], v[0, 70:] = math.nan, math.inf
    k[1], v[1] = math.inf, math.nan
    got = attend_blocks(
        q, k, v, mask, kv_lengths=lengths, return_mass=True, vote_threshold=-1e9, backend=backend
    )
    torch.testing.assert_close(got.out, want.out)
    torch.testing.assert_close(got.mass, want.mass)
    assert (got.vote.sum(-1) == torch.tensor([2, 0])[:, None, None]).all(), (
        "blocks wholly past the length were visited"
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_partial_results_merge_by_lse(backend):
    q, k, v = make_inputs(100, 300, backend=backend)
    keep = make_mask(100, 300, (32, 32), density=0.6).to_dense()
    half = torch.rand(keep.shape, generator=torch.Generator().manual_seed(5)) < 0.5
    whole, *parts = (
        block_sparse_attention(
            q, k, v, BlockMask.from_dense(x, (32, 32), (100, 300)), return_lse=True, backend=backend
        )
        for x in (keep, keep & half, keep & ~half)
    )
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum((p_lse - lse).exp().mT[..., None] * p_out for p_out, p_lse in parts)
    torch.testing.assert_close(lse, whole[1])
    rounding = 1e-4 if q.dtype == torch.float32 else 2e-3
    torch.testing.assert_close(merged, whole[0].float(), rtol=rounding, atol=rounding / 10)


def slow_vote(q, k, mask, threshold, kv_lengths=None):
    """The published rule, one row and one block at a time, from the end of the list to its start."""
    (bq, bk), sk, (mq, nk) = mask.block_size, mask.seq_lengths[1], mask.num_blocks
    batch, heads, scale = q.shape[0], q.shape[2], q.shape[-1] ** -0.5
    lists = mask.kv_indices.expand(batch, heads, mq, nk)
    counts = mask.kv_num_blocks.expand(batch, heads, mq)
    vote = torch.zeros(batch, heads, mq, nk, dtype=torch.bool)
    for b, h, m in product(range(batch), range(heads), range(mq)):
        length = sk if kv_lengths is None else int(kv_lengths[b])
        queries = q[b, m * bq : (m + 1) * bq, h].double()
        running = torch.full((len(queries),), -math.inf, dtype=torch.float64)
        for j in lists[b, h, m, : counts[b, h, m]].tolist()[::-1]:
            keys = k[b, j * bk : min((j + 1) * bk, length), h].double()
            if not len(keys):
                continue
            local = (queries @ keys.T * scale).amax(-1)
            vote[b, h, m, j] = bool(((local - running) * math.log2(math.e) > threshold).any())
            running = torch.maximum(running, local)
    return vote


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threshold", [-20.0, -3.0, -1.0, 0.0, 2.0])
def test_vote_is_the_published_running_maximum(backend, threshold):
    q, k, v = make_inputs(130, 260, batch=2, heads=3, backend=backend)
    q, k = q * 2, k * 2
    mask = make_mask(130, 260, (32, 32), heads=3, density=0.7)
    lengths = torch.tensor([260, 101], dtype=torch.int32)
    got = attend_blocks(
        q, k, v, mask, kv_lengths=lengths, vote_threshold=threshold, backend=backend
    ).vote
    assert torch.equal(got, slow_vote(q, k, mask, threshold, lengths))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("visits", ["ascending", "centre-out"])
@pytest.mark.parametrize(("seq_k", "heads"), [(1, 3), (256, 1), (287, 3)])
def test_the_vote_follows_the_order_of_the_lists(backend, visits, seq_k, heads):
    """And whatever that is, keys past the end of a ragged last block are not attended."""
    q, k, v = make_inputs(130, seq_k, batch=2, heads=3, backend=backend)
    q, k = q * 2, k * 2
    keep = make_mask(130, seq_k, (32, 32), heads=heads, density=0.7).to_dense()
    keep[..., -1] |= (
        torch.arange(keep.shape[2]) % 2 == 0
    )  # rows with the last block, and some without
    ordered = spoil(BlockMask.from_dense(keep, (32, 32), (130, seq_k), visits=visits))
    check(q, k, v, ordered, backend)
    vote = attend_blocks(q, k, v, ordered, vote_threshold=2.0, backend=backend).vote
    assert torch.equal(vote, slow_vote(q, k, ordered, 2.0))
    if seq_k > 200:
        plain = slow_vote(q, k, BlockMask.from_dense(keep, (32, 32), (130, seq_k)), 2.0)
        assert not torch.equal(vote, plain), "the order is to make a difference"


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_query_rows_do_not_vote(backend):
    """One real query and 63 zero rows of padding: a zero row scores 0 everywhere and would keep every block."""
    q, k, v = make_inputs(65, 256, heads=1, backend=backend)
    k = k - 100 * q[:, -1:] * torch.linspace(1, 0, 256).to(k.dtype)[None, :, None, None]
    mask = make_mask(65, 256, (64, 64), heads=1, density=1)
    got = attend_blocks(q, k, v, mask, vote_threshold=-1.0, backend=backend).vote
    assert got[0, 0, 1].tolist() == [False, False, False, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_mass_of_a_row_sums_to_its_queries(backend):
    mask = make_mask(130, 260, (64, 64), density=0.6)
    inputs = make_inputs(130, 260, backend=backend)
    mass = attend_blocks(*inputs, mask, return_mass=True, backend=backend).mass
    keep = mask.to_dense()
    assert (mass[~keep] == 0).all()
    queries = torch.tensor([64.0, 64, 2]) * keep.any(-1)
    torch.testing.assert_close(mass.sum(-1), queries)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mass_under_an_earlier_lse_is_the_dense_mass(backend):
    q, k, v = make_inputs(130, 260, backend=backend)
    full, some = (make_mask(130, 260, (64, 64), density=d) for d in (1, 0.5))
    dense = attend_blocks(q, k, v, full, return_lse=True, return_mass=True, backend=backend)
    mass = attend_blocks(q, k, v, some, lse_prev=dense.lse, return_mass=True, backend=backend).mass
    torch.testing.assert_close(mass, dense.mass * some.to_dense(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_an_earlier_softmax_has_no_mass(backend):
    q, k, v = make_inputs(64, 64, backend=backend)
    lse = torch.full((1, 2, 64), -math.inf)
    mask = make_mask(64, 64, (64, 64), density=1)
    assert (
        attend_blocks(q, k, v, mask, lse_prev=lse, return_mass=True, backend=backend).mass == 0
    ).all()


def test_key_lengths_need_ascending_lists():
    keep = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    mask = BlockMask.from_dense(keep, (64, 64), (128, 128), visits="centre-out")
    lengths = torch.tensor([100], dtype=torch.int32)
    with pytest.raises(ValueError, match="kv_lengths needs a mask whose visits are 'descending'"):
        attend_blocks(*make_inputs(128, 128), mask, kv_lengths=lengths)


def test_only_what_is_asked_for_comes_back():
    inputs, mask = make_inputs(64, 64), make_mask(64, 64, (64, 64))
    assert attend_blocks(*inputs, mask)[1:] == (None, None, None)
    result = attend_blocks(*inputs, mask, return_mass=True)
    assert isinstance(result, AttentionOutput)
    assert result.lse is None
    assert result.mass.shape == (1, 2, 1, 1)


def test_reference_keeps_float64():
    q, k, v = (x.double() for x in make_inputs(70, 70))
    mask = make_mask(70, 70, (32, 32))
    out, lse, _, _ = _block_sparse_reference.attend(q, k, v, mask, scale=0.25, want_lse=True)
    exact, exact_lse = exact_attention(q, k, v, mask, scale=0.25)
    torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-12, atol=1e-12)


def test_chunks_cover_every_busy_row_once_with_bounded_padding():
    counts = sorted([0, 0, 1, 1, 2, 3, 5, 8, 8, 8, 13, 40, 41], reverse=True)
    chunks = _block_sparse_cpu._chunks(counts, 64 * 64)
    covered = [i for start, stop in chunks for i in range(start, stop)]
    assert covered == list(range(len(counts) - 2))
    assert all(counts[stop - 1] >= counts[start] * 0.875 for start, stop in chunks)


# -- the door --------------------------------------------------------------------------------------------------------


def test_auto_on_cpu_runs_the_cpu_backend(monkeypatch):
    calls = []
    original = _block_sparse_cpu.attend
    monkeypatch.setattr(
        _block_sparse_cpu, "attend", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    block_sparse_attention(*make_inputs(64, 64), make_mask(64, 64, (64, 64)))
    assert calls == [1]
    assert select_backend("cpu", torch.float32, 64, (64, 64)).name == "cpu"
    assert available_backends()["cpu"] == ""


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"query": torch.zeros(64, 2, 64)},
            ValueError,
            r"query must be \[B, S, H, D\], got \[64, 2, 64\]",
        ),
        ({"key": torch.zeros(1, 64, 3, 64)}, ValueError, r"key must be \[1, 64, 2, 64\]"),
        ({"value": torch.zeros(1, 63, 2, 64)}, ValueError, "value must be"),
        (
            {"value": torch.zeros(1, 64, 2, 64).half()},
            TypeError,
            "value is torch.float16, query torch.float32",
        ),
        (
            {"query": torch.zeros(1, 64, 2, 64, dtype=torch.int32)},
            TypeError,
            "query is torch.int32",
        ),
        (
            {"kv_lengths": torch.zeros(2, dtype=torch.int32)},
            ValueError,
            r"kv_lengths must be \[1\]",
        ),
        (
            {"kv_lengths": torch.zeros(1, dtype=torch.int64)},
            TypeError,
            "kv_lengths must be torch.int32",
        ),
        ({"lse_prev": torch.zeros(1, 64, 2)}, ValueError, r"lse_prev must be \[1, 2, 64\]"),
        ({"mask": make_mask(65, 64, (64, 64))}, ValueError, r"mask is made for \(65, 64\)"),
        (
            {"mask": make_mask(64, 64, (64, 64), heads=3)},
            ValueError,
            "mask has head dimension 3; query needs 2",
        ),
        ({"mask": make_mask(64, 64, (64, 64)).to("meta")}, ValueError, r"use mask.to\('cpu'\)"),
        ({"query": torch.zeros(1, 64, 2, 64, requires_grad=True)}, ValueError, "torch.no_grad"),
        ({"backend": "cuda"}, ValueError, "unknown backend 'cuda'; use 'auto' or one of reference"),
    ],
)
def test_bad_calls_say_what_would_fit(change, error, message):
    names = ("query", "key", "value")
    call = (
        dict(zip(names, make_inputs(64, 64), strict=True), mask=make_mask(64, 64, (64, 64)))
        | change
    )
    with pytest.raises(error, match=message):
        attend_blocks(**call)


def test_operation_passes_opcheck():
    q, k, v = make_inputs(70, 100)
    mask = make_mask(70, 100, (32, 32))
    fixed = (q, k, v, mask.kv_num_blocks, mask.kv_indices, [32, 32], 0.25)
    for rest in (
        (None, None, None, False, False),
        (torch.tensor([90], dtype=torch.int32), -1.0, torch.zeros(1, 2, 70), True, True),
    ):
        torch.library.opcheck(torch.ops.sparsediff.attend_blocks.default, (*fixed, *rest, "cpu"))


def test_compile_sees_one_opaque_operation():
    graphs = []

    def remember(module, _):
        graphs.append(module)
        return module.forward

    def model(q, k, v, mask):
        result = attend_blocks(q, k, v, mask, vote_threshold=-2.0, return_lse=True)
        return result.out * 2, result.lse, result.vote

    inputs, mask = make_inputs(70, 100), make_mask(70, 100, (32, 32))
    got = torch.compile(model, fullgraph=True, backend=remember)(*inputs, mask)
    for x, y in zip(got, model(*inputs, mask), strict=True):
        assert torch.equal(x, y)
    (graph,) = graphs
    assert (
        sum(
            node.op == "call_function" and "attend_blocks" in str(node.target)
            for node in graph.graph.nodes
        )
        == 1
    )
