"""Training-free sparse attention for diffusers pipelines, with a stated error.

```python
import sparsediff
handle = sparsediff.enable(pipe)      # one line; `handle.disable()` restores the pipeline exactly
video = pipe(prompt).frames
print(handle.summary())
```
"""

import importlib as _importlib
from pathlib import Path as _Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsediff.api import Handle, disable, enable, list_methods
    from sparsediff.block_mask import BlockMask
    from sparsediff.calibration import Calibration
    from sparsediff.calibrator import calibrate
    from sparsediff.methods import (
        AdaSpa,
        AttentionSite,
        Auto,
        Custom,
        DraftAttention,
        LiteAttention,
        Method,
        PAROAttention,
        SparseD,
        SparseVDiT,
    )
    from sparsediff.report import RunReport
    from sparsediff.schedule import Schedule
    from sparsediff.state import RunState
    from sparsediff.token_grid import Segment, TokenGrid, TokenOrder

__version__ = "0.1.0"

# In a checkout the sub-packages are sibling folders (kernels/, pipelines/, eval/, demo/);
# in a wheel they already sit inside this one.  docs/adr/0001-layout.md says why.
_checkout = _Path(__file__).resolve().parents[1]
if (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))

# Public name -> module.  Resolved on first use, so that `import sparsediff` imports neither torch nor diffusers.
_EXPORTS = {
    "enable": "sparsediff.api",
    "disable": "sparsediff.api",
    "calibrate": "sparsediff.calibrator",
    "Calibration": "sparsediff.calibration",
    "list_methods": "sparsediff.api",
    "Handle": "sparsediff.api",
    "BlockMask": "sparsediff.block_mask",
    "AttentionSite": "sparsediff.methods",
    "AdaSpa": "sparsediff.methods",
    "Auto": "sparsediff.methods",
    "Custom": "sparsediff.methods",
    "PAROAttention": "sparsediff.methods",
    "SparseD": "sparsediff.methods",
    "SparseVDiT": "sparsediff.methods",
    "DraftAttention": "sparsediff.methods",
    "LiteAttention": "sparsediff.methods",
    "Method": "sparsediff.methods",
    "RunReport": "sparsediff.report",
    "Schedule": "sparsediff.schedule",
    "RunState": "sparsediff.state",
    "Segment": "sparsediff.token_grid",
    "TokenGrid": "sparsediff.token_grid",
    "TokenOrder": "sparsediff.token_grid",
}

__all__ = [
    "AdaSpa",
    "AttentionSite",
    "Auto",
    "BlockMask",
    "Calibration",
    "Custom",
    "DraftAttention",
    "Handle",
    "LiteAttention",
    "Method",
    "PAROAttention",
    "RunReport",
    "RunState",
    "Schedule",
    "Segment",
    "SparseD",
    "SparseVDiT",
    "TokenGrid",
    "TokenOrder",
    "calibrate",
    "disable",
    "enable",
    "list_methods",
]


def _lazy(package: str, exports: dict[str, str]):
    """Return a module-level `__getattr__` (PEP 562) that imports `exports[name]` on first use."""

    def __getattr__(name: str):
        if name not in exports:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(_importlib.import_module(exports[name]), name)
        setattr(_importlib.import_module(package), name, value)
        return value

    return __getattr__


__getattr__ = _lazy(__name__, _EXPORTS)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


# `sparsediff.kernels` has no __init__.py (a folder named kernels/ with one would shadow Hugging Face's library of
# that name), so its public operations are named here.
_kernels = _importlib.import_module("sparsediff.kernels")
_kernels.__getattr__ = _lazy(
    "sparsediff.kernels",
    {
        "block_sparse_attention": "sparsediff.kernels.attention",
        "attend_blocks": "sparsediff.kernels.attention",
        "AttentionOutput": "sparsediff.kernels.attention",
        "available_backends": "sparsediff.kernels.attention",
        "merge_attention": "sparsediff.kernels.merge",
    },
)

_importlib.import_module(
    "sparsediff.pipelines.tiny"
)  # light; so that sparsediff.pipelines.tiny.load needs no import
