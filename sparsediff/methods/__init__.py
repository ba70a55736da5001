"""Published ways to choose blocks, by name."""

from __future__ import annotations

import difflib
from dataclasses import fields

from sparsediff.methods.adaspa import AdaSpa as AdaSpa
from sparsediff.methods.auto import Auto as Auto
from sparsediff.methods.base import AttentionSite as AttentionSite
from sparsediff.methods.base import CalibratedMethod as CalibratedMethod
from sparsediff.methods.base import Method as Method
from sparsediff.methods.custom import Custom as Custom
from sparsediff.methods.draft_attention import DraftAttention as DraftAttention
from sparsediff.methods.lite_attention import LiteAttention as LiteAttention
from sparsediff.methods.paro_attention import PAROAttention as PAROAttention
from sparsediff.methods.sparse_d import SparseD as SparseD
from sparsediff.methods.sparse_vdit import SparseVDiT as SparseVDiT

METHODS: dict[str, type[Method]] = {
    cls.name: cls
    for cls in (
        Auto,
        LiteAttention,
        DraftAttention,
        SparseD,
        PAROAttention,
        SparseVDiT,
        AdaSpa,
        Custom,
    )
}


def build_method(method: str | Method, **params: object) -> Method:
    """Turn a name and parameters into a method; a ready-made method passes through.

    Raises:
        ValueError: unknown name or parameter (the message lists the valid ones and the nearest), or a value out of
            range.
        TypeError: parameters beside a ready-made method.
    """
    if isinstance(method, Method):
        if params:
            raise TypeError(
                f"{method.name} is already configured; set {', '.join(params)} when making it, "
                f"for example {type(method).__name__}({next(iter(params))}=...)"
            )
        return method
    if isinstance(method, type) and issubclass(method, Method):
        raise TypeError(f"method is the class {method.__name__}; make one: {method.__name__}(...)")
    if not isinstance(method, str):
        raise TypeError(f"method must be a name or a Method, got {type(method).__name__}")
    if method not in METHODS:
        raise ValueError(
            f"unknown method {method!r}{_nearest(method, METHODS)}; known: {', '.join(METHODS)}"
        )
    cls = METHODS[method]
    known = [f.name for f in fields(cls) if f.repr]  # a calibration is no parameter
    for name in params:
        if name not in known:
            raise ValueError(
                f"{method} has no parameter {name!r}{_nearest(name, known)}; its parameters: {', '.join(known)}"
            )
    return cls(**params)


def _nearest(name: str, known) -> str:
    close = [k for k in known if name and k.startswith(name)] or difflib.get_close_matches(
        name, list(known), n=1
    )
    return f" (did you mean {close[0]!r}?)" if close else ""
