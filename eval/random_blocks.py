"""Random blocks at a given density: the floor that any method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsediff.budget import row_top_k
from sparsediff.methods import AttentionSite, Method


@dataclass(frozen=True, kw_only=True)
class Random(Method):
    """Blocks drawn once at random: what any method must beat."""

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "random blocks"
    citation: ClassVar[str] = "none"

    density: float = 0.3
    block: int = 64

    def block_size(self, grid: object) -> tuple[int, int]:
        """Square blocks."""
        return (self.block, self.block)

    def keep_blocks(
        self, query: Tensor, key: Tensor, site: AttentionSite, *, lse: Tensor | None = None
    ) -> Tensor:
        """As many in every row as the others keep."""
        blocks = -(-query.shape[1] // self.block)
        draw = torch.rand(
            query.shape[0],
            query.shape[2],
            blocks,
            blocks,
            generator=torch.Generator().manual_seed(site.layer),
        )
        video = site.grid.whole_blocks(self.block)
        keep = torch.zeros_like(draw, dtype=torch.bool)
        keep[..., video, video] = row_top_k(draw[..., video, video], self.density)
        return keep.to(query.device)
