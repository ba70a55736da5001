"""Where block-sparse attention breaks even with dense attention on this CPU.

    python -m sparsediff.kernels.bench_cpu docs/benchmarks/kernels_cpu.json

Dense is `scaled_dot_product_attention` on the layout diffusers gives it.  Times are process CPU time (all threads
added); dense and sparse take turns and the median of their ratios counts, so that other work on the same cores
disturbs it little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import torch
import torch.nn.functional as F

from sparsediff.block_mask import BlockMask
from sparsediff.kernels.attention import attend_blocks
from sparsediff.kernels.bench_inputs import cpu_name, git_commit

DENSITIES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.1)


def compare(
    dense: Callable[[], object], sparse: Callable[[], object], repeats: int
) -> tuple[float, float, float]:
    """CPU milliseconds of both (the least of `repeats`) and the median of the paired ratios, dense over sparse.

    The two take turns, so that other work on the same cores slows both alike.
    """
    times: tuple[list[float], list[float]] = [], []
    for i in range(repeats + 1):
        for run, kept in zip((dense, sparse), times, strict=True):
            start = time.process_time()
            run()
            if i:  # the first round warms up
                kept.append(time.process_time() - start)
    ratio = statistics.median(d / s for d, s in zip(*times, strict=True))
    return min(times[0]) * 1e3, min(times[1]) * 1e3, ratio


def random_mask(
    density: float, block: int, seq: int, heads: int, generator: torch.Generator
) -> BlockMask:
    """Random blocks, at least one a row; counts vary between rows as they do in real masks."""
    blocks = -(-seq // block)
    keep = torch.rand(1, heads, blocks, blocks, generator=generator) < density
    keep |= torch.eye(blocks, dtype=torch.bool)
    return BlockMask.from_dense(keep, (block, block), (seq, seq))


def break_even(points: list[tuple[float, float]]) -> float:
    """Density at which the speed-up crosses 1, linear between measured points; 1.0 if it never falls below."""
    points = sorted(points)
    for (d0, s0), (d1, s1) in pairwise(points):
        if s0 >= 1 > s1:
            return d0 + (d1 - d0) * (s0 - 1) / (s0 - s1)
    return 1.0 if points[-1][1] >= 1 else 0.0


def measure(seq: int, heads: int, head_dim: int, repeats: int) -> list[dict]:
    """One record for each dtype, block size and density."""
    generator = torch.Generator().manual_seed(0)
    records = []
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (
            torch.randn(1, seq, heads, head_dim, generator=generator).to(dtype) for _ in range(3)
        )
        q_bhsd, k_bhsd, v_bhsd = (x.transpose(1, 2) for x in (q, k, v))
        dense = partial(F.scaled_dot_product_attention, q_bhsd, k_bhsd, v_bhsd)
        for block, density in product((64, 128), DENSITIES):
            mask = random_mask(density, block, seq, heads, generator)
            for byproducts in (False, True) if density == 0.25 else (False,):
                options = {"vote_threshold": -10.0, "return_mass": True} if byproducts else {}
                sparse = partial(attend_blocks, q, k, v, mask, backend="cpu", **options)
                dense_ms, sparse_ms, ratio = compare(dense, sparse, repeats)
                records.append(
                    {
                        "dtype": str(dtype).removeprefix("torch."),
                        "seq": seq,
                        "heads": heads,
                        "head_dim": head_dim,
                        "block": block,
                        "density": round(mask.density, 4),
                        "vote_and_mass": byproducts,
                        "dense_cpu_ms": round(dense_ms, 1),
                        "sparse_cpu_ms": round(sparse_ms, 1),
                        "speedup": round(ratio, 3),
                    }
                )
                print(records[-1], flush=True)  # noqa: T201
    return records


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="write the results here as JSON")
    parser.add_argument("--seq", type=int, nargs="+", default=[2304, 4096])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="one by default: threads that wait also burn CPU time",
    )
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        records = [
            r for seq in args.seq for r in measure(seq, args.heads, args.head_dim, args.repeats)
        ]
    groups: dict[str, list[tuple[float, float]]] = {}
    for r in records:
        if r["vote_and_mass"]:
            continue
        groups.setdefault(f"{r['dtype']} seq {r['seq']} block {r['block']}", []).append(
            (r["density"], r["speedup"])
        )
    result = {
        "what": "CPU block-sparse attention against scaled_dot_product_attention, process CPU time, median of paired ratios",
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "git": git_commit(),
        "repeats": args.repeats,
        "break_even": {name: round(break_even(points), 3) for name, points in groups.items()},
        "records": records,
    }
    print(json.dumps(result["break_even"], indent=1))  # noqa: T201
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
