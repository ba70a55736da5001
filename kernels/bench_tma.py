"""The portable kernel with tiles loaded by TMA: checks against float64, and times beside pointers and the Hopper kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from sparsediff.kernels.attention import attend_blocks
from sparsediff.kernels.bench_checks import check_backend, check_graph
from sparsediff.kernels.bench_inputs import (
    DEVICE,
    SHAPES,
    make_inputs,
    make_mask,
    poisoned_memory,
    sustained_ms,
    tile_flops,
    timing,
)
from sparsediff.kernels.tma import readable

BACKEND = "triton_tma"
# Every head size in both dtypes, and every kind of block
CHECK_FORMS = (
    (128, (128, 128), torch.bfloat16),
    (64, (128, 128), torch.bfloat16),
    (96, (128, 128), torch.bfloat16),
    (256, (128, 128), torch.bfloat16),
    (128, (64, 64), torch.bfloat16),
    (64, (64, 64), torch.float16),
    (96, (64, 64), torch.float16),
    (128, (128, 64), torch.float16),
    (256, (64, 64), torch.float16),
    (64, (32, 16), torch.bfloat16),
)
TIMES = (("wan75", 0.2), ("wan32", 0.5), ("wan32", 0.2), ("cog45", 0.2))
# Block -> the Hopper kernel that serves it
HOPPER = {(128, 128): "gluon", (64, 64): "gluon_pairs"}


def check_tma() -> Iterator[dict]:
    """The portable kernel through TMA in every form; how tensors lie, and who takes what TMA cannot read."""
    for head_dim, block, dtype in CHECK_FORMS:
        case = f"D{head_dim} {block[0]}x{block[1]} {dtype}"
        yield from survive(case, partial(check_backend, BACKEND, head_dim, block, dtype))
    yield from survive("CUDA graph", lambda: [check_graph(BACKEND)])
    yield from survive("strides", check_strides)


def survive(case: str, check: Callable[[], Iterable[dict]]) -> Iterator[dict]:
    """The records of a check; one that fails becomes a record, and does not take the others with it."""
    try:
        yield from check()
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"[:500]
        yield {"kind": "check", "backend": BACKEND, "what": case, "ok": False, "failure": failure}


def check_strides() -> Iterator[dict]:
    """The same bits however query, key and value lie in memory, readable for TMA or not."""
    batch, seq, heads, dim = 2, 333, 3, 64
    g = torch.Generator(DEVICE).manual_seed(0)
    packed = torch.randn(
        batch, seq, 3, heads, dim, device=DEVICE, dtype=torch.bfloat16, generator=g
    )
    q, k, v = packed.unbind(2)
    mask = make_mask((batch, heads, seq, dim), (64, 64), 0.5)
    options = {"vote_threshold": -1.0, "return_lse": True, "return_mass": True}
    want = attend_blocks(q, k, v, mask, backend="triton", **options)
    for name, (place, takes_tma) in layouts().items():
        moved = [place(x) for x in (q, k, v)]
        same_values = all(torch.equal(x, y) for x, y in zip(moved, (q, k, v), strict=True))
        with poisoned_memory():
            got = attend_blocks(*moved, mask, backend=BACKEND, **options)
        error = (got.out.float() - want.out.float()).abs().max().item()
        mass_error = (got.mass - want.mass).abs().max().item()
        as_expected = all(readable(x) == takes_tma for x in moved)
        good = same_values and as_expected and error < 1e-2 and mass_error < 1e-2
        yield {
            "kind": "check",
            "backend": BACKEND,
            "what": f"strides: {name}",
            "ok": good and bool((got.lse - want.lse).abs().nan_to_num(0.0).max() < 1e-3),
            "tma": takes_tma,
            "error_to_pointers": error,
            "mass_error_to_pointers": mass_error,
            "bits_as_pointers": torch.equal(got.out, want.out),
        }


def layouts() -> dict[str, tuple[Callable[[Tensor], Tensor], bool]]:
    """Name -> copies of a `[B, S, H, D]` tensor that lie otherwise, NaN around them, and whether TMA reads them."""

    def inside(x: Tensor, *widths: int, first: int = 0) -> Tensor:
        wide = x.new_full((x.numel() * 4 + 64,), float("nan"))[first:]
        strides = (x.shape[1] * widths[0], widths[0], widths[1], 1)
        return wide.as_strided(x.shape, strides).copy_(x)

    return {
        "fused": (lambda x: x, True),
        "contiguous": (lambda x: x.contiguous(), True),
        "heads first": (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), True),
        "wide heads": (lambda x: inside(x, 3 * 96, 96), True),
        "odd heads": (lambda x: inside(x, 3 * 65, 65), False),
        "odd address": (lambda x: inside(x, 3 * 64, 64, first=1), False),
        "last stride": (lambda x: x.transpose(1, 3).contiguous().transpose(1, 3), False),
    }


def time_tma() -> Iterator[dict]:
    """`triton_tma` beside `triton` and the Hopper kernel of the block, in turns."""
    for (shape, density), block in product(TIMES, HOPPER):
        yield from survive(f"{shape} {density} {block}", partial(time_case, shape, density, block))


def time_case(shape: str, density: float, block: tuple[int, int]) -> Iterator[dict]:
    """Each of the three that runs; `over_triton` is how many times as fast as with pointers."""
    size = SHAPES[shape]
    q, k, v = make_inputs(size)
    mask = make_mask(size, block, density)
    runs = {}
    for backend in ("triton", BACKEND, HOPPER[block]):
        run = partial(attend_blocks, q, k, v, mask, backend=backend)
        failures = list(survive(f"{backend} {shape} {block}", lambda run=run: run() and ()))
        yield from failures
        if not failures:
            runs[backend] = run
    flops = tile_flops(mask, size[1], size[3])
    ms = sustained_ms(runs, 0.25)
    for backend, each in ms.items():
        more = {"block": list(block), "area_density": round(mask.density, 4)}
        if "triton" in ms:
            more["over_triton"] = round(ms["triton"] / each, 4)
        yield timing(shape, backend, density, each, flops, **more)
