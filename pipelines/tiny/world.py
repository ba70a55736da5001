"""One process a GPU, or one process alone: the few collective operations training needs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """Rank and size as `torchrun` gives them; (0, 1) without it."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls) -> World:
        """Read the environment, pick the device and open the process group if there is more than one process."""
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = torch.device(f"cuda:{rank}" if torch.cuda.is_available() else "cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if size > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(rank, size, device)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        pieces = (flat / self.size).split([g.numel() for g in gradients])
        torch._foreach_copy_(
            gradients, [x.view_as(g) for x, g in zip(pieces, gradients, strict=True)]
        )

    def same_weights(self, parameters: Iterable[Tensor]) -> None:
        """Everyone gets the values of the first process."""
        if self.size > 1:
            for p in parameters:
                dist.broadcast(p.data, 0)

    def agree(self, value: float) -> float:
        """The mean of a number over the processes, so that all stop at the same iteration."""
        if self.size == 1:
            return value
        t = torch.tensor(value, device=self.device, dtype=torch.float64)
        dist.all_reduce(t)
        return t.item() / self.size

    def leave(self) -> None:
        """Close the process group."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()
