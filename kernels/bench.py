"""Check every attention kernel against float64, then time it beside PyTorch's and other packages' kernels.

    python -m sparsediff.kernels.bench --output docs/benchmarks/kernels_h200.json

Each part runs in a process of its own with a time limit, so that a fault or a hang costs that part only.  Rates are
TFLOP/s of executed tiles: `4 * head_dim * q_block * kv_block` for each visited block.  `vs_dense` is (best dense time x
density) / time: 1 means that every skipped block became time, at the rate of the best dense kernel measured beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from sparsediff.kernels import bench_8bit as eight
from sparsediff.kernels import bench_checks as checks
from sparsediff.kernels import bench_mass as mass
from sparsediff.kernels import bench_orders as orders
from sparsediff.kernels import bench_pairs as pairs
from sparsediff.kernels import bench_peers as peers
from sparsediff.kernels import bench_times as times
from sparsediff.kernels import bench_tma as tma
from sparsediff.kernels.bench_inputs import SHAPES, git_commit

# Parts and their limits in seconds; those of one group run side by side.
GROUPS = (
    {
        checks.check_gluon: 110,
        checks.check_gluon_more: 110,
        checks.check_triton: 110,
        checks.check_triton_more: 110,
        eight.check_8bit: 90,
        checks.check_lists: 60,
        mass.check_mass: 60,
        orders.check_orders: 60,
        pairs.check_pairs: 150,
        tma.check_tma: 170,
    },
    {times.time_dense: 45},
    {times.time_gluon: 60},
    {times.time_byproducts: 50},
    {times.time_portable_byproducts: 50},
    {times.time_triton: 45},
    {tma.time_tma: 60},
    {eight.time_8bit: 40},
    {times.time_lists: 40},
    {mass.time_mass: 40},
    {orders.time_orders: 40},
    {pairs.time_pairs: 60},
    {pairs.time_pair_forms: 60},
    {peers.time_peers: 180},
    {times.time_tiles: 45},
    {checks.check_compile: 60},
)
PARTS = {part.__name__: part for group in GROUPS for part in group}


def main(arguments: list[str] | None = None) -> None:
    """Run all parts, or those named, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="write the results here as JSON")
    parser.add_argument("--budget", type=float, default=600, help="seconds for everything")
    parser.add_argument("--git", help="commit that is measured, where the checkout cannot say")
    parser.add_argument("--checks-only", action="store_true", help="check, and time nothing")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, metavar="PART", help=f"only these: {', '.join(PARTS)}"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.part:
        for record in PARTS[args.part]():
            print(json.dumps(record), flush=True)  # noqa: T201
        return
    if not torch.cuda.is_available():
        raise SystemExit(
            "the kernel benchmark needs a CUDA device; on a CPU run sparsediff.kernels.bench_cpu"
        )
    chosen = args.parts or [n for n in PARTS if n.startswith("check") or not args.checks_only]
    result = _provenance(args.git)
    deadline = time.monotonic() + args.budget
    for group in GROUPS:
        limits = {part.__name__: limit for part, limit in group.items() if part.__name__ in chosen}
        running = {name: _start(name) for name in limits}
        for name, process in running.items():
            limit = max(1.0, min(limits[name], deadline - time.monotonic()))
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

    return {
        "what": "block-sparse attention kernels: errors against float64, times beside PyTorch's and other packages' kernels",
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "git": git or git_commit(),
        "shapes": {name: list(shape) for name, shape in SHAPES.items()},
        "timing": "CUDA events, one warm-up, median of 3 to 20 runs; random normal inputs, bf16 unless said",
        "parts": {},
    }


def _print(result: dict) -> None:
    records = [r for part in result["parts"].values() for r in part["records"]]
    dense = {}
    for r in records:
        if r["kind"] == "time" and r["what"] in peers.DENSE and r["density"] == 1:
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
