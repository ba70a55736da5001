"""Attention with 8-bit operands on a GPU: errors against float64, then times beside the 16-bit kernel."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from sparsediff.block_mask import BlockMask
from sparsediff.kernels import quantize
from sparsediff.kernels._block_sparse_reference import attend as reference
from sparsediff.kernels.attention import attend_blocks
from sparsediff.kernels.bench_checks import make_moving_maxima
from sparsediff.kernels.bench_inputs import (
    DEVICE,
    SHAPES,
    make_inputs,
    make_mask,
    median_ms,
    poisoned_memory,
    spoil,
    sustained_ms,
)

# Relative error of the output that a backend may have
LIMITS = {"gluon": 0.01, "gluon_int8": 0.05, "gluon_fp8": 0.08}


def make_outliers(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Keys with a few channels far from 0, as trained models have them, and values of very different sizes."""
    k[..., ::32] = k[..., ::32] * 3 + 8
    q[..., ::32] *= 3
    v[:, 128:256] *= 1e-3
    v[:, 256:384] = 0
    v[..., 5] *= 30


def check_8bit() -> Iterator[dict]:
    """Errors against float64 on plain noise and on outlier channels; votes, mass, log-sum-exp; the same bits twice."""
    for what in ("normal", "outlier channels"):
        for batch, seq_q, seq_k in ((1, 1000, 1000), (2, 300, 771), (1, 2048, 2048), (1, 64, 65)):
            g = torch.Generator(DEVICE).manual_seed(seq_q)
            q, k, v = (
                torch.randn(batch, s, 2, 256, device=DEVICE, dtype=torch.bfloat16, generator=g)[
                    ..., :128
                ]
                for s in (seq_q, seq_k, seq_k)
            )
            if what != "normal":
                make_outliers(q, k, v)
            shape = batch, 2, -(-seq_q // 128), -(-seq_k // 128)
            keep = torch.rand(shape, device=DEVICE, generator=g) < 0.5
            keep[..., 0] = True
            keep[0, 0, 0] = False
            mask = spoil(BlockMask.from_dense(keep, (128, 128), (seq_q, seq_k)))
            options = {"vote_threshold": -1.0}
            previous = torch.randn(batch, 2, seq_q, device=DEVICE, generator=g) + 5
            exact, exact_previous = (
                reference(
                    *(x.double() for x in (q, k, v)),
                    mask,
                    scale=128**-0.5,
                    want_lse=True,
                    want_mass=True,
                    lse_prev=lse_prev,
                    **options,
                )
                for lse_prev in (None, previous.double())
            )
            record = {"kind": "check", "what": f"8 bits, {what}", "sizes": [*shape, seq_q, seq_k]}
            good = True
            for backend, limit in LIMITS.items():
                run = partial(attend_blocks, q, k, v, mask, backend=backend, **options)
                with poisoned_memory():
                    got, again = (run(return_lse=True, return_mass=True) for _ in range(2))
                    mass_previous = run(return_mass=True, lse_prev=previous).mass
                finite = exact[1].isfinite()
                errors = {
                    "relative_error": ((got.out - exact[0]).norm() / exact[0].norm()).item(),
                    "lse_error": (got.lse - exact[1])[finite].abs().max().item(),
                    "mass_error": ((got.mass - exact[3]).norm() / exact[3].norm()).item(),
                    "mass_previous_error": (
                        (mass_previous - exact_previous[3]).norm() / exact_previous[3].norm()
                    ).item(),
                    "votes_lost": int((exact[2] & ~got.vote).sum()),
                    "votes_gained": int((got.vote & ~exact[2]).sum()),
                    "votes": int(exact[2].sum()),
                    "repeatable": all(torch.equal(a, b) for a, b in zip(got, again, strict=True)),
                }
                record[backend] = errors
                good &= (
                    bool(got.out.isfinite().all())
                    and torch.equal(got.lse.isinf(), exact[1].isinf())
                    and errors["relative_error"] < limit
                    and max(errors["mass_error"], errors["mass_previous_error"]) < 0.05
                    and errors["repeatable"]
                    # In 16 bits a maximum within rounding of the threshold may fall on either side.
                    and (errors["votes_lost"] == 0 or backend == "gluon")
                )
            yield {**record, "ok": good}
    yield from check_moving_maxima()
    yield from check_quantizers()


def check_moving_maxima() -> Iterator[dict]:
    """Logits so far apart that maxima move late and far: tiles are done again, in some warps only.

    Rounding costs more the wider logits are: limits grow with them.
    """
    for spread, limit in ((8, 0.08), (60, 0.25)):
        q, k, v, mask = make_moving_maxima(spread)
        exact = reference(
            *(x.double() for x in (q, k, v)), mask, scale=128**-0.5, want_lse=True, want_mass=True
        )
        record = {"kind": "check", "what": "8 bits, maxima that move", "spread": spread}
        good = True
        for backend in LIMITS:
            run = partial(attend_blocks, q, k, v, mask, backend=backend)
            with poisoned_memory():
                plain, full = run(), run(return_lse=True, return_mass=True, vote_threshold=-1.0)
            errors = {
                "relative_error": ((full.out - exact[0]).norm() / exact[0].norm()).item(),
                "lse_error": (full.lse - exact[1]).abs().max().item(),
                "mass_error": ((full.mass - exact[3]).norm() / exact[3].norm()).item(),
                "same_without_byproducts": torch.equal(plain.out, full.out),
            }
            record[backend] = errors
            good &= (
                bool(plain.out.isfinite().all())
                and errors["relative_error"] < limit
                and errors["lse_error"] < 0.1 * spread
                and errors["mass_error"] < limit
                and ((plain.out - exact[0]).norm() / exact[0].norm()).item() < limit
            )
        yield {**record, "ok": good}


def check_quantizers() -> Iterator[dict]:
    """The quantising kernels against plain torch, on lengths around blocks and their parts."""
    for seq in (1, 63, 64, 127, 1000, 4097, 9000):
        q, k, v = make_inputs((2, 3, seq, 128), seed=seq)
        make_outliers(q, k, v)
        for flags in product((False, True), (False, True)):
            yield {**check_pair(q[:, : seq // 2 + 1], k, *flags), "seq": seq}
        with poisoned_memory():
            got = quantize.quantize_values_triton(v, 128)
        want = quantize.quantize_values_reference(v, 128)
        same = (got.value.view(torch.uint8) == want.value.view(torch.uint8)).float().mean().item()
        good = same > 0.999 and torch.allclose(got.scale, want.scale, rtol=1e-5, atol=1e-5)
        yield {"kind": "check", "what": "quantise values", "seq": seq, "ok": good, "same": same}


def check_pair(q: Tensor, k: Tensor, with_shift: bool, with_error: bool) -> dict:
    """The kernel for queries and keys against plain torch, in one form."""
    flags = {"with_shift": with_shift, "with_error": with_error}
    with poisoned_memory():
        got = quantize.quantize_pair_triton(q, k, 128, **flags)
    want = quantize.quantize_pair_reference(q, k, 128, **flags)
    # A number on the edge between two steps may fall on either side.
    steps = max(
        (a.int() - b.int()).abs().max().item() for a, b in zip(got[:2], want[:2], strict=True)
    )
    others = [(a, b) for a, b in zip(got[2:], want[2:], strict=True) if b is not None]
    # A shift may be a small difference of large products.
    error = max(((a - b).abs() / (b.abs() + 1e-2 * b.abs().max())).max().item() for a, b in others)
    finite = all(bool(a.isfinite().all()) for a, _ in others)
    asked = [got.shift is not None, got.error is not None] == [with_shift, with_error]
    return {
        "kind": "check",
        "what": "quantise query and key",
        **flags,
        "ok": steps <= 1 and error < 1e-3 and finite and asked,
        "steps": steps,
        "error": error,
    }


def time_8bit() -> Iterator[dict]:
    """8-bit operands, quantisation counted in, against 16 bits in turns; and quantisation alone."""
    for shape in ("wan75", "hun118", "wan32"):
        size = SHAPES[shape]
        q, k, v = make_inputs(size)
        for density in (1.0, 0.2) if shape == "wan32" else (0.2,):
            mask = make_mask(size, (128, 128), density)
            ms = sustained_ms(
                {name: partial(attend_blocks, q, k, v, mask, backend=name) for name in LIMITS}
            )
            for name, each in ms.items():
                yield {
                    "kind": "sustained",
                    "shape": shape,
                    "what": name,
                    "density": density,
                    "ms": round(each, 4),
                    "speedup": round(ms["gluon"] / each, 3),
                }
        for what, run in (
            (
                "quantise query and key",
                partial(quantize.quantize_pair, q, k, 128, with_shift=False, with_error=False),
            ),
            (
                "quantise query and key, with shift and error",
                partial(quantize.quantize_pair, q, k, 128),
            ),
            ("quantise values", partial(quantize.quantize_values, v, 128)),
        ):
            yield {
                "kind": "lists",
                "shape": shape,
                "what": what,
                "ms": round(median_ms(run, 100), 4),
            }
