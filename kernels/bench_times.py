"""Times of the attention kernels beside PyTorch's dense attention, and of what builds their masks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.runtime.errors import OutOfResources

from sparsediff.kernels import block_lists, block_scores
from sparsediff.kernels._block_sparse_triton import launch
from sparsediff.kernels.attention import attend_blocks
from sparsediff.kernels.bench_inputs import (
    DENSITIES,
    DEVICE,
    SHAPES,
    make_inputs,
    make_mask,
    median_ms,
    sustained_ms,
    tile_flops,
    timing,
)
from sparsediff.kernels.tuning import Tile


def time_dense() -> Iterator[dict]:
    """PyTorch's FlashAttention-2 (what diffusers runs by default) and cuDNN, and the matrix-product roof."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    yield timing("8192^3", "bf16 matmul", 1.0, median_ms(lambda: a @ b, 200), 2.0 * 8192**3)
    for name, shape in SHAPES.items():
        batch, heads, seq, dim = shape
        q, k, v = (x.transpose(1, 2) for x in make_inputs(shape))
        for what, backend in (
            ("sdpa cudnn", SDPBackend.CUDNN_ATTENTION),
            ("sdpa flash", SDPBackend.FLASH_ATTENTION),
        ):
            with sdpa_kernel(backend):
                ms = median_ms(partial(F.scaled_dot_product_attention, q, k, v))
            yield timing(name, what, 1.0, ms, 4.0 * batch * heads * seq * seq * dim)
        del q, k, v


def time_attention(
    backend: str,
    shape: str,
    density: float,
    block_size: tuple[int, int] = (128, 128),
    **options: object,
) -> dict:
    """One call of ours."""
    size = SHAPES[shape]
    q, k, v = make_inputs(size)
    mask = make_mask(size, block_size, density)
    ms = median_ms(partial(attend_blocks, q, k, v, mask, backend=backend, **options))
    return timing(
        shape,
        backend,
        density,
        ms,
        tile_flops(mask, size[1], size[3]),
        block=list(block_size),
        area_density=round(mask.density, 4),
    )


def time_gluon() -> Iterator[dict]:
    """The Hopper kernel at every shape and density."""
    for shape in SHAPES:
        for density in DENSITIES:
            yield time_attention("gluon", shape, density)
    for shape in ("wan75", "wan32"):
        yield time_attention("gluon", shape, 0.2, (128, 64))


def time_triton() -> Iterator[dict]:
    """The portable kernel on this card."""
    for shape, density, block in (
        ("wan32", 1.0, (128, 128)),
        ("wan32", 0.2, (128, 128)),
        ("wan32", 0.2, (128, 64)),
        ("wan32", 0.2, (64, 64)),
        ("wan75", 0.2, (128, 128)),
        ("cog45", 0.2, (128, 128)),
        ("cog45", 0.2, (64, 64)),
    ):
        yield time_attention("triton", shape, density, block)


def time_tiles() -> Iterator[dict]:
    """Other tiles for the portable kernel than `configs/` names: the numbers its tables are made from."""
    for shape, block, tiles in (
        (
            "wan32",
            (128, 128),
            ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (64, 128, 4, 2)),
        ),
        ("wan32", (64, 64), ((64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 32, 4, 4))),
        (
            "cog45",
            (128, 128),
            ((128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (128, 64, 8, 4)),
        ),
    ):
        size = SHAPES[shape]
        q, k, v = make_inputs(size)
        out = torch.empty_like(q)
        mask = make_mask(size, block, 0.2)
        for tile in map(Tile._make, tiles):
            run = partial(launch, q, k, v, mask, scale=size[3] ** -0.5, tile=tile, out=out)
            try:
                ms = median_ms(run, 200)
            except OutOfResources as error:
                yield {"kind": "tile", "shape": shape, "tile": list(tile), "failure": str(error)}
                continue
            flops = tile_flops(mask, size[1], size[3])
            yield timing(shape, f"triton tile {tuple(tile)}", 0.2, ms, flops, block=list(block))


