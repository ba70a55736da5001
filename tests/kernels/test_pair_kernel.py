"""The Hopper kernel for pairs of rows, its own source, under random interleavings of its three roles on a CPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton.experimental.gluon")

from gluon_emulator import Deadlock, Descriptor, Pointer, mbarrier, run_kernel
from moving_maxima import Redone, errors
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparsediff.block_mask import BlockMask
from sparsediff.kernels import (
    _block_sparse_pair_gluon,
    _block_sparse_triton,
    block_lists,
    block_pairs,
    tuning,
)
from sparsediff.kernels._block_sparse_pair_sm90 import block_sparse_pairs_sm90
from sparsediff.kernels._block_sparse_pair_wide_sm90 import block_sparse_wide_pairs_sm90
from sparsediff.kernels._block_sparse_reference import attend as reference
from sparsediff.kernels._block_sparse_sm90 import block_sparse_fwd_sm90
from sparsediff.kernels.attention import _why_not_triton, select_backend
from sparsediff.kernels.tuning import PairForm, hopper_pair_form

interpreted = pytest.mark.skipif(
    bool(_why_not_triton(torch.device("cpu"), torch.float32, 64, (64, 64))),
    reason="needs TRITON_INTERPRET=1 (make test sets it)",
)

DIM = 64
FORMS = {
    hopper_pair_form(64),
    hopper_pair_form(128),
    PairForm(5, False, True),
    PairForm(3, True, False),
    PairForm(2, True, False, 2),
    PairForm(2, False, True, wide=True),
}


def make(seed, batch, heads, seq_q, seq_k, density, agreement, *, block=(64, 64), dim=DIM):
    """Inputs, and a mask whose neighbouring rows agree in about that share of their blocks."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, s, heads, dim, generator=g).bfloat16() for s in (seq_q, seq_k, seq_k)
    )
    rows, columns = -(-seq_q // block[0]), -(-seq_k // block[1])
    keep = torch.rand(batch, heads, rows, columns, generator=g) < density
    agree = torch.rand(batch, heads, rows // 2, columns, generator=g) < agreement
    keep[:, :, 1::2] = torch.where(agree, keep[:, :, : 2 * (rows // 2) : 2], keep[:, :, 1::2])
    if seed % 3 == 0:
        keep[0, 0, -1] = False
    return q, k, v, BlockMask.from_dense(keep, block, (seq_q, seq_k))


def outputs(q):
    out = torch.full_like(q, float("nan"))
    return out, torch.full((q.shape[0], q.shape[2], q.shape[1]), float("nan"))


def descriptor(x, rows=64):
    return Descriptor(x.transpose(1, 2), rows, DIM)


def run_pairs(q, k, v, mask, *, form, seed, kv_lengths=None, programs=2, replace=None):
    """Output and log-sum-exp of the emulated kernel."""
    batch, seq_q, heads, _ = q.shape
    made = block_pairs.pair_rows_reference(
        mask.kv_num_blocks, mask.kv_indices, k.shape[1], kv_lengths=kv_lengths
    )
    totals, order, draw = block_lists.order_reference(made.totals, batch, heads)
    out, lse = outputs(q)
    made_batch, made_heads, pairs = made.totals.shape
    run_kernel(
        block_sparse_wide_pairs_sm90 if form.wide else block_sparse_pairs_sm90,
        programs,
        seed,
        *map(descriptor, (q, k, v, out)),
        Pointer(lse.view(-1)),
        Pointer(totals),
        Pointer(made.rows.view(-1)),
        Pointer(made.walk.view(-1)),
        Pointer(order),
        Pointer(draw),
        made_heads * pairs if made_batch > 1 else 0,
        pairs if made_heads > 1 else 0,
        DIM**-0.5,
        heads,
        seq_q,
        pairs,
        mask.num_blocks[1],
        len(totals),
        **form.constants,
        BLOCK_D=DIM,
        HAS_LENGTHS=kv_lengths is not None,
        WITH_LSE=True,
        replace=replace,
    )
    return out, lse


def assert_right(out, lse, q, k, v, mask, kv_lengths=None):
    exact, exact_lse, _, _ = reference(
        *(x.double() for x in (q, k, v)),
        mask,
        scale=q.shape[-1] ** -0.5,
        kv_lengths=kv_lengths,
        want_lse=True,
    )
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 9999),
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    rows=st.sampled_from([1, 64, 65, 128, 193, 320]),
    keys=st.sampled_from([1, 64, 130, 640, 1000]),
    density=st.sampled_from([0.1, 0.4, 1.0]),
    agreement=st.sampled_from([0.0, 0.5, 1.0]),
    form=st.sampled_from(sorted(FORMS)),
    lengths=st.booleans(),
)
def test_any_interleaving_gives_attention(
    seed, batch, heads, rows, keys, density, agreement, form, lengths
):
    q, k, v, mask = make(seed, batch, heads, rows, keys, density, agreement)
    kv_lengths = None
    if lengths:
        kv_lengths = torch.randint(
            0, keys + 1, (batch,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed)
        )
        for i, length in enumerate(kv_lengths.tolist()):  # what padding holds must not leak
            k[i, length:], v[i, length:] = float("nan"), float("inf")
    got = run_pairs(q, k, v, mask, form=form, seed=seed, kv_lengths=kv_lengths)
    assert_right(*got, q, k, v, mask, kv_lengths)


def test_one_mask_for_all_samples_and_heads():
    q, k, v, mask = make(1, 2, 2, 200, 300, 1.0, 1.0)
    mask = BlockMask(
        mask.kv_num_blocks[:1, :1], mask.kv_indices[:1, :1], (64, 64), mask.seq_lengths
    )
    assert_right(*run_pairs(q, k, v, mask, form=hopper_pair_form(64), seed=0), q, k, v, mask)


@pytest.mark.parametrize("agreement", [0.0, 1.0])
def test_lists_far_longer_than_the_ring(agreement):
    """One consumer must be able to stay laps behind the other one's blocks."""
    q, k, v, mask = make(2, 1, 1, 128, 4000, 0.9, agreement)
    keep = mask.to_dense()
    keep[0, 0, 1, : -2 if agreement else 0] = False
    mask = BlockMask.from_dense(keep, (64, 64), mask.seq_lengths)
    for seed in range(4):
        for form in sorted(FORMS):
            assert_right(*run_pairs(q, k, v, mask, form=form, seed=seed), q, k, v, mask)


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("agreement", [0.0, 0.5, 1.0])
def test_maxima_that_move_late_and_far(form, agreement):
    """Blocks are done again under another maximum, and what is not done again is noticed."""
    q, k, v, mask = make(7, 1, 2, 256, 1000, 0.7, agreement)
    q *= 40
    redone = Redone()
    got = run_pairs(q, k, v, mask, form=form, seed=7, replace={"are_beyond": redone})
    assert redone.count > 0 or (form.wide and agreement == 0)
    out, lse = errors(*got, q, k, v, mask)
    assert out < 0.01
    assert lse < 1e-3
    if redone.count > 0:
        got = run_pairs(q, k, v, mask, form=form, seed=7, replace={"are_beyond": lambda *_: 0})
        assert not got[0].isfinite().all()


def test_interleavings_change_no_bits():
    q, k, v, mask = make(4, 1, 2, 256, 640, 0.5, 0.5)
    for wide in (False, True):
        forms = [form for form in sorted(FORMS) if form.wide == wide]
        first = run_pairs(q, k, v, mask, form=forms[0], seed=0, programs=1)
        for seed, form in enumerate(forms):
            got = run_pairs(q, k, v, mask, form=form, seed=seed, programs=3)
            assert torch.equal(got[0], first[0])
            assert torch.equal(got[1], first[1])


def free_unseen(turn, full, empty, RING):
    """Frees a stage that may not have been filled."""
    mbarrier.arrive(empty.index(turn % RING))


def never_free(turn, full, empty, RING):
    """Keeps what the other consumer alone wants."""


@pytest.mark.parametrize("mistake", [free_unseen, never_free])
@pytest.mark.parametrize("form", [PairForm(3, False, True), PairForm(3, True, True, wide=True)])
def test_mistakes_are_found(mistake, form):
    q, k, v, mask = make(5, 1, 1, 256, 1280, 0.5, 0.0)

    def run(seed):
        got = run_pairs(q, k, v, mask, form=form, seed=seed, replace={"let_pass": mistake})
        assert_right(*got, q, k, v, mask)

    found = 0
    for seed in range(10):
        try:
            run(seed)
        except AssertionError:
            found += 1
    assert found > 0


def test_two_stages_are_too_few():
    q, k, v, mask = make(7, 1, 1, 128, 1280, 0.5, 0.0)
    with pytest.raises(Deadlock, match="nobody can go on: consumer 0"):
        run_pairs(q, k, v, mask, form=PairForm(2, False, False, 1), seed=0)


def emulate(kernel, grid, form, arguments, **constants):
    """`launch_kernel` on the emulator."""

    def known(x):
        if isinstance(x, TensorDescriptor):
            view = x.base.as_strided(x.shape, x.strides)
            return Descriptor(view, *x.block_shape[2:])
        return Pointer(x.view(-1)) if isinstance(x, torch.Tensor) else x

    options = {name: constants.pop(name) for name in ("num_warps", "maxnreg")}
    assert options["num_warps"] == 4
    run_kernel(kernel, grid[0], 0, *map(known, arguments), **constants)


@interpreted
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("lengths", [None, (250, 64)])
def test_the_launcher_hands_over_what_the_kernel_takes(monkeypatch, head_dim, lengths):
    monkeypatch.setattr(_block_sparse_pair_gluon, "launch_kernel", emulate)
    monkeypatch.setattr(_block_sparse_pair_gluon, "multiprocessors", lambda device: 2)
    q, k, v, mask = make(8, 2, 2, 200, 333, 0.6, 0.5, dim=head_dim)
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    for shared in (False, True):
        if shared:
            lists = mask.kv_num_blocks[:1, :1], mask.kv_indices[:1, :1]
            mask = BlockMask(*lists, mask.block_size, mask.seq_lengths)
        got = _block_sparse_pair_gluon.attend(
            q, k, v, mask, scale=head_dim**-0.5, kv_lengths=lengths, want_lse=True
        )
        assert_right(*got[:2], q, k, v, mask, lengths)
        assert got[2:] == (None, None)


@interpreted
def test_votes_and_mass_come_from_the_portable_kernel():
    q, k, v, mask = make(9, 1, 2, 130, 200, 0.6, 0.5)
    options = {"scale": 0.125, "vote_threshold": -1.0, "want_mass": True}
    got = _block_sparse_pair_gluon.attend(q.half(), k.half(), v.half(), mask, **options)
    want = _block_sparse_triton.attend(q.half(), k.half(), v.half(), mask, **options)
    assert torch.equal(got[2], want[2])
    assert torch.equal(got[3], want[3])


def test_what_keeps_it_from_serving_is_told():
    assert tuning.why_not_hopper_pairs((9, 0), 16, 128, (64, 64)) == ""
    assert "blocks of (64, 64)" in tuning.why_not_hopper_pairs((9, 0), 16, 128, (128, 128))
    assert "head_dim 64, 96 and 128" in tuning.why_not_hopper_pairs((9, 0), 16, 256, (64, 64))
    assert "compute capability 9.x" in tuning.why_not_hopper_pairs((8, 0), 16, 128, (64, 64))
    with pytest.raises(ValueError, match="backend 'gluon_pairs' cannot run here: needs a CUDA"):
        select_backend("cpu", torch.bfloat16, 128, (64, 64), "gluon_pairs")


@pytest.mark.parametrize("seed", range(3))
def test_the_kernel_that_runs_on_hopper_passes_too(seed):
    """What has been held against float64 on a GPU: a fault here would be the emulator's."""
    q, k, v, mask = make(seed, 2, 2, 300, 700, 0.5, 0.0, block=(128, 128))
    totals, order, draw = block_lists.order_reference(mask.kv_num_blocks, 2, 2)
    out, lse = outputs(q)
    nothing = Pointer(torch.zeros(1))
    run_kernel(
        block_sparse_fwd_sm90,
        2,
        seed,
        descriptor(q),
        descriptor(k, 128),
        descriptor(v, 128),
        descriptor(out),
        Pointer(lse.view(-1)),
        *[nothing] * 4,
        Pointer(totals),
        Pointer(mask.kv_indices.reshape(-1)),
        nothing,
        Pointer(order),
        Pointer(draw),
        *mask.kv_indices.contiguous().stride()[:2],
        DIM**-0.5,
        0.0,
        2,
        q.shape[1],
        k.shape[1],
        *mask.num_blocks,
        len(totals),
        RING=3,
        BLOCK_N=128,
        BLOCK_D=DIM,
        ALIAS=seed == 0,
        HAS_LENGTHS=False,
        WITH_LSE=True,
        WITH_VOTE=False,
        WITH_MASS=False,
        HAS_LSE_PREV=False,
    )
    assert_right(out, lse, q, k, v, mask)
