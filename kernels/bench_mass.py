"""Exact block mass on a GPU: checked against float64, then timed beside dense attention."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from sparsediff.kernels import block_scores
from sparsediff.kernels.bench_inputs import DEVICE, SHAPES, make_inputs, median_ms, poisoned_memory

# (batch, heads, query tokens, key tokens)
CHECK_SIZES = ((2, 3, 500, 700), (1, 1, 1, 1), (1, 2, 1000, 65), (1, 5, 257, 1153))


def exact_mass(
    query: Tensor,
    key: Tensor,
    block_size: tuple[int, int],
    scale: float,
    lse: Tensor | None,
    kv_lengths: Tensor | None = None,
) -> Tensor:
    """Mass by float64 probabilities of all tokens, or of the first `kv_lengths` keys."""
    (bq, bk), seq_q, seq_k = block_size, query.shape[1], key.shape[1]
    q, k = (x.double().transpose(1, 2) for x in (query, key))
    scores = q @ k.mT * scale
    if kv_lengths is not None:
        places = torch.arange(seq_k, device=key.device)
        scores.masked_fill_((places >= kv_lengths[:, None])[:, None, None], -torch.inf)
    norm = scores.logsumexp(-1) if lse is None else lse.double()
    weights = (scores - norm.nan_to_num(neginf=torch.inf)[..., None]).exp()
    padded = torch.nn.functional.pad(weights, (0, -seq_k % bk, 0, -seq_q % bq))
    return padded.unflatten(-1, (-1, bk)).unflatten(-3, (-1, bq)).sum((-1, -3))


def check_mass() -> Iterator[dict]:
    """With and without a log-sum-exp, ragged at both ends, strided, logits far from 0; the same bits twice."""
    for dim, block, dtype in (
        (128, (128, 128), torch.bfloat16),
        (64, (64, 64), torch.bfloat16),
        (96, (128, 64), torch.float16),
        (128, (64, 128), torch.bfloat16),
        (128, (64, 64), torch.bfloat16),
        (128, (32, 32), torch.bfloat16),
    ):
        for batch, heads, seq_q, seq_k in CHECK_SIZES:
            g = torch.Generator(DEVICE).manual_seed(seq_q + seq_k)
            q, k = (
                torch.randn(batch, s, heads, 2 * dim, device=DEVICE, dtype=dtype, generator=g)[
                    ..., :dim
                ]
                for s in (seq_q, seq_k)
            )
            # Logits about -60 of one head and +60 of the next: nothing may rely on their being near 0.
            q[..., -1] = 60
            k[..., -1] = dim**0.5 * torch.tensor([-1.0, 1.0], device=DEVICE).repeat(heads)[:heads]
            given = exact_lse(q, k, dim**-0.5).float() + 0.5
            given[0, 0, 0] = -torch.inf
            # Some keys, none and, where there is a third sample, all of them
            lengths = torch.tensor([seq_k - seq_k // 3, 0, seq_k], device=DEVICE).int()[:batch]
            hidden = k.clone()
            for sample, length in zip(hidden, lengths.tolist(), strict=True):
                sample[length:] = torch.nan
            for lse, kv_lengths in product((None, given), (None, lengths)):
                keys = k if kv_lengths is None else hidden
                run = partial(
                    block_scores.block_mass, q, keys, block, scale=dim**-0.5, lse=lse, kv_lengths=kv_lengths,
                )  # fmt: skip
                with poisoned_memory():
                    got, again = run(), run()
                want = exact_mass(q, k, block, dim**-0.5, lse, kv_lengths)
                error = ((got - want).abs() / (1 + want)).max().item()
                yield {
                    "kind": "check",
                    "what": f"exact block mass, {'own' if lse is None else 'given'} log-sum-exp"
                    + ("" if kv_lengths is None else ", key lengths"),
                    "head_dim": dim,
                    "block": list(block),
                    "sizes": [batch, heads, seq_q, seq_k],
                    "ok": error < 2e-3 and torch.equal(got, again),
                    "error": error,
                    "repeatable": torch.equal(got, again),
                }


def exact_lse(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Log-sum-exp of all logits in float64, `[B, H, Sq]`."""
    q, k = (x.double().transpose(1, 2) for x in (query, key))
    return (q @ k.mT * scale).logsumexp(-1)


def time_mass() -> Iterator[dict]:
    """Exact block mass of each shape; compare with the dense attention of the same run."""
    for name, size in SHAPES.items():
        batch, heads, seq, _ = size
        q, k, _ = make_inputs(size)
        lse = torch.full((batch, heads, seq), 12.0, device=DEVICE)
        for block in ((128, 128), (64, 64)):
            padded = torch.full((batch,), seq - 56, dtype=torch.int32, device=DEVICE)
            for what, given, lengths in (
                ("own lse", None, None),
                ("lse given", lse, None),
                ("lse given, key lengths", lse, padded),
            ):
                run = partial(block_scores.block_mass, q, k, block, lse=given, kv_lengths=lengths)
                yield {
                    "kind": "lists",
                    "shape": name,
                    "what": f"exact block mass, {what}",
                    "block": list(block),
                    "ms": round(median_ms(run, 300), 4),
                }
