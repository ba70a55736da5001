"""What calibrating takes in memory beside a run, counted allocation by allocation."""

import gc
import weakref

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from sparsediff import (
    AttentionSite,
    Calibration,
    LiteAttention,
    PAROAttention,
    SparseVDiT,
    TokenGrid,
    calibration_memory,
)
from sparsediff.block_mask import BlockMask
from sparsediff.calibration import Call, ModelLayout, per_calibration, pinned
from sparsediff.calibration_memory import (
    head_groups,
    how_many_fit,
    relative_error,
    require_host_memory,
)
from sparsediff.calibrator import AttentionError
from sparsediff.kernels.attention import attend_blocks
from sparsediff.methods.paro_attention import _orders
from sparsediff.methods.sparse_vdit import COPIES

GRID, HEADS, DIM = TokenGrid.video(4, 16, 16), 12, 64
LAYOUT = ModelLayout(transformers={}, layers=("a.0",), heads=HEADS, head_dim=DIM)
COSTS = (1.0, 0.0, 0.3, 0.3, 0.3)
METHODS = {
    "paro_attention": PAROAttention(),
    "sparse_vdit": SparseVDiT(costs=COSTS, density=0.4),
    "lite_attention": LiteAttention(tile=(64, 64)),
}


def make_call(grid=GRID, heads=HEADS, dtype=torch.float32, step=0):
    g = torch.Generator().manual_seed(step)
    q, k, v = (torch.randn(1, grid.num_tokens, heads, DIM, generator=g).to(dtype) for _ in range(3))
    site = AttentionSite(
        layer=0, num_layers=1, step=step, num_steps=4, sigma=0.5, branch="cond", grid=grid, name="a.0"
    )  # fmt: skip

    def dense():
        out = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v))
        )
        return out.transpose(1, 2)

    return Call(site, q, k, v, dense, lambda: (dense(), True))


