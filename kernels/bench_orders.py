"""What surrounds the attention kernel in a sparse call: reordering tokens, storing masks, memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from sparsediff.kernels import block_bitmap, token_order
from sparsediff.kernels.attention import attend_blocks
from sparsediff.kernels.bench_inputs import (
    DEVICE,
    SHAPES,
    make_inputs,
    make_mask,
    median_ms,
    poisoned_memory,
)

MEMORY_LIMIT = 0.05  # of query, key, value and output
# (frames, height, width) in latent tokens; CogVideoX's is rounded to its benchmark shape
GRIDS = {
    "wan75": (21, 45, 80),
    "hun118": (33, 45, 80),
    "wan32": (21, 30, 52),
    "cog45": (10, 50, 90),
}


def check_orders() -> Iterator[dict]:
    """Reordering and storing against plain torch, over ragged sizes and strides; memory of a call."""
    for batch, heads, seq, dim in (
        (1, 2, 1000, 128),
        (2, 5, 129, 96),
        (3, 1, 65, 64),
        (1, 3, 1, 64),
    ):
        g = torch.Generator(DEVICE).manual_seed(seq)
        fused = torch.randn(batch, seq, 3 * heads * dim, device=DEVICE, generator=g).bfloat16()
        tensors = tuple(x.unflatten(-1, (heads, dim)) for x in fused.chunk(3, -1))
        index = torch.stack([torch.randperm(seq, device=DEVICE, generator=g) for _ in range(4)])
        index, by_head = index.int(), torch.arange(heads, device=DEVICE, dtype=torch.int32) % 4
        for rows in (None, by_head):
            with poisoned_memory():
                got = token_order.gather_tokens_triton(tensors, index, rows)
            want = token_order.gather_tokens_reference(tensors, index, rows)
            yield {
                "kind": "check",
                "what": "one order" if rows is None else "an order a head",
                "sizes": [batch, heads, seq, dim],
                "ok": all(map(torch.equal, got, want)),
            }
    for rows, columns in ((1, 1), (7, 63), (40, 591), (3, 2000)):
        keep = torch.rand(2, 3, rows, columns, device=DEVICE) < 0.4
        forced = torch.rand(rows, columns, device=DEVICE) < 0.1
        sizes = (128, 64), (128 * rows - 5, 64 * columns - 3)
        with poisoned_memory():
            got = block_bitmap.pack_mask_triton(keep, forced, *sizes)
        want = block_bitmap.pack_mask_reference(keep, forced, *sizes)
        listed = torch.arange(columns, device=DEVICE) < want.lists[0][..., None]
        yield {
            "kind": "check",
            "what": "stored mask",
            "columns": columns,
            "ok": torch.equal(got.bitmap, want.bitmap)
            and torch.equal(got.lists[0], want.lists[0])
            and torch.equal(got.lists[1][listed], want.lists[1][listed])
            and torch.allclose(got.density, want.density),
        }
    yield check_memory()


def check_memory() -> dict:
    """What one call with a vote takes beyond query, key, value and output, lists counted in."""
    size = SHAPES["wan75"]
    q, k, v = make_inputs(size)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    mask = make_mask(size, (128, 128), 0.2)
    # The scores that the lists were drawn from are no part of a call.
    torch.cuda.reset_peak_memory_stats()
    result = attend_blocks(q, k, v, mask, vote_threshold=-10.0)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - result.out.nbytes
    share = extra / (4 * q.nbytes)
    return {
        "kind": "check",
        "what": "memory beyond query, key, value and output, with a vote",
        "share": round(share, 4),
        "ok": share <= MEMORY_LIMIT,
    }


def axis_orders(shape: str) -> tuple[Tensor, Tensor]:
    """Four axis orders of the video `int32 [4, S]` (PAROAttention's, arXiv 2506.16054), and which each head follows."""
    frames, height, width = GRIDS[shape]
    tokens = torch.arange(frames * height * width, device=DEVICE, dtype=torch.int32)
    axes = ((2, 1, 0), (1, 2, 0), (0, 2, 1), (0, 1, 2))
    index = torch.stack([tokens.view(frames, height, width).permute(a).flatten() for a in axes])
    return index, torch.arange(SHAPES[shape][1], device=DEVICE, dtype=torch.int32) % len(axes)


def time_orders() -> Iterator[dict]:
    """Reordering query, key and value and undoing it on the output, beside a plain copy of as many bytes."""
    for shape, size in SHAPES.items():
        batch, heads, seq, _ = size
        tensors = tuple(make_inputs(size))
        moved = 2 * sum(x.nbytes for x in tensors)
        copies = [torch.empty_like(x) for x in tensors]
        ms = median_ms(partial(copy_each, copies, tensors), 100)
        yield _transfer(shape, "copy of query, key and value", ms, moved)
        del copies
        index, by_head = axis_orders(shape)
        for what, rows in (("one order", None), ("an order a head", by_head)):
            there = median_ms(partial(token_order.gather_tokens, tensors, index, rows), 100)
            back = median_ms(partial(token_order.gather_tokens, tensors[:1], index, rows), 100)
            yield _transfer(shape, f"reorder query, key and value, {what}", there, moved)
            yield _transfer(shape, f"undo the output, {what}", back, moved // 3)
        keep = torch.rand(batch, heads, -(-seq // 128), -(-seq // 128), device=DEVICE) < 0.2
        store = partial(
            block_bitmap.pack_mask, keep, keep[0, 0], (128, 128), (seq, seq), want_lists=False
        )
        yield {"kind": "lists", "shape": shape, "what": "store a vote", "ms": median_ms(store, 50)}
    yield from time_host()


def copy_each(targets: list[Tensor], sources: tuple[Tensor, ...]) -> None:
    """The yardstick of a reordering: a copy in the order it has."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _transfer(shape: str, what: str, ms: float, moved: int) -> dict:
    rate = round(moved / ms * 1e-9, 3)
    return {"kind": "transfer", "shape": shape, "what": what, "ms": round(ms, 4), "tb_per_s": rate}


def time_host() -> Iterator[dict]:
    """Host time of the calls around a small attention, which nothing hides there."""
    shape = (1, 4, 2304, 64)
    q, k, v = make_inputs(shape)
    mask = make_mask(shape, (128, 128), 0.5)
    index = torch.randperm(2304, device=DEVICE, dtype=torch.int32)[None]
    keep = mask.to_dense()
    calls = {
        **{b: partial(attend_blocks, q, k, v, mask, backend=b) for b in ("gluon", "triton")},
        "scaled_dot_product_attention": partial(
            torch.nn.functional.scaled_dot_product_attention,
            *(x.transpose(1, 2) for x in (q, k, v)),
        ),
        "reorder query, key and value": partial(token_order.gather_tokens, (q, k, v), index),
        "store a mask": partial(
            block_bitmap.pack_mask, keep, keep[0, 0], mask.block_size, mask.seq_lengths
        ),
    }
    for what, run in calls.items():
        run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            run()
        host_us = (time.perf_counter() - start) / 100 * 1e6
        torch.cuda.synchronize()
        yield {"kind": "host", "what": what, "host_us": round(host_us, 1)}
