"""What every chunk of training needs: a budget, a log, seeds and the fast layout."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import render
from .autoencoder import channels_last_is_faster
from .world import World


@dataclass
class Budget:
    """How far a chunk has come, by iterations or by the clock."""

    world: World
    seconds: float | None
    iterations: int | None
    iteration: int = 0
    fraction: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def __iter__(self) -> Iterator[float]:
        """Yield the fraction done, before each iteration, until the budget is spent."""
        while self.fraction < 1:
            yield self.fraction
            self.iteration += 1
            if self.iterations is not None:
                self.fraction = self.iteration / self.iterations
            elif self.iteration % 5 == 0 or self.iteration < 5:
                self.fraction = self.world.agree((time.monotonic() - self.started) / self.seconds)


class Log:
    """Lines on the console and in a JSON-lines file, from the first process only."""

    def __init__(self, world: World, path: Path) -> None:
        self.quiet, self.path, self.started = world.rank > 0, path, time.monotonic()

    def __call__(self, **values: float | str) -> None:
        """Write one record with the seconds since the start."""
        if self.quiet:
            return
        record = {"seconds": round(time.monotonic() - self.started, 1), **values}
        print(json.dumps(record), flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def mixed_precision(device: torch.device) -> AbstractContextManager:
    """Bfloat16 autocast on a GPU, nothing on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator for a tuple of numbers: (run seed, purpose, rank, ...)."""
    return torch.Generator().manual_seed(hash(numbers) & 0x7FFF_FFFF)


def channels_last(world: World, args: argparse.Namespace, log: Log) -> bool:
    """Which memory layout suits the convolutions here: measured once, then remembered in `--out`."""
    if world.device.type == "cpu":
        return False
    path = args.out / "layout.json"
    if not path.exists():
        video = render.render(render.sample_scenes(16, seeded(0)), 17, 64, 64, world.device)
        gain = world.agree(channels_last_is_faster(video, mixed_precision(world.device)))
        log(stage="layout", channels_last_gain_ms=1000 * gain)
        path.write_text(json.dumps({"channels_last": gain > 0}))
    return json.loads(path.read_text())["channels_last"]
