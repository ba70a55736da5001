"""One budget of blocks for all layers of a transformer, spent where blocks score most.

A run serves one layer after the other, so what a block must score to be among the best of all layers has to be known
before the last of them has been seen.  It hardly moves from one step to the next: blocks are sampled in every layer one
step early, and counted by the logarithm of their score.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsediff.methods import AttentionSite
from sparsediff.token_grid import TokenGrid

BINS_AN_OCTAVE = 32
LOWEST, HIGHEST = -32, 2  # octaves; shares of a softmax lie below 1
BINS = (HIGHEST - LOWEST) * BINS_AN_OCTAVE


@dataclass
class _Step:
    counts: Tensor  # int64 [B, BINS]
    grids: dict[str, TokenGrid] = field(default_factory=dict)  # of each layer that was sampled


class ScoreCounts:
    """What blocks of all layers scored, by guidance branch and sample, in the latest steps that were sampled."""

    def __init__(self) -> None:
        # Another batch is another matter: guidance may end in mid-run.
        self._steps: dict[tuple[str, int], dict[int, _Step]] = {}

    def clear(self) -> None:
        """Forget all: a new generation."""
        self._steps.clear()

    def add(self, site: AttentionSite, scores: Tensor, *, rows: int = 1) -> None:
        """Count the scores `float32 [B, n]` of a call, each standing for so many `rows` of blocks."""
        batch, device = len(scores), scores.device
        steps = self._steps.setdefault((site.branch, batch), {})
        if site.step not in steps:
            # The step before this one serves the choices of this step.
            for old in sorted(steps)[:-1]:
                del steps[old]
            zeros = torch.zeros(batch, BINS, dtype=torch.int64, device=device)
            steps[site.step] = _Step(zeros)
        step = steps[site.step]
        step.grids[site.name] = site.grid
        bins = (scores.log2() - LOWEST) * BINS_AN_OCTAVE
        bins = bins.nan_to_num_(0).clamp_(0, BINS - 1).long()
        # Integers: the sum does not depend on the order that a GPU takes them in.
        step.counts.scatter_add_(1, bins, torch.full_like(bins, rows))

    def bar(self, site: AttentionSite, batch: int, density: float) -> Tensor | None:
        """The score that the best `density` of all blocks reach, `float32 [B]`, by the last step sampled before `site`.

        A cache may leave layers out of a step: what the others score says nothing of them, and a step that had more layers
        says more.  None if this layer was sampled in no step before, or saw other tokens then.
        """
        steps = self._steps.get((site.branch, batch), {})
        earlier = [
            (len(step.grids), when)
            for when, step in steps.items()
            if when < site.step and step.grids.get(site.name) == site.grid
        ]
        if not earlier:
            return None
        step = steps[max(earlier)[1]]
        counts = step.counts.flip(-1)
        held = counts.cumsum(-1)
        wanted = density * held[:, -1:]
        whole = (held <= wanted).sum(-1, keepdim=True)  # bins of which all blocks are kept
        before = torch.where(whole > 0, held.gather(-1, (whole - 1).clamp(min=0)), 0)
        size = counts.gather(-1, whole.clamp(max=BINS - 1)).clamp(min=1)
        octave = HIGHEST - (whole + (wanted - before) / size) / BINS_AN_OCTAVE
        # Whoever wants all blocks gets those of score 0 as well.
        octave.masked_fill_(whole == BINS, -torch.inf)
        return octave.float().exp2()[:, 0]
