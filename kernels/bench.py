"""Check every attention kernel against float64, then time it beside PyTorch's dense attention.

    python -m sparsediff.kernels.bench --output docs/benchmarks/kernels_h200.json

Each part runs in a process of its own with a time limit, so that a fault or a hang costs that part only.  Rates are
TFLOP/s of executed tiles: `4 * head_dim * q_block * kv_block` for each visited block.  `vs_dense` is (best dense time x
density) / time: 1 means that every skipped block became time, at the rate of the best dense kernel measured beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.runtime.errors import OutOfResources

from sparsediff.block_mask import BlockMask
from sparsediff.kernels import block_lists, block_scores
from sparsediff.kernels._block_sparse_reference import attend as reference
from sparsediff.kernels._block_sparse_triton import launch
from sparsediff.kernels.attention import attend_blocks
from sparsediff.kernels.quantize import quantize_pair
from sparsediff.kernels.tuning import Tile

# (batch, heads, tokens, head_dim): Wan 14B 720p, HunyuanVideo 720p, Wan 1.3B 480p, CogVideoX 1.5
SHAPES = {
    "wan75": (1, 40, 75600, 128),
    "hun118": (1, 24, 118800, 128),
    "wan32": (1, 12, 32760, 128),
    "cog45": (1, 48, 45000, 64),
}
DENSITIES = (1.0, 0.5, 0.3, 0.2, 0.1)
DEVICE = "cuda"

# Parts and their limits in seconds; those of one group run side by side.
GROUPS = (
    {
        "check_gluon": 110,
        "check_gluon_more": 110,
        "check_triton": 110,
        "check_triton_more": 110,
        "check_int8": 90,
        "check_lists": 60,
    },
    {"time_dense": 45},
    {"time_gluon": 60},
    {"time_byproducts": 50},
    {"time_triton": 45},
    {"time_int8": 30},
    {"time_lists": 40},
    {"time_tiles": 45},
    {"check_compile": 60},
)


def main(arguments: list[str] | None = None) -> None:
    """Run all parts, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="write the results here as JSON")
    parser.add_argument("--budget", type=float, default=600, help="seconds for everything")
    parser.add_argument("--git", help="commit that is measured, where the checkout cannot say")
    parser.add_argument("--checks-only", action="store_true", help="check, and time nothing")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.part:
        for record in globals()[args.part]():
            print(json.dumps(record), flush=True)  # noqa: T201
        return
    if not torch.cuda.is_available():
        raise SystemExit(
            "the kernel benchmark needs a CUDA device; on a CPU run sparsediff.kernels.bench_cpu"
        )
    result = _provenance(args.git)
    deadline = time.monotonic() + args.budget
    for group in GROUPS:
        if args.checks_only and not all(name.startswith("check") for name in group):
            continue
        running = {name: _start(name) for name in group}
        for name, process in running.items():
            limit = max(1.0, min(group[name], deadline - time.monotonic()))
            result["parts"][name] = _collect(process, limit)
        if args.output:
            args.output.write_text(json.dumps(result, indent=1) + "\n")
    _print(result)
    if any(part["failure"] for part in result["parts"].values()):
        raise SystemExit(1)


def _start(part: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "sparsediff.kernels.bench", "--part", part]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _collect(process: subprocess.Popen, limit: float) -> dict:
    try:
        out, err = process.communicate(timeout=limit)
        end = "" if process.returncode == 0 else f"exit {process.returncode}: {_last_line(err)}"
        if end:
            print(err, file=sys.stderr)  # noqa: T201
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        end = f"stopped after {limit:.0f} s: {_last_line(err)}"
    records = [
        json.loads(line) for line in out.splitlines() if line.startswith("{") and line.endswith("}")
    ]
    return {"records": records, "failure": end}


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


