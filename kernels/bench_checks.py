"""Every attention kernel against float64 on a GPU: what the benchmark runs before it times anything."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsediff.block_mask import BlockMask
from sparsediff.kernels import block_lists, block_scores
from sparsediff.kernels._block_sparse_reference import attend as reference
from sparsediff.kernels.attention import attend_blocks
from sparsediff.kernels.bench_inputs import (
    DEVICE,
    make_inputs,
    make_mask,
    poisoned_memory,
    spoil,
    token_mask,
)

# (batch, heads, query tokens, key tokens) with ragged ends, one block, and neither side the same
CHECK_SIZES = (
    (1, 2, 1000, 1000),
    (2, 3, 129, 771),
    (3, 1, 300, 640),
    (1, 1, 64, 65),
    (1, 4, 2048, 2048),
    (1, 1, 130, 17000),  # lists of more than 64 blocks
)
# Key lengths of batches of 2 and 3: inside a block, all, none, a whole block
CHECK_LENGTHS = {2: (385, 771), 3: (0, 128, 200)}
# Query tokens -> order in which blocks are visited, where it is not the usual one
CHECK_VISITS = {1000: "centre-out", 2048: "ascending"}
# Query tokens -> what keys are multiplied by from the first to the last, so that blocks visited later have far larger
# scores and running maxima move by more than a lazy kernel lets pass
CHECK_STEEP = {129: (8.0, 0.2), 2048: (0.2, 8.0)}


def check_gluon() -> Iterator[dict]:
    """The Hopper kernel in its common form."""
    yield from check_backend("gluon", 128, (128, 128), torch.bfloat16)
    yield check_graph("gluon")
    yield from check_backend("gluon", 64, (128, 128), torch.bfloat16)
    yield from check_backend("gluon", 96, (128, 128), torch.bfloat16)
    for head_dim in (128, 64):
        yield from check_moving_maxima("gluon", head_dim, (128, 128), torch.bfloat16)


def check_gluon_more() -> Iterator[dict]:
    """The Hopper kernel in its other forms."""
    yield from check_backend("gluon", 128, (128, 64), torch.bfloat16)
    yield from check_backend("gluon", 128, (128, 128), torch.float16)
    yield from check_backend("gluon", 64, (128, 64), torch.float16)
    for head_dim, block in ((128, (128, 128)), (128, (128, 64)), (64, (128, 64))):
        yield from check_moving_maxima("gluon", head_dim, block, torch.float16)


def check_triton() -> Iterator[dict]:
    """The portable kernel in its common forms."""
    for dim, block in ((128, (128, 128)), (64, (64, 64)), (128, (128, 64))):
        yield from check_backend("triton", dim, block, torch.bfloat16)
    yield check_graph("triton")


def check_triton_more() -> Iterator[dict]:
    """The portable kernel in its other forms."""
    yield from check_backend("triton", 96, (128, 128), torch.float16)
    yield from check_backend("triton", 256, (128, 128), torch.bfloat16)
    yield from check_backend("triton", 64, (128, 128), torch.float32)
    yield from check_backend("triton", 128, (64, 64), torch.float32)


def make_case(
    sizes: tuple[int, int, int, int],
    head_dim: int,
    block_size: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, BlockMask, Tensor | None, Tensor]:
    """Query, key, value (strided views), a mask with an empty row, key lengths or None, and PyTorch's own answer."""
    batch, heads, seq_q, seq_k = sizes
    g = torch.Generator(DEVICE).manual_seed(seq_q)
    q, k, v = (
        torch.randn(batch, s, heads, 2 * head_dim, device=DEVICE, dtype=dtype, generator=g)[
            ..., :head_dim
        ]
        for s in (seq_q, seq_k, seq_k)
    )
    if seq_q in CHECK_STEEP:
        k *= torch.linspace(*CHECK_STEEP[seq_q], seq_k, device=DEVICE)[:, None, None].to(dtype)
    rows, columns = -(-seq_q // block_size[0]), -(-seq_k // block_size[1])
    keep = torch.rand(batch, heads, rows, columns, device=DEVICE, generator=g) < 0.5
    keep[0, 0, -1] = False
    keep[-1, -1, 0, -1] = True
    visits = CHECK_VISITS.get(seq_q, "descending")
    mask = spoil(BlockMask.from_dense(keep, block_size, (seq_q, seq_k), visits=visits))
    kv_lengths = None
    if batch in CHECK_LENGTHS:
        kv_lengths = torch.tensor(CHECK_LENGTHS[batch], device=DEVICE, dtype=torch.int32)
    tokens = token_mask(mask, kv_lengths)
    baseline = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=tokens
    )
    # PyTorch gives a row without keys whatever it likes; ours are zeros.
    attended = tokens.any(-1).expand(batch, heads, seq_q)[..., None]
    baseline = torch.where(attended, baseline, 0).transpose(1, 2)
    for i, length in enumerate(CHECK_LENGTHS.get(batch, ())):
        # What padding holds must not leak.
        k[i, length:] = float("nan")
        v[i, length:] = float("inf")
    return q, k, v, mask, kv_lengths, baseline