def byproduct_costs(backend: str, shape: str, seconds: float = 0.25) -> Iterator[dict]:
    """A call with each by-product against a plain one, in turns; and the loss of rate on rows of uneven length."""
    size = SHAPES[shape]
    batch, heads, seq, dim = size
    q, k, v = make_inputs(size)
    mask, uneven = (make_mask(size, (128, 128), 0.2, uneven=u) for u in (False, True))
    lse = torch.full((batch, heads, seq), 6.0, device=DEVICE)
    lengths = torch.full((batch,), seq, device=DEVICE, dtype=torch.int32)
    run = partial(attend_blocks, q, k, v, mask, backend=backend)
    ms = sustained_ms(
        {
            "plain": run,
            "uneven rows": partial(attend_blocks, q, k, v, uneven, backend=backend),
            "lse": partial(run, return_lse=True),
            "vote": partial(run, vote_threshold=-10.0),
            "mass, earlier lse": partial(run, return_mass=True, lse_prev=lse),
            "mass, own lse": partial(run, return_mass=True),
            "key lengths": partial(run, kv_lengths=lengths),
        },
        seconds,
    )
    work = tile_flops(uneven, heads, dim) / tile_flops(mask, heads, dim)
    for what, each in ms.items():
        expected = ms["plain"] * (work if what == "uneven rows" else 1)
        yield {
            "kind": "sustained",
            "shape": shape,
            "backend": backend,
            "what": what,
            "density": 0.2,
            "ms": round(each, 4),
            "over_plain": round(each / expected - 1, 4),
        }


def time_byproducts() -> Iterator[dict]:
    """What by-products and uneven rows cost the Hopper kernel."""
    yield from byproduct_costs("gluon", "wan75", 0.4)
    yield from byproduct_costs("gluon", "wan32")
    yield from byproduct_costs("gluon", "cog45")


def time_portable_byproducts() -> Iterator[dict]:
    """What they cost the portable kernel, and the time the host needs for a call."""
    yield from byproduct_costs("triton", "wan75")
    small = (1, 2, 256, 128)
    q, k, v = make_inputs(small)
    mask = make_mask(small, (128, 128), 0.5)
    for backend in ("gluon", "triton"):
        run = partial(attend_blocks, q, k, v, mask, backend=backend)
        run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            run()
        host_us = (time.perf_counter() - start) / 200 * 1e6
        yield {"kind": "host", "what": f"{backend} call", "host_us": round(host_us, 1)}


def pool_both(query: Tensor, key: Tensor) -> None:
    """Block means of both."""
    block_scores.block_means(query, 128)
    block_scores.block_means(key, 128)


def time_lists() -> Iterator[dict]:
    """Mask building for each shape: pooling, scores, top-k, lists, row order."""
    for name, size in SHAPES.items():
        q, k, _ = make_inputs(size)
        batch, heads, seq, _ = size
        rows = -(-seq // 128)
        budget = max(1, round(0.2 * rows))
        scores = block_scores.pooled_scores(q, k, (128, 128))
        keep = scores > scores.mean()
        mask = make_mask(size, (128, 128), 0.2)
        steps = {
            "pool query and key": partial(pool_both, q, k),
            "pooled scores": partial(block_scores.pooled_scores, q, k, (128, 128)),
            "top-k lists": partial(block_lists.lists_from_top_k, scores, budget),
            "dense to lists": partial(block_lists.lists_from_dense, keep),
            "dense to lists, stable argsort": partial(block_lists.dense_reference, keep),
            "row order": partial(block_lists.order, mask.kv_num_blocks, batch, heads),
        }
        for what, run in steps.items():
            yield {"kind": "lists", "shape": name, "what": what, "ms": round(median_ms(run, 50), 4)}
