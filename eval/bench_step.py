"""One denoising step of a model at its real width and sequence: dense, sparse, and without self-attention.

    sparsediff bench step --model hunyuan-video --out docs/benchmarks/step_hunyuan_h200.json

The transformer is diffusers' own class with fewer layers and random weights (`sparsediff.eval.step_models`): time does not
depend on what they are.  Its blocks are compiled; dense attention runs on whichever kernel of PyTorch's is fastest here.  The
step without self-attention is what no attention kernel can beat.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparsediff
from sparsediff.adapter import adapter_for
from sparsediff.api import watch
from sparsediff.eval.step_models import STEP_MODELS, StepModel
from sparsediff.kernels.bench_inputs import git_commit
from sparsediff.methods import AttentionSite, Auto
from sparsediff.methods.custom import Budget
from sparsediff.schedule import Schedule

DENSITIES = (0.5, 0.3, 0.2, 0.1)
CALLS = 4  # timesteps at each density: one that chooses blocks, one to warm up, two that count
# What dense attention may run on; None leaves the choice to PyTorch.
DENSE = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "PyTorch's choice": None,
}


@dataclass(frozen=True, kw_only=True)
class Ladder(Auto):
    """`auto` with one density after another, each held for `CALLS` timesteps: one enabled, once compiled model.

    A layer has its own budget, because no step comes before the first of a density.
    """

    name: ClassVar[str] = "ladder"

    budget: Budget = "layer_percentile"

    def refreshes(self, site: AttentionSite, last_refresh: int | None) -> bool:
        """At the first timestep of each density."""
        return site.step % CALLS == 0

    def keep_blocks(
        self, query: Tensor, key: Tensor, site: AttentionSite, *, lse: Tensor | None = None
    ) -> Tensor:
        """As `auto` does at the density of the timestep."""
        rung = replace(self, density=DENSITIES[site.step // CALLS % len(DENSITIES)])
        return super(Ladder, rung).keep_blocks(query, key, site, lse=lse)


def main(out: Path | None = None, name: str = "wan-14b") -> None:
    """Measure, print, and write JSON where asked.

    Raises:
        ValueError: no CUDA device, or no model of this name.
    """
    if name not in STEP_MODELS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(STEP_MODELS)}")
    if not torch.cuda.is_available():
        raise ValueError("`bench step` needs a CUDA device")
    import diffusers
    import triton

    case = STEP_MODELS[name]
    model = case.build("cuda")
    result = {
        "what": f"one denoising step of {case.what}, random weights, batch 1, bf16, compiled blocks",
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "diffusers": diffusers.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "git": git_commit(),
        "layers": dict(case.layers),
        "of_layers": case.of_layers(model),
        "timing": "CUDA events, median of two steps after one warm-up",
        "records": [],
    }
    for record in measure(case, model):
        print(json.dumps(record), flush=True)
        result["records"].append(record)
        if out is not None:
            out.write_text(json.dumps(result, indent=1) + "\n")


def measure(
    case: StepModel, model: nn.Module, *, backend: str | None = "inductor"
) -> Iterator[dict]:
    """Milliseconds and peak memory of each kind of step; `over_dense` is the fastest dense step's time over this one's.

    `backend` compiles the blocks; None leaves them as they are.

    Raises:
        RuntimeError: no dense step ran.
    """
    device = next(model.parameters()).device
    step = _stepper(case, model, device)
    if backend is not None:
        for block in _blocks(model):
            block.compile(backend=backend)
    dense, unavailable = [], {}
    for name, kernel in DENSE.items():
        if kernel is not None and device.type != "cuda":
            continue
        try:
            with (
                sdpa_kernel(kernel) if kernel is not None else contextlib.nullcontext(),
                # Its key does not tell these kernels apart: the second would run on the first one's.
                torch._functorch.config.patch(enable_autograd_cache=False),
            ):
                record = _settled("dense", step, device) | {"kernel": name}
        except RuntimeError as error:  # no such kernel for this mask, head size or device
            unavailable[name] = str(error).splitlines()[0]
            yield {"what": "dense", "kernel": name, "unavailable": unavailable[name]}
            continue
        finally:
            torch._dynamo.reset()
        dense.append(record["ms"])
        yield record
    if not dense:
        raise RuntimeError(f"no dense step ran: {unavailable}")
    best = min(dense)
    with watch(model, _no_attention, method=Ladder(), schedule=Schedule()):
        yield _over(best, _settled("no self-attention", step, device))
    torch._dynamo.reset()
    with sparsediff.enable(model, Ladder(), schedule=Schedule()) as handle:
        if backend is not None:
            # Whatever compiles does so at a timestep that nobody counts.
            step()
            handle.begin_generation()
        for density in DENSITIES:
            _reset_peak(device)
            choosing, _, *counted = (step() for _ in range(CALLS))
            for what, ms in (
                ("sparse", statistics.median(counted)),
                ("sparse, choosing blocks", choosing),
            ):
                yield _over(best, _record(what, ms, device) | {"density": density})
        report = handle.report()
    yield {
        "what": "report",
        "grid": report.grid,
        "backends": report.backends,
        "dense_calls": report.dense_calls,
        "densities": [step.density for step in report.steps],
    }


def _stepper(case: StepModel, model: nn.Module, device: torch.device) -> Callable[[], float]:
    """A function that runs one step at the next timestep and gives its milliseconds."""
    g = torch.Generator(device).manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device, generator=g).bfloat16()

    arguments = case.arguments(model, case.latent, random)
    timesteps = iter(range(992, 0, -8))  # all different in bfloat16, too

    def step() -> float:
        timestep = torch.tensor(
            [next(timesteps) * case.unit], device=device, dtype=case.timestep_dtype
        )
        return _elapsed_ms(
            lambda: model(**arguments, timestep=timestep, return_dict=False),
            synchronize=device.type == "cuda",
        )

    return step


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that hold the eligible attention modules."""
    lists = dict.fromkeys(blocks for blocks, _ in adapter_for(model).attention)
    return [block for blocks in lists for block in getattr(model, blocks)]


def _no_attention(call) -> Tensor:
    """The values, copied: the projections of query and key are still computed."""
    return call.value.clone()


def _settled(what: str, step: Callable[[], float], device: torch.device) -> dict:
    _reset_peak(device)
    step()
    return _record(what, statistics.median([step(), step()]), device)


def _over(dense: float, record: dict) -> dict:
    return record | {"over_dense": round(dense / record["ms"], 3)}


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


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _record(what: str, ms: float, device: torch.device) -> dict:
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {"what": what, "ms": round(ms, 1), "peak_gib": round(peak / 2**30, 2)}
