"""What choosing blocks costs a whole run at the size of Wan 14B 720p, beside its dense attention."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsediff.block_mask import BlockMask, pack_bits
from sparsediff.calibration import Calibration, ModelLayout
from sparsediff.eval.video import check_writable
from sparsediff.kernels.attention import run_backend, select_backend
from sparsediff.kernels.bench_inputs import median_ms
from sparsediff.methods import (
    AdaSpa,
    AttentionSite,
    Auto,
    CalibratedMethod,
    DraftAttention,
    LiteAttention,
    Method,
    PAROAttention,
    SparseD,
    SparseVDiT,
)
from sparsediff.methods.paro_attention import ORDERS
from sparsediff.methods.sparse_vdit import MODES, MULTI
from sparsediff.slot import Layout, Slots
from sparsediff.timing import seconds
from sparsediff.token_grid import TokenGrid

GRID, HEADS, HEAD_DIM, STEPS = (21, 45, 80), 40, 128, 50  # Wan 14B 720p
FIRST = STEPS // 5  # steps before it are dense
LAYER = "transformer.blocks.0.attn1"
METHODS: tuple[Method, ...] = (
    Auto(),
    Auto(stride=1),
    AdaSpa(block=128),
    AdaSpa(block=64),
    SparseD(block=128),
    DraftAttention(),
    LiteAttention(),
    PAROAttention(block=128),
    PAROAttention(block=64),
    SparseVDiT(block=128),
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
    """Time one search and one reordering of each method on random queries and keys; a run has 50 steps."""
    from sparsediff.eval.study import arguments, provenance

    check_writable(args.out)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    grid = TokenGrid.video(*args.grid)
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, grid.num_tokens, args.heads, HEAD_DIM)
    tensors = tuple(
        torch.randn(shape, device=device, dtype=dtype, generator=generator) for _ in range(3)
    )
    dense_ms = milliseconds(lambda: _dense(*tensors), device)
    result = {
        "grid": list(args.grid),
        "heads": args.heads,
        "head_dim": HEAD_DIM,
        "dtype": str(dtype),
        "steps": STEPS,
        "seed": 0,
        "arguments": arguments(args),
        "dense_ms": round(dense_ms, 3),
        **provenance(device),
        "methods": [],
    }
    for method in METHODS:
        result["methods"].append(_row(method, grid, tensors, dense_ms))
        print(result["methods"][-1], flush=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time of one call: by events on a GPU that is kept busy, by the clock on a CPU."""
    return median_ms(run) if device.type == "cuda" else 1000 * seconds(run, device)


def _dense(*tensors: Tensor) -> None:
    q, k, v = (x.transpose(1, 2) for x in tensors)
    if q.is_cuda:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            F.scaled_dot_product_attention(q, k, v)
    else:
        F.scaled_dot_product_attention(q, k, v)


def _row(
    method: Method, grid: TokenGrid, tensors: tuple[Tensor, Tensor, Tensor], dense_ms: float
) -> dict[str, object]:
    """One line of the table."""
    name, query = str(method), tensors[0]
    if isinstance(method, CalibratedMethod) and method.needs_calibration:
        method = replace(method, calibration=_made_up(method, grid, query.shape[2]))
    site = AttentionSite(
        layer=1, num_layers=40, step=FIRST, num_steps=STEPS, sigma=0.9, branch="cond", grid=grid,
        name=LAYER,
    )  # fmt: skip
    lse = _log_sum_exp(method, site, tensors)
    key, device = tensors[1], query.device
    search_ms = milliseconds(lambda: _search(method, site, query, key, lse), device)
    searches, later_ms, sample_ms = _searches(method, site), 0.0, 0.0
    if searches > 1:
        later_ms = search_ms
        if lse is not None and not _keeps(method, site, query):
            later_ms = milliseconds(lambda: _search(method, site, query, key, None), device)
    if method.shared_density is not None:
        sample_ms = milliseconds(lambda: method.sample_scores(query, key, site), device)
    reorder_ms = 0.0
    if (order := method.order(site)) is not None:
        heads = None
        if order.chosen_at_run_time:
            heads = method.choose_windows(query, tensors[1], site, lse)

        def there_and_back() -> None:
            order.apply(grid, *tensors, heads=heads)
            order.undo(grid, query, heads=heads)

        reorder_ms = milliseconds(there_and_back, query.device)
    run_ms = dense_ms * STEPS
    choosing_ms = search_ms + later_ms * (searches - 1) + sample_ms * searches
    return {
        "method": name,
        "search_ms": round(search_ms, 3),
        "later_search_ms": round(later_ms, 3),
        "sample_ms": round(sample_ms, 3),
        "searches": searches,
        "share_of_dense": choosing_ms / run_ms,
        "reorder_ms": round(reorder_ms, 3),
        "reorder_share_of_dense": reorder_ms * (STEPS - FIRST) / run_ms,
    }