def peak_bytes(run):
    """The most that was allocated at once while `run` ran, beyond what there was before; what it returned is counted."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = most = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert len(events) > 10
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_the_measure_measures():
    assert peak_bytes(lambda: [torch.ones(1 << 20) for _ in range(20)]) >= 20 * 4 << 20
    assert peak_bytes(lambda: [torch.ones(1 << 20).sum() for _ in range(20)]) < 2 * 4 << 20


def kernel_peak(call, heads):
    """What the attention kernel takes by itself: the CPU's, unlike a GPU's, holds the scores that it votes on."""
    tokens = (GRID.num_tokens,) * 2
    q, k, v = (x[:, :, heads].contiguous() for x in (call.query, call.key, call.value))
    mask = BlockMask.full((64, 64), tokens)
    return peak_bytes(lambda: attend_blocks(q, k, v, mask, vote_threshold=-1.0))


# name, pass -> outputs held at once beside a chunk, and the heads that the kernel gets at once
LOOKS = {
    ("paro_attention", 0): (1, None),
    ("paro_attention", 1): (1, None),
    ("sparse_vdit", 0): (1, slice(0, 1)),
    ("lite_attention", 0): (2, slice(0, HEADS)),
}


@pytest.mark.parametrize(("name", "number"), LOOKS)
def test_a_look_takes_an_output_or_two_and_one_chunk(name, number, monkeypatch):
    """The bound of docs/methods.md, at a size where a chunk is one head of a call."""
    outputs, heads = LOOKS[name, number]
    calibrator = METHODS[name].calibrator(LAYOUT)
    for before in range(number):
        calibrator.begin_generation(before)
        calibrator.attend(make_call())
    calibrator.begin_generation(number)
    calibrator.attend(make_call())  # what is kept for good
    call = make_call(step=1)
    out, blocks = call.query.nbytes, -(-GRID.num_tokens // 64)
    bound = outputs * out + (0 if heads is None else kernel_peak(call, heads))
    monkeypatch.setattr(calibration_memory, "CHUNK_BYTES", out)
    most = peak_bytes(lambda: calibrator.attend(call))
    # Bitmaps, index lists and sums of the blocks.
    bound += out + 40 * HEADS * blocks * blocks
    assert most <= bound, f"{most / out:.2f} outputs, {bound / out:.2f} allowed"
    if name == "lite_attention":
        assert sum(x.nbytes for x in calibrator.masks.values()) == HEADS * blocks * blocks // 8
    else:
        monkeypatch.setattr(calibration_memory, "CHUNK_BYTES", 1 << 40)
        assert peak_bytes(lambda: calibrator.attend(call)) > bound, "so chunks are what bounds it"


def test_measuring_the_error_takes_two_outputs_and_one_chunk(monkeypatch):
    call = make_call(dtype=torch.bfloat16)
    out = call.query.nbytes
    monkeypatch.setattr(calibration_memory, "CHUNK_BYTES", out // 2)
    assert peak_bytes(lambda: AttentionError().attend(call)) <= 2 * out + out // 2 + out // 4


def test_at_the_size_of_wan_14b_a_chunk_is_one_or_more_heads_and_fits_what_is_promised():
    """The arithmetic of docs/methods.md: 75,600 tokens, 40 heads of 128, 16 bits; nothing is allocated."""
    q = torch.empty(1, 75_600, 40, 128, dtype=torch.bfloat16, device="meta")
    assert q.nbytes == 774_144_000
    for copies in (4, 6, COPIES):
        groups = list(head_groups(q, copies))
        assert [h for g in groups for h in range(40)[g]] == list(range(40))
        per_head = q.nbytes // 40
        width = groups[0].stop
        assert copies * width * per_head <= calibration_memory.CHUNK_BYTES
    rows = how_many_fit(4 * 4 * 64 * 75_600)
    assert rows >= 1
    assert rows * 4 * 4 * 64 * 75_600 <= calibration_memory.CHUNK_BYTES
    # Two tensors of a call, index lists of 128-token tiles and a chunk, in the gigabytes that docs/methods.md states.
    lists = 4 * 40 * 591 * 591
    assert 2 * q.nbytes + lists + calibration_memory.CHUNK_BYTES < 1.9e9


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_relative_error_is_the_plain_one_however_it_is_cut(power, dtype, monkeypatch):
    g = torch.Generator().manual_seed(power)
    a, b = (torch.randn(2, 33, 5, 8, generator=g).to(dtype) * 100 for _ in range(2))
    plain = (a.double() - b.double()).norm(power) / b.double().norm(power)
    for chunk in (1, 2000, 1 << 30):
        monkeypatch.setattr(calibration_memory, "CHUNK_BYTES", chunk)
        torch.testing.assert_close(relative_error(a, b, power), plain, rtol=1e-6, atol=0)
    assert relative_error(b, b, power) == 0
    assert relative_error(a, 0 * b, power).isfinite()


def test_large_half_precision_outputs_do_not_overflow():
    exact = torch.full((1, 4096, 2, 64), 60_000.0, dtype=torch.float16)
    assert relative_error(-exact, exact, 2).item() == pytest.approx(2.0, rel=1e-6)


def test_more_host_memory_than_there_is_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(calibration_memory, "host_memory", lambda: 2 << 30)
    require_host_memory(2 << 30, "x", "y")
    with pytest.raises(ValueError, match=r"x takes 3\.0 GiB of the host's memory.*has 2\.0; y"):
        require_host_memory(3 << 30, "x", "y")
    monkeypatch.setattr(calibration_memory, "host_memory", lambda: 1000)
    calibrator = PAROAttention().calibrator(LAYOUT)
    calibrator.begin_generation(0)
    with pytest.raises(ValueError, match=r"paro_attention at 1,024 tokens .*block=128"):
        calibrator.attend(make_call())
    monkeypatch.setattr(calibration_memory, "host_memory", lambda: None)
    calibrator.attend(make_call())


def calibration():
    tensors = {"orders": torch.zeros(1, HEADS, dtype=torch.uint8), "masks": torch.zeros(3)}
    return Calibration(
        method="paro_attention", parameters={}, model=LAYOUT, grid=None, tensors=tensors
    )


def test_nothing_keeps_a_calibration_that_nobody_uses():
    made = calibration()
    assert pinned(made, "masks") is pinned(made, "masks")
    assert _orders(made, 0) is _orders(made, 0)
    gone = weakref.ref(made), weakref.ref(made.tensors["masks"])
    del made
    gc.collect()
    assert [x() for x in gone] == [None, None]


def test_what_is_kept_for_a_calibration_is_made_once_and_for_it_alone():
    made = []

    @per_calibration
    def twice(calibration, x, *, y=0):
        made.append((x, y))
        return 2 * x + y

    one, other = calibration(), calibration()
    assert [twice(one, 1), twice(one, 1), twice(one, 1, y=3), twice(other, 1)] == [2, 2, 5, 2]
    assert made == [(1, 0), (1, 3), (1, 0)]
