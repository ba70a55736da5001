"""Muon for the matrices of the transformer blocks, AdamW for the rest.

Muon (K. Jordan, 2024) replaces the momentum of a matrix by the nearest orthogonal one.  It learns these small
transformers in clearly fewer steps than AdamW; matrices of one shape are treated in one batched product, so a step
costs a few dozen kernels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of each `[N, rows, columns]` matrix towards one (quintic Newton-Schulz)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """`lr` is the root mean square of the update of one weight."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 1e-3, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for params in by_shape.values():
                self._step_one_shape(params, group["lr"], group["momentum"])

    def _step_one_shape(self, params: list[nn.Parameter], lr: float, momentum: float) -> None:
        gradients = torch.stack([p.grad for p in params])
        state = self.state[params[0]]
        buffer = state.setdefault("momentum", torch.zeros_like(gradients))
        buffer.lerp_(gradients, 1 - momentum)
        update = orthogonalise(gradients.lerp(buffer, momentum))
        # an orthogonal matrix has entries of about 1 / sqrt(longer side)
        update = update * (lr * max(gradients.shape[1:]) ** 0.5)
        torch._foreach_sub_(list(params), list(update.unbind(0)))


def split_parameters(transformer: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices inside the repeated blocks, and everything else."""
    matrices, others = [], []
    for name, p in transformer.named_parameters():
        inside = "blocks." in name and p.ndim == 2
        (matrices if inside else others).append(p)
    return matrices, others
