"""One budget of blocks for all layers of a transformer, spent where blocks score most.

A run serves one layer after the other, so what a block must score to be among the best of all layers has to be known
before the last of them has been seen.  It hardly moves from one step to the next: blocks are sampled in every layer one
step early, and counted by the logarithm of their score.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS_AN_OCTAVE = 32
LOWEST, HIGHEST = -32, 2  # octaves; shares of a softmax lie below 1
BINS = (HIGHEST - LOWEST) * BINS_AN_OCTAVE


class ScoreCounts:
    """What blocks of all layers scored, by guidance branch and sample, in the latest steps that were sampled."""

    def __init__(self) -> None:
        self._counts: dict[str, dict[int, Tensor]] = {}

    def clear(self) -> None:
        """Forget all: a new generation."""
        self._counts.clear()

    def add(self, branch: str, step: int, scores: Tensor) -> None:
        """Count the scores `float32 [B, n]` of one layer in `step`."""
        steps = self._counts.setdefault(branch, {})
        if step not in steps:
            # The step before this one serves the choices of this step.
            for old in sorted(steps)[:-1]:
                del steps[old]
            steps[step] = torch.zeros(len(scores), BINS, dtype=torch.int64, device=scores.device)
        bins = ((scores.log2() - LOWEST) * BINS_AN_OCTAVE).clamp_(0, BINS - 1).long()
        # Integers: the sum does not depend on the order that a GPU takes them in.
        steps[step].scatter_add_(1, bins, torch.ones_like(bins))

    def bar(self, branch: str, step: int, density: float) -> Tensor | None:
        """The score that the best `density` of all blocks reach, `float32 [B]`, by the last step sampled before `step`.

        None if there is none.
        """
        earlier = [s for s in self._counts.get(branch, ()) if s < step]
        if not earlier:
            return None
        counts = self._counts[branch][max(earlier)].flip(-1)
        held = counts.cumsum(-1)
        wanted = density * held[:, -1:]
        whole = (held <= wanted).sum(-1, keepdim=True)  # bins of which all blocks are kept
        before = torch.where(whole > 0, held.gather(-1, (whole - 1).clamp(min=0)), 0)
        size = counts.gather(-1, whole.clamp(max=BINS - 1)).clamp(min=1)
        octave = HIGHEST - (whole + (wanted - before) / size) / BINS_AN_OCTAVE
        octave.masked_fill_(
            whole == BINS, -torch.inf
        )  # whoever wants all blocks gets those of score 0 as well
        return octave.float().exp2()[:, 0]