def check_backend(
    backend: str,
    head_dim: int,
    block_size: tuple[int, int],
    dtype: torch.dtype,
) -> Iterator[dict]:
    """Errors of output, log-sum-exp, vote and mass against float64; the same bits twice; empty rows; no NaN."""
    for sizes in CHECK_SIZES:
        batch, heads, seq_q, seq_k = sizes
        q, k, v, mask, kv_lengths, baseline = make_case(sizes, head_dim, block_size, dtype)
        options = {"vote_threshold": -1.0, "return_lse": True, "kv_lengths": kv_lengths}
        exact_options = {
            "scale": head_dim**-0.5,
            "vote_threshold": -1.0,
            "want_lse": True,
            "kv_lengths": kv_lengths,
        }
        g = torch.Generator(DEVICE).manual_seed(seq_q + 1)
        with poisoned_memory():
            plain = attend_blocks(q, k, v, mask, backend=backend, kv_lengths=kv_lengths).out
            got, again = (
                attend_blocks(q, k, v, mask, backend=backend, **options) for _ in range(2)
            )
            mass, mass_again = (
                attend_blocks(q, k, v, mask, backend=backend, return_mass=True, **options).mass
                for _ in range(2)
            )
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
            and torch.equal(mass, mass_again)
            and torch.equal(plain, got.out)
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
            "repeatable": torch.equal(got.out, again.out) and torch.equal(mass, mass_again),
            "byproducts_change_nothing": torch.equal(plain, got.out),
        }


