"""What the kernel benchmarks share: shapes, random inputs and masks, and how a call is timed."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sparsediff.block_mask import BlockMask
from sparsediff.kernels import block_lists

# (batch, heads, tokens, head_dim): Wan 14B 720p, HunyuanVideo 720p, Wan 1.3B 480p, CogVideoX 1.5
SHAPES = {
    "wan75": (1, 40, 75600, 128),
    "hun118": (1, 24, 118800, 128),
    "wan32": (1, 12, 32760, 128),
    "cog45": (1, 48, 45000, 64),
}
DENSITIES = (1.0, 0.5, 0.3, 0.2, 0.1)
DEVICE = "cuda"


def make_inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> list[Tensor]:
    """Random query, key and value, `[B, S, H, D]`."""
    batch, heads, seq, dim = shape
    g = torch.Generator(DEVICE).manual_seed(seed)
    return [
        torch.randn(batch, seq, heads, dim, device=DEVICE, dtype=dtype, generator=g)
        for _ in range(3)
    ]


def make_mask(
    shape: tuple[int, int, int, int],
    block_size: tuple[int, int],
    density: float,
    *,
    uneven: bool = False,
    seed: int = 0,
) -> BlockMask:
    """Random lists, other ones for every head; equal counts, or with `uneven` spread evenly over +-75 %."""
    batch, heads, seq, _ = shape
    rows, columns = -(-seq // block_size[0]), -(-seq // block_size[1])
    g = torch.Generator(DEVICE).manual_seed(seed)
    if density == 1:
        return BlockMask.full(block_size, (seq, seq), heads=heads, device=DEVICE)
    scores = torch.rand(batch, heads, rows, columns, device=DEVICE, generator=g)
    if not uneven:
        lists = block_lists.lists_from_top_k(scores, max(1, round(density * columns)))
        return BlockMask(*lists, block_size, (seq, seq))
    share = density * (0.25 + 1.5 * torch.rand(batch, heads, rows, 1, device=DEVICE, generator=g))
    keep = scores < share
    keep[..., 0] |= ~keep.any(-1)
    return BlockMask(*block_lists.lists_from_dense(keep), block_size, (seq, seq))


def tile_flops(mask: BlockMask, heads: int, head_dim: int) -> float:
    """Floating-point operations of the visited tiles at their full size."""
    visited = mask.kv_num_blocks.sum().item() * heads / mask.kv_num_blocks.shape[1]
    return 4.0 * head_dim * mask.block_size[0] * mask.block_size[1] * visited


def median_ms(run: Callable[[], object], budget_ms: float = 800) -> float:
    """Median time of one call by CUDA events after one warm-up."""
    run()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: list[float] = []
    repeats = 3
    while len(times) < repeats:
        # The device is kept busy while the host prepares the call, as it is inside a model.
        torch.cuda._sleep(2_000_000)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
        repeats = max(3, min(20, int(budget_ms / times[0])))
    return statistics.median(times)


def spoil(mask: BlockMask) -> BlockMask:
    """The same mask with wild numbers where its lists must not be read: past each row's count."""
    past = torch.arange(mask.num_blocks[1], device=mask.device) >= mask.kv_num_blocks[..., None]
    wild = torch.where(
        torch.arange(past.shape[-1], device=mask.device) % 2 == 0, 2**31 - 1, -(2**27) - 1
    )
    lists = torch.where(past, wild.to(torch.int32), mask.kv_indices)
    return BlockMask(mask.kv_num_blocks, lists, mask.block_size, mask.seq_lengths)


def token_mask(mask: BlockMask, kv_lengths: Tensor | None) -> Tensor:
    """The mask at token resolution, `bool [B, H, Sq, Sk]`."""
    (bq, bk), (sq, sk) = mask.block_size, mask.seq_lengths
    keep = mask.to_dense().repeat_interleave(bq, -2).repeat_interleave(bk, -1)[..., :sq, :sk]
    if kv_lengths is not None:
        keep = keep & (torch.arange(sk, device=keep.device) < kv_lengths[:, None])[:, None, None]
    return keep


class poisoned_memory:
    """Fresh memory holds NaN, so that an output nobody wrote cannot pass."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)


def timing(shape: str, what: str, density: float, ms: float, flops: float, **more: object) -> dict:
    """One record."""
    rate = round(flops / ms * 1e-9, 1)
    return {
        "kind": "time",
        "shape": shape,
        "what": what,
        "density": density,
        "ms": round(ms, 4),
        "tflops": rate,
        **more,
    }


def sustained_ms(runs: dict[str, Callable[[], object]], seconds: float = 0.25) -> dict[str, float]:
    """Mean times of runs that take turns, each long enough to be at its own clocks.

    A card at its power limit clocks by what ran in the last tens of milliseconds, so short turns would credit a run
    with the thrift of the one before it: up to 12 % on an H200.  Two rounds, the second in reverse.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    total = dict.fromkeys(runs, 0.0)
    for name in (*runs, *reversed(runs)):
        for settled in (False, True):
            calls = 0
            deadline = time.monotonic() + (seconds if settled else seconds / 2)
            start.record()
            while calls == 0 or time.monotonic() < deadline:
                runs[name]()
                runs[name]()
                calls += 2
                end.record()
                end.synchronize()
        total[name] += start.elapsed_time(end) / calls
    return {name: ms / 2 for name, ms in total.items()}


def git_commit() -> str:
    """The commit of the checkout that runs, with `-dirty` where files differ from it, or "" outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        run = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""  # no git on this machine
    return run.stdout.strip()


def cpu_name() -> str:
    """As the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
