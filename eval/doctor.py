"""`sparsediff doctor`: what is installed, which kernel will run and why, and whether it works."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from itertools import product

import torch

import sparsediff
from sparsediff.adapter import ADAPTERS
from sparsediff.kernels.attention import attend_blocks, available_backends, select_backend

PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "torchmetrics",
    "lpips",
    "gradio",
)
# Tokens of the blocks that methods use: on Hopper another kernel serves each.
BLOCKS = (64, 128)


def diagnose() -> int:
    """Print everything; returns 0 if the self-test passed, else 1."""
    print(
        f"sparsediff {sparsediff.__version__}, Python {platform.python_version()}, {platform.platform()}\n"
    )
    for name in PACKAGES:
        print(f"  {name:<14}{_version(name)}")
    devices = [torch.device("cpu")] + [
        torch.device("cuda", i) for i in range(torch.cuda.device_count())
    ]
    print("\ndevices")
    for device in devices:
        print(f"  {device!s:<14}{_describe(device)}")
    print("\nkernels")
    for name, problem in available_backends().items():
        print(f"  {name:<14}{problem or 'available'}")
    print("\nwhat will run")
    for device, dtype, block in product(devices, (torch.float32, torch.bfloat16), BLOCKS):
        choice = select_backend(device, dtype, 128, (block, block))
        kind = f"{str(dtype).removeprefix('torch.')}, {block}x{block}"
        print(f"  {device!s:<8}{kind:<19}{choice.name:<13}{choice.reason}")
    print(f"\ntransformers that can be enabled\n  {', '.join(sorted(ADAPTERS))}\n\nself-test")
    results = [_test_kernel(*case) for case in product(devices, BLOCKS)] + [_test_pipeline()]
    return 0 if all(results) else 1


def _test_kernel(device: torch.device, block: int) -> bool:
    """The chosen kernel against the float32 reference on a ragged random problem."""
    g = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    query, key, value = (
        torch.randn(1, 500, 2, 64, generator=g).to(device, dtype) for _ in range(3)
    )
    blocks = -(-500 // block)
    keep = torch.rand(1, 2, blocks, blocks, generator=g) < 0.5
    mask = sparsediff.BlockMask.from_dense(keep, (block, block), (500, 500)).to(device)
    started = time.perf_counter()
    out = attend_blocks(query, key, value, mask).out
    exact = attend_blocks(
        *(x.cpu().float() for x in (query, key, value)), mask.to("cpu"), backend="reference"
    ).out
    error = (out.cpu().float() - exact).abs().max().item()
    passed = error < (1e-5 if dtype == torch.float32 else 3e-2)
    what = f"sparse attention on {device}, blocks of {block}"
    return _say(passed, what, f"max error {error:.1e}", started)


def _test_pipeline() -> bool:
    """A dense schedule changes nothing, a sparse one runs, and disabling restores."""
    from sparsediff.testing import random_wan_pipeline

    started = time.perf_counter()
    pipe = random_wan_pipeline()
    pipe.set_progress_bar_config(disable=True)

    def run():
        return pipe(
            "a circle", height=128, width=128, num_frames=17, num_inference_steps=2, max_sequence_length=16,
            output_type="latent", generator=torch.Generator().manual_seed(0),
        ).frames  # fmt: skip

    stock = run()
    with sparsediff.enable(pipe, schedule=sparsediff.Schedule(dense_steps=1.0)):
        dense = run()
    with sparsediff.enable(pipe, schedule=sparsediff.Schedule()) as handle:
        sparse = run()
    passed = (
        torch.equal(dense, stock)
        and torch.equal(run(), stock)
        and bool(sparse.isfinite().all())
        and handle.report().density < 1.0
    )
    return _say(
        passed, "a tiny Wan pipeline", f"sparse density {handle.report().density:.2f}", started
    )


def _say(passed: bool, what: str, detail: str, started: float) -> bool:
    print(
        f"  {'ok' if passed else 'FAILED':<8}{what}: {detail} ({time.perf_counter() - started:.1f} s)"
    )
    return passed


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{platform.machine()}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory >> 30} GiB"
