"""Frozen dataclasses to JSON and back, checked against their annotations."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Literal, TypeVar

T = TypeVar("T")


def encode(x: object) -> object:
    """Plain JSON types; numbers that JSON lacks become "inf", "-inf", "nan"."""
    if dataclasses.is_dataclass(x):
        return {f.name: encode(getattr(x, f.name)) for f in dataclasses.fields(x)}
    if isinstance(x, dict):
        return {str(k): encode(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [encode(v) for v in x]
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    if x is None or isinstance(x, bool | int | float | str):
        return x
    raise TypeError(f"{type(x).__name__} has no place in JSON")


def decode(kind: type[T], x: object, where: str) -> T:
    """`x` as `kind`.

    Raises:
        ValueError: it is not; the message says `where`, down to the field.
    """
    if dataclasses.is_dataclass(kind):
        return _decode_record(kind, x, where)
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if x is None and type(None) in inside:
            return None
        (kind,) = (k for k in inside if k is not type(None))
        return decode(kind, x, where)
    if origin is Literal and x in inside:
        return x
    if origin is tuple and isinstance(x, list):
        return tuple(decode(inside[0], v, f"{where}[{i}]") for i, v in enumerate(x))
    if origin is dict and isinstance(x, dict):
        return {k: decode(inside[1], v, f"{where}.{k}") for k, v in x.items()}
    if kind is object:
        return x
    if kind is float and x in ("inf", "-inf", "nan"):
        return float(x)
    if kind is float and isinstance(x, int | float) and not isinstance(x, bool):
        return float(x)
    if origin is None and kind is not float and type(x) is kind:
        return x
    name = getattr(kind, "__name__", str(kind)) if origin is None else str(kind)
    raise ValueError(f"{where} must be {name}, got {x!r:.60}")


def _decode_record(kind: type[T], x: object, where: str) -> T:
    if not isinstance(x, dict):
        raise ValueError(f"{where} must be an object, got {x!r:.60}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(x.keys() - fields.keys()):
        raise ValueError(f"{where} has unknown fields: {', '.join(unknown)}")
    required = [
        n
        for n, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing := [n for n in required if n not in x]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    values = {n: decode(hints[n], v, f"{where}: {n}") for n, v in x.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