def _log_sum_exp(
    method: Method, site: AttentionSite, tensors: tuple[Tensor, Tensor, Tensor]
) -> Tensor | None:
    """What the dense call of a search finds on the way, at no measurable cost."""
    if not (method.looks_ahead or method.searches_dense(site, None)):
        return None
    query, size = tensors[0], method.block_size(site.grid)
    backend = select_backend(query.device, query.dtype, HEAD_DIM, size).name
    full = BlockMask.full(size, (site.grid.num_tokens,) * 2, device=query.device)
    return run_backend(backend, *tensors, full, scale=HEAD_DIM**-0.5, want_lse=True).lse


def _keeps(method: Method, site: AttentionSite, query: Tensor) -> bool:
    """Whether the log-sum-exp of the first search is there for the next."""
    layout = Layout(
        grid=site.grid,
        block_size=method.block_size(site.grid),
        order=method.order(site),
        batch=1,
        heads=query.shape[2],
        device=query.device,
    )
    slots = Slots(site.num_layers, method.name, lambda message: None)
    return method.keeps_lse(site) and slots.has_room_for_lse(layout)


def _search(
    method: Method, site: AttentionSite, query: Tensor, key: Tensor, lse: Tensor | None
) -> None:
    """Choose windows and blocks; for a method of static blocks, look them up on the host."""
    order = method.order(site)
    if order is not None and not isinstance(method, CalibratedMethod):
        heads = None
        if order.chosen_at_run_time:
            heads = method.choose_windows(query, key, site, lse)
        query, key = order.apply(site.grid, query, key, heads=heads)
        lse = None if lse is None else order.apply_rows(site.grid, lse, heads)
    method.keep_blocks(query, key, site, lse=lse)


def _searches(method: Method, site: AttentionSite) -> int:
    searches, last = 0, None
    for step in range(FIRST, STEPS):
        if method.refreshes(replace(site, step=step), last):
            searches, last = searches + 1, step
    return searches


def _made_up(method: CalibratedMethod, grid: TokenGrid, heads: int) -> Calibration:
    """A calibration of the right size with random contents: looking up does not depend on them."""
    generator = torch.Generator().manual_seed(0)
    blocks = -(-grid.num_tokens // method.block)

    def bits(*shape: int) -> Tensor:
        return pack_bits(torch.rand(*shape, generator=generator) < 0.3)

    tensors = {
        "orders": torch.randint(len(ORDERS), (1, heads), generator=generator, dtype=torch.uint8),
        "masks": bits(method.bins, 1, heads, blocks, blocks),
    }
    if isinstance(method, SparseVDiT):
        tensors = {
            # every mode, the one that reorders first
            "modes": ((torch.arange(heads) + MULTI) % len(MODES))
            .to(torch.uint8)
            .expand(method.bins, 1, -1)
            .contiguous(),
            "stripes": bits(method.bins, 1, heads, blocks),
        }
    layout = ModelLayout(transformers={}, layers=(LAYER,), heads=heads, head_dim=HEAD_DIM)
    return Calibration(
        method=method.name,
        parameters=method.parameters(),
        model=layout,
        grid=str(grid),
        tensors=tensors,
    )
