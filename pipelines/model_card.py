"""What there is to know about one model family before enabling it."""

from __future__ import annotations

from dataclasses import dataclass

from sparsediff.pipelines.releases import family_since, installed, reaches

# How guidance branches come.
SEQUENTIAL, BATCHED = "one after the other", "in one batch"


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """One transformer class and who runs it.

    Attributes:
        family: what people call it.
        transformer: its class.
        pipelines: those of diffusers that take it.
        tokens: of one eligible attention call, in order.
        guidance: how its branches come: `"one after the other"`, `"in one batch"`, ...
        checked: names of its members in the conformance tests, or of a test module of its own.
        real: what was run at its real size.
        note: what to know beside that.
    """

    family: str
    transformer: str
    pipelines: tuple[str, ...]
    tokens: str
    guidance: str
    checked: tuple[str, ...]
    real: str = "not yet"
    note: str = ""

    @property
    def since(self) -> str:
        """The first release of diffusers that has it."""
        return family_since(self.transformer, self.pipelines)

    @property
    def lacking(self) -> str:
        """Why the installed diffusers does not have it; empty where it does."""
        if reaches(self.since):
            return ""
        return f"{self.family} came with diffusers {self.since}, this is {installed()}; pip install -U diffusers"
