"""Which release of diffusers has what: the one that was read, the oldest that passes, and what came in between.

`make matrix` runs the tests in the oldest and in the newest release; `tests/pipelines/test_releases.py` holds the table
below to whichever is installed.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable

# The adapters, the cards and the stock sources they stand on were read in this release, which constraints.txt pins.
REVISION = "0.42.1"
# The oldest that the tests pass in; what pyproject.toml asks for.
FLOOR = "0.38"

# Classes of diffusers, among those the cards name, that came later than the floor.
SINCE = {
    "AnyFlowPipeline": "0.39",
    "AnyFlowTransformer3DModel": "0.39",
    "DiffusionGemmaPipeline": "0.39",
    "LTX2HDRPipeline": "0.39",
    "LTX2InContextPipeline": "0.39",
    "MotifVideoImage2VideoPipeline": "0.39",
    "MotifVideoPipeline": "0.39",
    "MotifVideoTransformer3DModel": "0.39",
    "MiniMaxH3Transformer3DModel": "0.40",
    "LTX2DFRPipeline": "0.41",
    "LTX2DFRTemporalRefinePipeline": "0.41",
    "Flux3Transformer2DModel": "0.42",
    "Kandinsky6TI2VAPipeline": "0.42",
    "Kandinsky6Transformer3DModel": "0.42",
}


def installed() -> str:
    """The version of diffusers that is installed."""
    return importlib.metadata.version("diffusers")


def reaches(first: str, version: str | None = None) -> bool:
    """Whether a release of diffusers (None: the one that is installed) is `first`, such as `"0.40"`, or later."""
    return _release(version or installed()) >= _release(first)


def since(name: str) -> str:
    """The first release, from the floor on, that has a class some card names."""
    return SINCE.get(name, FLOOR)


def family_since(transformer: str, pipelines: Iterable[str]) -> str:
    """The first release that has a family: its transformer, and any pipeline that takes it."""
    first = min(map(since, pipelines), key=_release, default=FLOOR)
    return max(since(transformer), first, key=_release)


def _release(version: str) -> tuple[int, int]:
    """`"0.43.0.dev0"` -> `(0, 43)`: what is on its way to a release counts as that release."""
    major, minor = re.match(r"(\d+)\.(\d+)", version).groups()
    return int(major), int(minor)
