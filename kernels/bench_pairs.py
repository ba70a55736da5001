"""The Hopper kernel for pairs of 64-row blocks: checks against float64, and times by how much neighbouring rows agree."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from sparsediff.block_mask import BlockMask
from sparsediff.kernels import block_lists, block_pairs
from sparsediff.kernels._block_sparse_pair_gluon import launch
from sparsediff.kernels._block_sparse_reference import attend as reference
from sparsediff.kernels.attention import attend_blocks
from sparsediff.kernels.bench_checks import CHECK_SIZES, check_graph, make_case
from sparsediff.kernels.bench_inputs import (
    DEVICE,
    SHAPES,
    make_inputs,
    make_mask,
    median_ms,
    poisoned_memory,
    tile_flops,
    timing,
)
from sparsediff.kernels.tuning import PairForm, hopper_pair_form

BLOCK = (64, 64)
AGREEMENTS = (0.0, 0.5, 0.75, 1.0)
PAIR_SHAPES = {
    "wan32": SHAPES["wan32"],
    "cog45": SHAPES["cog45"],
    "wan16": (1, 40, 16384, 128),
}
# Other forms than the one that runs, by head size
TRIALS = {
    128: (
        PairForm(5, False, True),
        PairForm(5, False, False),
        PairForm(6, True, True),
    ),
    64: (
        PairForm(8, False, True),
        PairForm(8, False, False),
        PairForm(5, False, True, wide=True),
    ),
}


def check_pairs() -> Iterator[dict]:
    """Output and log-sum-exp against float64 in every served form, joined lists against sets, a CUDA graph."""
    for head_dim, dtype in (
        (128, torch.bfloat16),
        (64, torch.bfloat16),
        (96, torch.bfloat16),
        (128, torch.float16),
        (64, torch.float16),
    ):
        for sizes in CHECK_SIZES:
            yield check_call(sizes, head_dim, dtype)
    yield check_graph("gluon_pairs", BLOCK, return_lse=True)
    yield from check_long_lists()


def check_long_lists() -> Iterator[dict]:
    """Lists many times longer than the ring, at every agreement, against the portable kernel."""
    for head_dim in (64, 128):
        shape = (1, 8, 16000, head_dim)
        q, k, v = make_inputs(shape)
        for agreement in AGREEMENTS:
            mask, _ = make_pair_mask(shape, 0.3, agreement)
            got, again = (attend_blocks(q, k, v, mask, backend="gluon_pairs") for _ in range(2))
            want = attend_blocks(q, k, v, mask, backend="triton").out
            error = (got.out.float() - want.float()).abs().max().item()
            yield {
                "kind": "check",
                "backend": "gluon_pairs",
                "what": f"long lists, agreement {agreement}",
                "head_dim": head_dim,
                "error": error,
                "ok": error < 2e-3 and torch.equal(got.out, again.out),
            }


def check_call(sizes: tuple[int, int, int, int], head_dim: int, dtype: torch.dtype) -> dict:
    """One call of one size; also in the forms that are only tried."""
    q, k, v, mask, kv_lengths, baseline = make_case(sizes, head_dim, BLOCK, dtype)
    with poisoned_memory():
        run = partial(attend_blocks, q, k, v, mask, backend="gluon_pairs", kv_lengths=kv_lengths)
        plain = run().out
        got, again = (run(return_lse=True) for _ in range(2))
        trials = [
            launch(
                q,
                k,
                v,
                mask,
                scale=head_dim**-0.5,
                form=form,
                kv_lengths=kv_lengths,
                want_lse=True,
            )
            # Every form is a binary of its own, and two dozen of them take a minute to compile.
            for form in (TRIALS.get(head_dim, ()) if dtype == torch.bfloat16 else ())
        ]
    lists = (mask.kv_num_blocks, mask.kv_indices, k.shape[1])
    made = block_pairs.pair_rows(*lists, kv_lengths=kv_lengths)
    want = block_pairs.pair_rows_reference(*lists, kv_lengths=kv_lengths)
    joined = (
        torch.equal(made.totals, want.totals)
        and torch.equal(made.rows, want.rows)
        and torch.equal(made.walk[want.walk >= 0], want.walk[want.walk >= 0])
    )
    exact = reference(
        *(x.double() for x in (q, k, v)),
        mask,
        scale=head_dim**-0.5,
        kv_lengths=kv_lengths,
        want_lse=True,
    )
    error, floor = ((x.double() - exact[0]).abs().max().item() for x in (got.out, baseline))
    budget = 2 * floor + torch.finfo(dtype).eps * exact[0].abs().max().item()
    finite = exact[1].isfinite()
    lse_error = (got.lse.double() - exact[1])[finite].abs().max().item() if finite.any() else 0.0
    same = all(torch.equal(x, got.out) for x in (plain, again.out))
    trial_error = max(
        ((out.double() - exact[0]).abs().max().item() for out, _ in trials), default=0.0
    )
    return {
        "kind": "check",
        "backend": "gluon_pairs",
        "head_dim": head_dim,
        "block": list(BLOCK),
        "dtype": str(dtype).removeprefix("torch."),
        "sizes": list(sizes),
        "ok": joined
        and max(error, trial_error) <= budget
        and bool(got.out.isfinite().all())
        and lse_error < 1e-3
        and torch.equal(got.lse.isinf(), exact[1].isinf())
        and same
        and torch.equal(again.lse, got.lse)
        and all(torch.allclose(lse, got.lse, rtol=1e-4, atol=1e-4) for _, lse in trials),
        "error": error,
        "trial_error": trial_error,
        "pytorch_error": floor,
        "budget": budget,
        "lse_error": lse_error,
        "same_bits": same,
        "lists": joined,
    }


def make_pair_mask(
    shape: tuple[int, int, int, int], density: float, agreement: float
) -> tuple[BlockMask, BlockMask]:
    """Random lists of equal counts whose rows 2p and 2p + 1 share exactly that part; and their unions, as 128x64 blocks.

    What they do not share is apart: the worst case of its agreement.
    """
    batch, heads, seq, _ = shape
    columns, pairs = -(-seq // 64), -(-seq // 128)
    count = max(1, round(density * columns))
    shared = round(agreement * count)
    g = torch.Generator(DEVICE).manual_seed(0)
    rank = torch.rand(batch, heads, pairs, columns, device=DEVICE, generator=g).argsort(-1)
    rank = rank.argsort(-1)
    first = rank < count
    second = (rank < shared) | ((rank >= count) & (rank < 2 * count - shared))
    keep = torch.stack((first, second), 3).flatten(2, 3)[:, :, : -(-seq // 64)]
    union = BlockMask.from_dense(first | second, (128, 64), (seq, seq))
    return BlockMask.from_dense(keep.contiguous(), BLOCK, (seq, seq)), union


def time_pairs() -> Iterator[dict]:
    """`gluon_pairs` at every agreement, beside `triton` on the same lists and `gluon` where rows of 128 share a list."""
    for name, shape in PAIR_SHAPES.items():
        _, heads, _, dim = shape
        q, k, v = make_inputs(shape)
        for agreement in AGREEMENTS:
            mask, union = make_pair_mask(shape, 0.2, agreement)
            flops = tile_flops(mask, heads, dim)
            more = {"agreement": agreement, "union": round(union.density, 4), "sizes": list(shape)}
            record = partial(timing, name, density=round(mask.density, 4), **more)
            runs = {
                "gluon_pairs": (mask, "gluon_pairs"),
                "triton": (mask, "triton"),
                "gluon on the union": (union, "gluon"),
            }
            for what, (lists, backend) in runs.items():
                ms = median_ms(partial(attend_blocks, q, k, v, lists, backend=backend), 300)
                yield record(what=what, ms=ms, flops=flops, block=list(lists.block_size))
            wide = make_mask(shape, (128, 128), union.density)
            ms = median_ms(partial(attend_blocks, q, k, v, wide, backend="gluon"), 300)
            flops = tile_flops(wide, heads, dim)
            yield record(what="gluon, density of the union", ms=ms, flops=flops, block=[128, 128])


def time_pair_forms() -> Iterator[dict]:
    """Other forms than the one that runs; what joining the lists costs."""
    for name, shape in PAIR_SHAPES.items():
        batch, heads, _, dim = shape
        q, k, v = make_inputs(shape)
        for agreement in (0.0, 0.75, 1.0):
            mask, _ = make_pair_mask(shape, 0.2, agreement)
            for form in (hopper_pair_form(dim), *TRIALS[dim]):
                run = partial(launch, q, k, v, mask, scale=dim**-0.5, form=form)
                yield timing(
                    name,
                    f"gluon_pairs {tuple(form)}",
                    round(mask.density, 4),
                    median_ms(run, 200),
                    tile_flops(mask, heads, dim),
                    block=list(BLOCK),
                    agreement=agreement,
                )
        join = partial(block_pairs.pair_rows, mask.kv_num_blocks, mask.kv_indices, shape[2])
        order = partial(block_lists.order, join().totals, batch, heads)
        for what, run in {"join rows": join, "order pairs": order}.items():
            yield {"kind": "lists", "shape": name, "what": what, "ms": round(median_ms(run, 50), 4)}
