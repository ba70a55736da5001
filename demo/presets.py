"""A few settings of each method between close to dense and fast."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sparsediff import adapter
from sparsediff.demo.forms import method_fields

# The main parameter close to dense and at its fast end: our guesses, to begin from.
ENDS = {
    "density": (0.5, 0.15),
    "select": (0.5, 0.15),
    "sparsity": (0.5, 0.9),
    "threshold": (-14.0, -5.0),
}


AS_IT_COMES = "as it comes"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Values of a method's parameters; those left out keep their defaults."""

    label: str
    parameters: Mapping[str, object] = field(default_factory=dict)


def presets(method: str, of_model: Iterable[adapter.Preset]) -> tuple[Preset, ...]:
    """What the model's adapter recommends for a method, then the two ends and the middle."""
    found = [
        Preset(label=f"for this model ({p.provenance})", parameters=p.parameters)
        for p in of_model
        if p.method == method
    ]
    main = next(f.name for f in method_fields(method) if f.main)
    as_it_comes = Preset(label=AS_IT_COMES)
    if main not in ENDS:
        return (*found, as_it_comes)
    close, fast = ENDS[main]
    return (
        *found,
        Preset(label="close to dense", parameters={main: close}),
        as_it_comes,
        Preset(label="fast", parameters={main: fast}),
    )
