"""One denoising step of Wan 2.1 14B at 720p: dense, sparse through `sparsediff.enable`, and without self-attention.

    sparsediff bench step --out docs/benchmarks/step_h200.json

The transformer is diffusers' own class at its real width and sequence, with fewer layers and random weights: time does
not depend on what they are.  Blocks are compiled (`compile_repeated_blocks`), dense attention runs on cuDNN.  The step
without self-attention is what no attention kernel can beat.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

import sparsediff
from sparsediff.kernels.bench_inputs import git_commit
from sparsediff.methods import AttentionSite, Auto
from sparsediff.schedule import Schedule

DENSITIES = (0.5, 0.3, 0.2, 0.1)
CALLS = 4  # timesteps at each density: one that chooses blocks, one to warm up, two that count
# Wan 2.1 14B, but for num_layers (40)
WAN_14B = {
    "patch_size": (1, 2, 2), "num_attention_heads": 40, "attention_head_dim": 128, "in_channels": 16,
    "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 13824, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}  # fmt: skip
LATENT = (1, 16, 21, 90, 160)  # 81 frames of 720 x 1280


@dataclass(frozen=True, kw_only=True)
class Ladder(Auto):
    """`auto` with one density after another, each held for `CALLS` timesteps: one enabled, once compiled model."""

    name: ClassVar[str] = "ladder"

    def refreshes(self, site: AttentionSite, last_refresh: int | None) -> bool:
        """At the first timestep of each density."""
        return site.step % CALLS == 0

    def keep_blocks(
        self, query: Tensor, key: Tensor, site: AttentionSite, *, lse: Tensor | None = None
    ) -> Tensor:
        """As `auto` does at the density of the timestep."""
        rung = Auto(density=DENSITIES[site.step // CALLS % len(DENSITIES)])
        return rung.keep_blocks(query, key, site, lse=lse)


def main(out: Path | None = None, layers: int = 8) -> None:
    """Measure, print, and write JSON where asked."""
    if not torch.cuda.is_available():
        raise ValueError("`bench step` needs a CUDA device")
    import diffusers
    import triton

    model = build(WAN_14B, layers, "cuda")
    result = {
        "what": "one denoising step of Wan 2.1 14B, 720p, 81 frames, random weights, batch 1, bf16, compiled blocks",
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "diffusers": diffusers.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "git": git_commit(),
        "layers": layers,
        "of_layers": 40,
        "timing": "CUDA events, median of two steps after one warm-up",
        "records": [],
    }
    for record in measure(model, LATENT):
        print(json.dumps(record), flush=True)
        result["records"].append(record)
        if out is not None:
            out.write_text(json.dumps(result, indent=1) + "\n")


def build(sizes: dict, layers: int, device: str):
    """A `WanTransformer3DModel` of random weights, in the dtypes that `from_pretrained(torch_dtype=bfloat16)` gives."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    with torch.device(device):
        model = WanTransformer3DModel(**sizes, num_layers=layers)
    for name, parameter in model.named_parameters():
        if not set(name.split(".")) & set(model._keep_in_fp32_modules):
            parameter.data = parameter.data.to(torch.bfloat16)
    return model.eval().requires_grad_(False)


def measure(model, latent: tuple[int, ...], *, compiled: bool = True) -> Iterator[dict]:
    """Milliseconds and peak memory of each kind of step; `over_dense` is the dense step's time over this one's."""
    device = next(model.parameters()).device
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(latent, device=device, dtype=torch.bfloat16, generator=g)
    text = torch.randn(1, 512, model.config.text_dim, device=device, generator=g).bfloat16()
    timesteps = iter(range(999, 0, -1))

    def step() -> float:
        timestep = torch.tensor([next(timesteps)], device=device)
        return _elapsed_ms(
            lambda: model(x, timestep, text, return_dict=False), synchronize=device.type == "cuda"
        )

    if compiled:
        model.compile_repeated_blocks()
    if device.type == "cuda":
        model.set_attention_backend("_native_cudnn")
    dense = None
    for what, context in (("dense", contextlib.nullcontext()), ("no self-attention", _skipped())):
        with context:
            _reset_peak(device)
            step()
            ms = statistics.median([step(), step()])
        dense = dense or ms
        yield _record(what, None, ms, dense, device)
        torch._dynamo.reset()
    with sparsediff.enable(model, Ladder(), schedule=Schedule()) as handle:
        if compiled:
            # Whatever compiles does so at a timestep that nobody counts.
            step()
            handle.begin_generation()
        for density in DENSITIES:
            _reset_peak(device)
            choosing, _, *counted = (step() for _ in range(CALLS))
            yield _record("sparse", density, statistics.median(counted), dense, device)
            yield _record("sparse, choosing blocks", density, choosing, dense, device)
        report = handle.report()
    yield {
        "what": "report",
        "backends": report.backends,
        "dense_calls": report.dense_calls,
        "densities": [step.density for step in report.steps],
    }


def _elapsed_ms(run, *, synchronize: bool) -> float:
    if not synchronize:
        run()
        return 1.0
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


@torch.library.custom_op("sparsediff::no_attention", mutates_args=())
def _no_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The values.  Opaque, so that a compiler does not drop the projections of query and key."""
    return value.clone()


@_no_attention.register_fake
def _(query, key, value):
    return torch.empty_like(value)


@contextlib.contextmanager
def _skipped() -> Iterator[None]:
    """Self-attention is a copy of its values."""
    from diffusers.models.transformers import transformer_wan

    stock = transformer_wan.dispatch_attention_fn

    def dispatch(query, key, value, **options):
        if query.shape == key.shape:
            return _no_attention(query, key, value)
        return stock(query, key, value, **options)

    transformer_wan.dispatch_attention_fn = dispatch
    try:
        yield
    finally:
        transformer_wan.dispatch_attention_fn = stock


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _record(
    what: str, density: float | None, ms: float, dense: float, device: torch.device
) -> dict:
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {
        "what": what,
        "density": density,
        "ms": round(ms, 1),
        "over_dense": round(dense / ms, 3),
        "peak_gib": round(peak / 2**30, 2),
    }