def _provenance(git: str | None) -> dict:
    import triton

    if git is None:
        run = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
        git = run.stdout.strip()
    return {
        "what": "block-sparse attention kernels: errors against float64, times beside PyTorch's dense attention",
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "git": git,
        "shapes": {name: list(shape) for name, shape in SHAPES.items()},
        "timing": "CUDA events, one warm-up, median of 3 to 20 runs; random normal inputs, bf16 unless said",
        "parts": {},
    }


# -- inputs -------------------------------------------------------------------------------------------------------


def make_inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> list[Tensor]:
    """Random query, key and value, `[B, S, H, D]`."""
    batch, heads, seq, dim = shape
    g = torch.Generator(DEVICE).manual_seed(seed)
    return [
        torch.randn(batch, seq, heads, dim, device=DEVICE, dtype=dtype, generator=g)
        for _ in range(3)
    ]


def make_mask(
    shape: tuple[int, int, int, int],
    block_size: tuple[int, int],
    density: float,
    *,
    uneven: bool = False,
    seed: int = 0,
) -> BlockMask:
    """Random lists, other ones for every head; equal counts, or with `uneven` spread evenly over +-75 %."""
    batch, heads, seq, _ = shape
    rows, columns = -(-seq // block_size[0]), -(-seq // block_size[1])
    g = torch.Generator(DEVICE).manual_seed(seed)
    if density == 1:
        return BlockMask.full(block_size, (seq, seq), heads=heads, device=DEVICE)
    scores = torch.rand(batch, heads, rows, columns, device=DEVICE, generator=g)
    if not uneven:
        lists = block_lists.lists_from_top_k(scores, max(1, round(density * columns)))
        return BlockMask(*lists, block_size, (seq, seq))
    share = density * (0.25 + 1.5 * torch.rand(batch, heads, rows, 1, device=DEVICE, generator=g))
    keep = scores < share
    keep[..., 0] |= ~keep.any(-1)
    return BlockMask(*block_lists.lists_from_dense(keep), block_size, (seq, seq))


def tile_flops(mask: BlockMask, heads: int, head_dim: int) -> float:
    """Floating-point operations of the visited tiles at their full size."""
    visited = mask.kv_num_blocks.sum().item() * heads / mask.kv_num_blocks.shape[1]
    return 4.0 * head_dim * mask.block_size[0] * mask.block_size[1] * visited


def median_ms(run: Callable[[], object], budget_ms: float = 800) -> float:
    """Median time of one call by CUDA events after one warm-up."""
    run()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: list[float] = []
    repeats = 3
    while len(times) < repeats:
        # The device is kept busy while the host prepares the call, as it is inside a model.
        torch.cuda._sleep(2_000_000)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
        repeats = max(3, min(20, int(budget_ms / times[0])))
    return statistics.median(times)


# -- checks -------------------------------------------------------------------------------------------------------

# (batch, heads, query tokens, key tokens) with ragged ends, one block, and neither side the same
CHECK_SIZES = ((1, 2, 1000, 1000), (2, 3, 129, 771), (1, 1, 64, 65), (1, 4, 2048, 2048))


def check_gluon() -> Iterator[dict]:
    """The Hopper kernel in its common form."""
    yield from check_backend("gluon", 128, (128, 128), torch.bfloat16)
    yield check_graph("gluon")
    yield from check_backend("gluon", 64, (128, 128), torch.bfloat16)
    yield from check_backend("gluon", 96, (128, 128), torch.bfloat16)


def check_gluon_more() -> Iterator[dict]:
    """The Hopper kernel in its other forms."""
    yield from check_backend("gluon", 128, (128, 64), torch.bfloat16)
    yield from check_backend("gluon", 128, (128, 128), torch.float16)
    yield from check_backend("gluon", 64, (128, 64), torch.float16)


def check_triton() -> Iterator[dict]:
    """The portable kernel in its common forms."""
    for dim, block in ((128, (128, 128)), (64, (64, 64)), (128, (128, 64))):
        yield from check_backend("triton", dim, block, torch.bfloat16, lengths=True)
    yield check_graph("triton")


def check_triton_more() -> Iterator[dict]:
    """The portable kernel in its other forms."""
    yield from check_backend("triton", 96, (128, 128), torch.float16, lengths=True)
    yield from check_backend("triton", 256, (128, 128), torch.bfloat16, lengths=True)
    yield from check_backend("triton", 64, (128, 128), torch.float32, lengths=True)
    yield from check_backend("triton", 128, (64, 64), torch.float32, lengths=True)


def check_backend(
    backend: str,
    head_dim: int,
    block_size: tuple[int, int],
    dtype: torch.dtype,
    *,
    lengths: bool = False,
) -> Iterator[dict]:
    """Errors of output, log-sum-exp, vote and mass against float64; the same bits twice; empty rows; no NaN."""
    for batch, heads, seq_q, seq_k in CHECK_SIZES:
        g = torch.Generator(DEVICE).manual_seed(seq_q)
        q, k, v = (
            torch.randn(batch, s, heads, 2 * head_dim, device=DEVICE, dtype=dtype, generator=g)[
                ..., :head_dim
            ]
            for s in (seq_q, seq_k, seq_k)
        )
        rows, columns = -(-seq_q // block_size[0]), -(-seq_k // block_size[1])
        keep = torch.rand(batch, heads, rows, columns, device=DEVICE, generator=g) < 0.5
        keep[0, 0, -1] = False
        keep[-1, -1, 0, -1] = True
        mask = spoil(BlockMask.from_dense(keep, block_size, (seq_q, seq_k)))
        options = {"vote_threshold": -1.0, "return_lse": True}
        exact_options = {"scale": head_dim**-0.5, "vote_threshold": -1.0, "want_lse": True}
        if lengths and batch == 2:
            options["kv_lengths"] = torch.tensor(
                [seq_k // 2, seq_k], device=DEVICE, dtype=torch.int32
            )
            exact_options["kv_lengths"] = options["kv_lengths"]
        with poisoned_memory():
            plain = attend_blocks(
                q, k, v, mask, backend=backend, kv_lengths=options.get("kv_lengths")
            ).out
            got, again = (
                attend_blocks(q, k, v, mask, backend=backend, **options) for _ in range(2)
            )
            mass = attend_blocks(q, k, v, mask, backend=backend, return_mass=True, **options).mass
            previous = torch.randn(batch, heads, seq_q, device=DEVICE, generator=g) + 5
            mass_previous = attend_blocks(
                q, k, v, mask, backend=backend, return_mass=True, lse_prev=previous, **options
            ).mass
        exact = reference(*(x.double() for x in (q, k, v)), mask, want_mass=True, **exact_options)
        exact_previous = reference(
            *(x.double() for x in (q, k, v)),
            mask,
            want_mass=True,
            lse_prev=previous.double(),
            **exact_options,
        )
        tokens = token_mask(mask, options.get("kv_lengths"))
        baseline = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=tokens
        )
        # PyTorch gives a row without keys whatever it likes; ours are zeros.
        attended = tokens.any(-1).expand(batch, heads, seq_q)[..., None]
        baseline = torch.where(attended, baseline, 0).transpose(1, 2)
        error, floor = ((x.double() - exact[0]).abs().max().item() for x in (got.out, baseline))
        budget = 2 * floor + torch.finfo(dtype).eps * exact[0].abs().max().item()
        finite = exact[1].isfinite()
        lse_error = (
            (got.lse.double() - exact[1])[finite].abs().max().item() if finite.any() else 0.0
        )
        mass_error = (mass - exact[3]).abs().max().item()
        previous_error = (
            ((mass_previous - exact_previous[3]).abs() / (1 + exact_previous[3])).max().item()
        )
        votes_wrong = (got.vote != exact[2]).sum().item()
        good = (
            error <= budget
            and bool(got.out.isfinite().all())
            and lse_error < 1e-3
            and torch.equal(got.lse.isinf(), exact[1].isinf())
            and torch.equal(got.out, again.out)
            and torch.equal(got.vote, again.vote)
            and max(mass_error, previous_error) < 2e-2
            # A row maximum within rounding of the threshold may fall on either side of it.
            and votes_wrong <= 1 + got.vote.numel() // 200
        )
        yield {
            "kind": "check",
            "backend": backend,
            "head_dim": head_dim,
            "block": list(block_size),
            "dtype": str(dtype).removeprefix("torch."),
            "sizes": [batch, heads, seq_q, seq_k],
            "ok": good,
            "error": error,
            "pytorch_error": floor,
            "budget": budget,
            "finite": bool(got.out.isfinite().all()),
            "lse_error": lse_error,
            "mass_error": mass_error,
            "mass_previous_error": previous_error,
            "votes_wrong": votes_wrong,
            "votes": got.vote.numel(),
            "repeatable": torch.equal(got.out, again.out),
            "byproducts_change_nothing": torch.equal(plain, got.out),
        }


def check_int8() -> Iterator[dict]:
    """8-bit logits against float64, on plain noise and on keys with outlier channels as trained models have them."""
    for what, outlier in (("normal", 0.0), ("outlier channels", 8.0)):
        for seq in (1000, 2048):
            shape = (1, 2, seq, 128)
            q, k, v = make_inputs(shape, seed=seq)
            k[..., ::32] = k[..., ::32] * 3 + outlier
            q[..., ::32] *= 3 if outlier else 1
            keep = torch.rand(1, 2, -(-seq // 128), -(-seq // 128), device=DEVICE) < 0.5
            keep[0, 0, 0] = False
            mask = spoil(BlockMask.from_dense(keep, (128, 128), (seq, seq)))
            exact = reference(
                *(x.double() for x in (q, k, v)), mask, scale=128**-0.5, want_lse=True
            )
            errors = {}
            for backend in ("gluon_int8", "gluon"):
                got = attend_blocks(q, k, v, mask, return_lse=True, backend=backend)
                finite = exact[1].isfinite()
                errors[backend] = {
                    "relative_error": ((got.out - exact[0]).norm() / exact[0].norm()).item(),
                    "lse_error": (got.lse - exact[1])[finite].abs().max().item(),
                    "finite": bool(got.out.isfinite().all()),
                }
            good = errors["gluon_int8"]["finite"] and errors["gluon_int8"]["relative_error"] < 0.05
            yield {
                "kind": "check",
                "what": f"8-bit logits, {what}",
                "seq": seq,
                "ok": good,
                **errors,
            }


def check_graph(backend: str) -> dict:
    """The kernel can be captured in a CUDA graph and replayed on other inputs."""
    shape = (1, 2, 500, 128)
    q, k, v = make_inputs(shape)
    mask = make_mask(shape, (128, 128), 0.5)
    run = partial(
        attend_blocks, q, k, v, mask, backend=backend, vote_threshold=-3.0, return_lse=True
    )
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for x, new in zip((q, k, v), make_inputs(shape, seed=1), strict=True):
        x.copy_(new)
    graph.replay()
    want = run()
    same = torch.equal(captured.out, want.out) and torch.equal(captured.vote, want.vote)
    return {"kind": "check", "backend": backend, "what": "CUDA graph", "ok": same}


def check_compile() -> Iterator[dict]:
    """`torch.compile(fullgraph=True)` around the operation gives the same."""
    shape = (1, 2, 500, 128)
    q, k, v = make_inputs(shape)
    mask = make_mask(shape, (128, 128), 0.5)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_blocks(q * 2, k, v, mask).out + 1

    with torch.no_grad():
        got, want = torch.compile(layer, fullgraph=True)(q, k, v), layer(q, k, v)
    yield {
        "kind": "check",
        "what": "torch.compile fullgraph",
        "ok": torch.allclose(got, want, atol=2e-2),
    }


def check_lists() -> Iterator[dict]:
    """The list builders against plain torch."""
    for columns in (1, 63, 256, 591, 929, 2000):
        scores = torch.randn(2, 3, 40, columns, device=DEVICE)
        scores[0] = scores[0].mul(3).round()
        keep = scores > 0.5
        k = torch.randint(0, columns + 1, (2, 3), device=DEVICE, dtype=torch.int32)
        forced = torch.rand(1, 1, 40, columns, device=DEVICE) < 0.05
        pairs = {
            "dense": (block_lists.lists_from_dense(keep), block_lists.dense_reference(keep)),
            "top_k": (
                block_lists.lists_from_top_k(scores, k, forced),
                block_lists.top_k_reference(scores, k, forced),
            ),
            "order": (
                block_lists.order(keep.sum(-1).int(), 2, 3),
                block_lists.order_reference(keep.sum(-1).int(), 2, 3),
            ),
        }
        for name, (got, want) in pairs.items():
            if name == "order":
                good = torch.equal(got[1], want[1])
            else:
                listed = torch.arange(columns, device=DEVICE) < want[0][..., None]
                good = torch.equal(got[0], want[0]) and torch.equal(got[1][listed], want[1][listed])
            yield {"kind": "check", "what": f"{name} lists", "columns": columns, "ok": good}
    q, k = (torch.randn(2, s, 3, 128, device=DEVICE, dtype=torch.bfloat16) for s in (500, 700))
    got, want = (
        f(q, k, (128, 64), scale=0.1)
        for f in (block_scores.block_mass, block_scores.block_mass_reference)
    )
    error = (got - want).abs().max().item()
    yield {"kind": "check", "what": "exact block mass", "ok": error < 1e-2, "error": error}
    x = torch.randn(2, 1000, 3, 96, device=DEVICE, dtype=torch.bfloat16)
    error = (
        (block_scores.block_means(x, 128) - block_scores.block_means_reference(x, 128))
        .abs()
        .max()
        .item()
    )
    yield {"kind": "check", "what": "block means", "ok": error < 1e-5, "error": error}


def spoil(mask: BlockMask) -> BlockMask:
    """The same mask with wild numbers where its lists must not be read: past each row's count."""
    past = torch.arange(mask.num_blocks[1], device=mask.device) >= mask.kv_num_blocks[..., None]
    wild = torch.where(
        torch.arange(past.shape[-1], device=mask.device) % 2 == 0, 2**31 - 1, -(2**27) - 1
    )
    lists = torch.where(past, wild.to(torch.int32), mask.kv_indices)
    return BlockMask(mask.kv_num_blocks, lists, mask.block_size, mask.seq_lengths)


def token_mask(mask: BlockMask, kv_lengths: Tensor | None) -> Tensor:
    """The mask at token resolution, `bool [B, H, Sq, Sk]`."""
    (bq, bk), (sq, sk) = mask.block_size, mask.seq_lengths
    keep = mask.to_dense().repeat_interleave(bq, -2).repeat_interleave(bk, -1)[..., :sq, :sk]
    if kv_lengths is not None:
        keep = keep & (torch.arange(sk, device=keep.device) < kv_lengths[:, None])[:, None, None]
    return keep


class poisoned_memory:
    """Fresh memory holds NaN, so that an output nobody wrote cannot pass."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)


# -- times --------------------------------------------------------------------------------------------------------


def timing(shape: str, what: str, density: float, ms: float, flops: float, **more: object) -> dict:
    """One record."""
    rate = round(flops / ms * 1e-9, 1)
    return {
        "kind": "time",
        "shape": shape,
        "what": what,
        "density": density,
        "ms": round(ms, 4),
        "tflops": rate,
        **more,
    }


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
    uneven = bool(options.pop("uneven", False))
    label = str(options.pop("label", ""))
    mask = make_mask(size, block_size, density, uneven=uneven)
    ms = median_ms(partial(attend_blocks, q, k, v, mask, backend=backend, **options))
    return timing(
        shape,
        f"{backend}{label}",
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
        yield time_attention("gluon", shape, 0.2, uneven=True, label=" uneven rows")


def time_int8() -> Iterator[dict]:
    """8-bit logits, quantisation counted in and alone."""
    for shape in ("wan75", "wan32"):
        for density in (1.0, 0.2):
            yield time_attention("gluon_int8", shape, density)
        q, k, _ = make_inputs(SHAPES[shape])
        ms = median_ms(partial(quantize_pair, q, k, 128), 100)
        yield {
            "kind": "lists",
            "shape": shape,
            "what": "quantise query and key",
            "ms": round(ms, 4),
        }


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


def time_byproducts() -> Iterator[dict]:
    """What log-sum-exp, vote and mass cost, and the time the host needs for a call."""
    shape = "wan75"
    lse = torch.full((SHAPES[shape][0], SHAPES[shape][1], SHAPES[shape][2]), 6.0, device=DEVICE)
    for backend in ("gluon", "triton"):
        yield time_attention(backend, shape, 0.2)
        yield time_attention(backend, shape, 0.2, return_lse=True, label=" + lse")
        yield time_attention(backend, shape, 0.2, vote_threshold=-10.0, label=" + vote")
    yield time_attention(
        "triton", shape, 0.2, return_mass=True, lse_prev=lse, label=" + mass (lse_prev)"
    )
    yield time_attention(
        "triton", shape, 0.2, return_mass=True, label=" + mass (own lse, two passes)"
    )
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
        lse = torch.full((batch, heads, seq), 12.0, device=DEVICE)
        mask = make_mask(size, (128, 128), 0.2)
        steps = {
            "pool query and key": partial(pool_both, q, k),
            "pooled scores": partial(block_scores.pooled_scores, q, k, (128, 128)),
            "exact block mass, two passes": partial(block_scores.block_mass, q, k, (128, 128)),
            "exact block mass, lse given": partial(
                block_scores.block_mass, q, k, (128, 128), lse=lse
            ),
            "top-k lists": partial(block_lists.lists_from_top_k, scores, budget),
            "dense to lists": partial(block_lists.lists_from_dense, keep),
            "dense to lists, stable argsort": partial(block_lists.dense_reference, keep),
            "row order": partial(block_lists.order, mask.kv_num_blocks, batch, heads),
        }
        for what, run in steps.items():
            yield {"kind": "lists", "shape": name, "what": what, "ms": round(median_ms(run, 50), 4)}


def _print(result: dict) -> None:
    records = [r for part in result["parts"].values() for r in part["records"]]
    dense = {}
    for r in records:
        if r["kind"] == "time" and r["what"].startswith("sdpa"):
            dense[r["shape"]] = min(r["ms"], dense.get(r["shape"], float("inf")))
    lines = []
    for r in records:
        if r["kind"] == "time":
            best = dense.get(r["shape"])
            share = (
                f"{best * r.get('area_density', r['density']) / r['ms']:7.2f}"
                if best
                else "      -"
            )
            block = "x".join(map(str, r.get("block", [])))
            lines.append(
                f"{r['shape']:8s} {r['what']:36s} {block:8s} d={r['density']:.2f} {r['ms']:9.3f} ms "
                f"{r['tflops']:7.1f} TFLOP/s {share}"
            )
        elif r["kind"] != "check":
            lines.append(json.dumps(r))
    checks = [r for r in records if r["kind"] == "check"]
    lines += [f"BAD {json.dumps(r)}" for r in checks if not r["ok"]]
    lines += [
        f"PART {name}: {part['failure']}"
        for name, part in result["parts"].items()
        if part["failure"]
    ]
    lines.append(f"{sum(r['ok'] for r in checks)} of {len(checks)} checks passed")
    print("\n".join(lines))  # noqa: T201


if __name__ == "__main__":
    main()
