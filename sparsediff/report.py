"""What a generation did: density, time and every dense call with its reason."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One attention layer over all steps and branches."""

    name: str
    density: float  # area-weighted, dense calls count 1
    heads: tuple[float, ...]  # the same, per head
    steps: tuple[float | None, ...]  # per step of the report; None where the layer was not called
    calls: int
    dense_calls: int


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One denoising step over all layers and branches."""

    step: int
    sigma: float | None
    density: float
    dense_share: float  # share of the calls that ran dense
    seconds: float | None  # time inside the transformer; None if not measured


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """The last generation of an enabled pipeline.

    Attributes:
        density: kept share of attention's token area in [0, 1], over all layers, steps and branches; dense calls
            count 1.
        layers, steps: the same, broken down.
        dense_calls: reason -> how many attention calls ran dense for it.
        backends: kernel that ran -> why it was chosen.
        estimated_speedup: of the denoiser against dense attention, from operation counts and the measured cost of a
            kept block on this kind of device.  An estimate: `sparsediff compare` measures.
        tokens: of one attention call; None if the adapter could not tell.
        attention_share: of self-attention in the transformer's arithmetic, dense; None before a sparse call.
        attention_seconds: inside attention calls, dense ones too, choosing blocks included; None unless
            `handle.recorder.timed` was set before the run.
        mask_seconds: of that, choosing blocks and building their lists.
        budgets: whose budget blocks were chosen by -> how many choices; empty unless the method shares one over layers.
    """

    method: str
    schedule: str
    grid: str
    num_steps: int
    density: float
    layers: tuple[LayerReport, ...]
    steps: tuple[StepReport, ...]
    dense_calls: dict[str, int]
    backends: dict[str, str]
    estimated_speedup: float | None
    tokens: int | None = None
    attention_share: float | None = None
    attention_seconds: float | None = None
    mask_seconds: float | None = None
    budgets: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def calls(self) -> int:
        """Attention calls of the generation."""
        return sum(layer.calls for layer in self.layers)

    def to_dict(self) -> dict[str, object]:
        """Plain types."""
        return dataclasses.asdict(self)

    def to_json(self, *, indent: int | None = 2) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        if not self.calls:
            return f"{self.method}: nothing has run yet"
        lines = [
            f"{self.method}",
            f"  schedule  {self.schedule}",
            f"  tokens    {self.grid}; {self.num_steps} steps, {len(self.layers)} layers, {self.calls} attention calls",
            f"  density   {self.density:.3f} of dense attention over all steps",
        ]
        if self.estimated_speedup is not None:
            lines.append(
                f"  speed     about {self.estimated_speedup:.2f}x in the denoiser (estimate)"
            )
        for name, why in self.backends.items():
            lines.append(f"  kernel    {name}: {why}")
        for whose, count in self.budgets.items():
            lines.append(f"  budget    {whose}: {count} choices of blocks")
        dense = sum(self.dense_calls.values())
        lines.append(f"  dense     {dense} of {self.calls} calls")
        for reason, count in Counter(self.dense_calls).most_common():
            lines.append(f"            {count:6d}  {reason}")
        return "\n".join(lines)
