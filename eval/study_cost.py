"""What choosing blocks costs a whole run at the size of Wan 14B 720p, beside its dense attention."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsediff.block_mask import BlockMask
from sparsediff.kernels.attention import run_backend, select_backend
from sparsediff.methods import (
    AdaSpa,
    AttentionSite,
    Auto,
    DraftAttention,
    LiteAttention,
    Method,
    SparseD,
)
from sparsediff.token_grid import TokenGrid

GRID, HEADS, HEAD_DIM, STEPS = (21, 45, 80), 40, 128, 50
METHODS: tuple[Method, ...] = (
    Auto(),
    AdaSpa(block=128),
    AdaSpa(block=64),
    SparseD(),
    DraftAttention(),
    LiteAttention(),
)


def add_command(commands: argparse._SubParsersAction) -> None:
    """`cost`."""
    parser = commands.add_parser("cost", help="time of choosing blocks at 75,600 tokens")
    parser.add_argument("--grid", type=int, nargs=3, default=GRID, metavar=("F", "H", "W"))
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.set_defaults(command=cost)


@torch.no_grad()
def cost(args: argparse.Namespace) -> None:
    """Time one search and one reuse of each method on random queries and keys; a run has 50 steps."""
    from sparsediff.eval.study import _provenance

    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    grid = TokenGrid.video(*args.grid)
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(
            1,
            grid.num_tokens,
            args.heads,
            HEAD_DIM,
            device=device,
            dtype=dtype,
            generator=generator,
        )
        for _ in range(3)
    )

    def dense() -> None:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if device.type == "cuda":
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                F.scaled_dot_product_attention(q, k, v)
        else:
            F.scaled_dot_product_attention(q, k, v)

    dense_ms = _milliseconds(dense, device)
    rows = []
    for method in METHODS:
        site = AttentionSite(
            layer=1, num_layers=40, step=10, num_steps=STEPS, sigma=0.9, branch="cond", grid=grid
        )
        size = method.block_size(grid)
        backend = select_backend(device, dtype, HEAD_DIM, size).name
        lse = None
        if method.looks_ahead or method.searches_dense(site, None):
            # The dense call of the search finds the log-sum-exp on the way, at no measurable cost.
            full = BlockMask.full(size, (grid.num_tokens,) * 2, device=device)
            lse = run_backend(
                backend, query, key, value, full, scale=HEAD_DIM**-0.5, want_lse=True
            ).lse

        def search(method: Method = method, site: AttentionSite = site, lse=lse) -> None:
            order, heads = method.order(site), None
            q, k, rows = query, key, lse
            if order is not None:
                if order.chosen_at_run_time:
                    heads = method.choose_windows(query, key, site, lse)
                q, k = order.apply(grid, query, key, heads=heads)
                rows = None if lse is None else order.apply_rows(grid, lse, heads)
            method.keep_blocks(q, k, site, lse=rows)

        searches, last = 0, None
        for step in range(STEPS // 5, STEPS):
            at = AttentionSite(**{**site.__dict__, "step": step})
            if method.refreshes(at, last):
                searches, last = searches + 1, step
        ms = _milliseconds(search, device)
        rows.append(
            {
                "method": str(method),
                "search_ms": round(ms, 3),
                "searches": searches,
                "share_of_dense": ms * searches / (dense_ms * STEPS),
            }
        )
        print(rows[-1], flush=True)
    result = {
        "grid": list(args.grid),
        "heads": args.heads,
        "head_dim": HEAD_DIM,
        "dtype": str(dtype),
        "steps": STEPS,
        "dense_ms": round(dense_ms, 3),
        **_provenance(device),
        "methods": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def _milliseconds(run, device: torch.device, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        else:
            started = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - started))
    return sorted(times[1:])[repeats // 2]