def make_moving_maxima(
    spread: float,
    head_dim: int = 128,
    block_size: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor, BlockMask]:
    """Query, key, value and a mask; some rows' logits lie so far apart that their maxima move late and far.

    One row of every warp is such, then by turns all rows or none: warps must part and meet again.
    """
    g = torch.Generator(DEVICE).manual_seed(int(spread))
    q, k, v = (
        torch.randn(2, s, 3, head_dim, device=DEVICE, dtype=dtype, generator=g)
        for s in (1000, 1500, 1500)
    )
    q[:, 7:400:16] *= spread
    q[:, 400:800] *= spread
    rows, columns = -(-1000 // block_size[0]), -(-1500 // block_size[1])
    keep = torch.rand(2, 3, rows, columns, device=DEVICE, generator=g) < 0.7
    keep[..., 0] = True
    return q, k, v, spoil(BlockMask.from_dense(keep, block_size, (1000, 1500)))


def check_moving_maxima(
    backend: str, head_dim: int, block_size: tuple[int, int], dtype: torch.dtype
) -> Iterator[dict]:
    """Tiles that must be done under another maximum, in some warps or in all; a row of NaN stays one and stays alone."""
    for spread in (8.0, 60.0):
        q, k, v, mask = make_moving_maxima(spread, head_dim, block_size, dtype)
        exact = reference(
            *(x.double() for x in (q, k, v)),
            mask,
            scale=head_dim**-0.5,
            want_lse=True,
            want_mass=True,
            vote_threshold=-1.0,
        )
        baseline = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=token_mask(mask, None)
        ).transpose(1, 2)
        run = partial(attend_blocks, q, k, v, mask, backend=backend)
        with poisoned_memory():
            plain, again = run().out, run().out
            full = run(return_lse=True, return_mass=True, vote_threshold=-1.0)
            q[:, 5] = float("nan")
            spoilt = run().out
        error, floor = ((x.double() - exact[0]).abs().max().item() for x in (plain, baseline))
        budget = 2 * floor + torch.finfo(dtype).eps * exact[0].abs().max().item()
        lse_error = ((full.lse - exact[1]).abs() / (1 + exact[1].abs())).max().item()
        mass_error = (full.mass - exact[3]).abs().max().item()
        votes_wrong = (full.vote != exact[2]).sum().item()
        others = torch.arange(q.shape[1], device=DEVICE) != 5
        good = (
            error <= budget
            and lse_error < 1e-4
            and mass_error < 2e-2
            and votes_wrong <= 1 + full.vote.numel() // 200
            and torch.equal(plain, again)
            and torch.equal(plain, full.out)
            and bool(spoilt[:, 5].isnan().all())
            and torch.equal(spoilt[:, others], plain[:, others])
        )
        yield {
            "kind": "check",
            "backend": backend,
            "what": "maxima that move",
            "head_dim": head_dim,
            "block": list(block_size),
            "dtype": str(dtype).removeprefix("torch."),
            "spread": spread,
            "ok": good,
            "error": error,
            "pytorch_error": floor,
            "budget": budget,
            "lse_error": lse_error,
            "mass_error": mass_error,
            "votes_wrong": votes_wrong,
            "votes": full.vote.numel(),
            "repeatable": torch.equal(plain, again),
            "byproducts_change_nothing": torch.equal(plain, full.out),
            "a_row_of_nan_stays_alone": torch.equal(spoilt[:, others], plain[:, others]),
        }


def check_graph(backend: str, block_size: tuple[int, int] = (128, 128), **options: object) -> dict:
    """The kernel can be captured in a CUDA graph and replayed on other inputs; with a vote unless told otherwise."""
    shape = (1, 2, 500, 128)
    q, k, v = make_inputs(shape)
    mask = make_mask(shape, block_size, 0.5)
    options = options or {"vote_threshold": -3.0, "return_lse": True}
    run = partial(attend_blocks, q, k, v, mask, backend=backend, **options)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for x, new in zip((q, k, v), make_inputs(shape, seed=1), strict=True):
        x.copy_(new)
    graph.replay()
    same = all(x is None or torch.equal(x, want) for x, want in zip(captured, run(), strict=True))
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
        for visits in ("ascending", "centre-out"):
            pairs[visits] = (
                block_lists.lists_from_dense(keep, visits, ragged=True),
                block_lists.dense_reference(keep, visits, ragged=True),
            )
        for name, (got, want) in pairs.items():
            if name == "order":
                good = torch.equal(got[1], want[1])
            else:
                listed = torch.arange(columns, device=DEVICE) < want[0][..., None]
                good = torch.equal(got[0], want[0]) and torch.equal(got[1][listed], want[1][listed])
            yield {"kind": "check", "what": f"{name} lists", "columns": columns, "ok": good}
    x = torch.randn(2, 1000, 3, 96, device=DEVICE, dtype=torch.bfloat16)
    error = (
        (block_scores.block_means(x, 128) - block_scores.block_means_reference(x, 128))
        .abs()
        .max()
        .item()
    )
    yield {"kind": "check", "what": "block means", "ok": error < 1e-5, "error": error}
