"""What a page can ask about a method: one field a parameter, read off the method's dataclass.

Types come from the annotations, help from the docstrings, and bounds from the class itself: it is asked which values it
accepts, so that a form never disagrees with the checks that `enable` makes.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sparsediff.methods import METHODS, CalibratedMethod, Method
from sparsediff.schedule import Schedule

# The parameter that trades quality for speed, by the names that methods give it.
MAIN = ("density", "sparsity", "select", "threshold")
AUTOMATIC = "automatic"
FEW = 8  # accepted whole numbers up to which they are offered one by one
HELP_CHARACTERS = 170
REFUSALS = (ValueError, TypeError)


@dataclass(frozen=True, kw_only=True)
class Field:
    """One parameter as a form shows it.

    Attributes:
        name: of the parameter.
        kind: a slider, a list to choose from, a switch, or a Python value written out.
        default: of the dataclass.
        help: what it means, from the docstring.
        low, high, step: of a slider.
        whole: whether a slider takes whole numbers only.
        choices: text -> value, of a list.
        main: whether it is the one that most people want to change.
    """

    name: str
    kind: Literal["slider", "choice", "switch", "text"]
    default: object
    help: str
    low: float = 0.0
    high: float = 0.0
    step: float = 0.0
    whole: bool = False
    choices: Mapping[str, object] = dataclasses.field(default_factory=dict)
    main: bool = False

    def show(self, value: object) -> object:
        """A value of the parameter as the form's widget holds it."""
        if self.kind == "choice":
            return next((t for t, v in self.choices.items() if v == value), _text(value))
        return repr(value) if self.kind == "text" else value

    def read(self, shown: object) -> object:
        """What the form's widget holds as a value of the parameter.

        Raises:
            ValueError: it is none; the message names the field and says what to write.
        """
        if shown is None or shown == "":
            return self.default
        if self.kind == "choice":
            # An address and a command name the value where the list has a word for it.
            words = {str(value): value for value in self.choices.values()} | dict(self.choices)
            if shown not in words:
                raise ValueError(f"{self.name} must be one of {', '.join(self.choices)}, got {shown!r}")  # fmt: skip
            return words[shown]
        if self.kind == "switch":
            return bool(shown)
        if self.kind == "slider":
            return self._number(shown)
        try:
            return ast.literal_eval(str(shown))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ValueError(
                f"{self.name} takes a Python value such as {self.default!r}, got {str(shown)[:60]!r}"
            ) from None

    def _number(self, shown: object) -> int | float:
        try:
            number = float(shown)
        except (TypeError, ValueError):
            raise ValueError(f"{self.name} must be a number, got {str(shown)[:60]!r}") from None
        if not math.isfinite(number) or (self.whole and number != round(number)):
            raise ValueError(f"{self.name} must be a {'whole' if self.whole else 'finite'} number, got {shown}")  # fmt: skip
        # Sliders add up their steps in binary; nobody chose 0.30000000000000004.
        number = round(number) if self.whole else round(number, 6)
        if not self.low <= number <= self.high:
            raise ValueError(
                f"{self.name} lies between {self.low} and {self.high} on this page, got {str(shown)[:60]}"
            )
        return number


def offered_methods(calibrated: frozenset[str] = frozenset()) -> dict[str, type[Method]]:
    """Methods that can run here: those that need no calibration, and those that have one."""
    return {
        name: cls
        for name, cls in METHODS.items()
        if not needs_calibration(cls) or name in calibrated
    }


def needs_calibration(cls: type[Method]) -> bool:
    """Whether a method cannot run before it was measured."""
    return issubclass(cls, CalibratedMethod) and cls.needs_calibration


@functools.cache
def method_fields(name: str) -> tuple[Field, ...]:
    """The parameters of a method, the main one first."""
    fields = _fields(METHODS[name])
    main = next((n for n in MAIN if any(f.name == n for f in fields)), fields[0].name)
    fields = [dataclasses.replace(f, main=f.name == main) for f in fields]
    return tuple(sorted(fields, key=lambda f: not f.main))


@functools.cache
def schedule_fields() -> tuple[Field, ...]:
    """The parameters of a `Schedule`."""
    return tuple(_fields(Schedule))


def _fields(cls: type) -> list[Field]:
    hints, helps = typing.get_type_hints(cls), docstring_attributes(cls)
    return [
        _field(cls, f.name, hints[f.name], f.default, helps.get(f.name, ""))
        for f in dataclasses.fields(cls)
        if f.repr
    ]


def _field(cls: type, name: str, hint: object, default: object, text: str) -> Field:
    about = {"name": name, "default": default, "help": text}
    inner, optional = _without_none(hint)
    if inner is bool:
        return Field(kind="switch", **about)
    if typing.get_origin(inner) is Literal:
        return Field(kind="choice", choices={str(v): v for v in typing.get_args(inner)}, **about)
    if inner is int:
        accepted = [n for n in range(257) if accepts(cls, name, n)]
        if optional or len(accepted) <= FEW:
            choices = {AUTOMATIC: None} if optional else {}
            about["help"] = re.sub(r"\bNone\b", AUTOMATIC, text)
            accepted = [n for n in accepted if n or not optional]
            return Field(kind="choice", choices=choices | {str(n): n for n in accepted}, **about)
        high = min(accepted[-1], max(16, 4 * default))
        return Field(kind="slider", low=accepted[0], high=high, step=1, whole=True, **about)
    if inner is float and not optional:
        low, high, step = _float_bounds(cls, name, default)
        return Field(kind="slider", low=low, high=high, step=step, **about)
    return Field(kind="text", **about)


def _without_none(hint: object) -> tuple[object, bool]:
    """`X | None` as `X` and whether there was a None; other unions stay as they are."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        if len(inner) == 1:
            return inner[0], len(inner) < len(typing.get_args(hint))
    return hint, False


def accepts(cls: type, name: str, value: object) -> bool:
    """Whether the class takes this value, all else being as it comes."""
    try:
        cls(**{name: value})
    except REFUSALS:
        return False
    return True


def _float_bounds(cls: type, name: str, default: float) -> tuple[float, float, float]:
    """The part of what the class accepts that a slider should cover."""
    if accepts(cls, name, -1.0) and not accepts(cls, name, 1.0):
        return min(-20.0, 2 * default), -0.1, 0.1
    high = 1.0 if not accepts(cls, name, 2.0) else max(1.0, 4 * abs(default))
    low = 0.0 if not accepts(cls, name, -1.0) else -high
    step = 0.01 if high <= 1.0 else 0.1
    # Ends that are open, or that another parameter's default rules out, move inwards.
    count = round((high - low) / step)
    inside = [low + i * step for i in range(count + 1)]
    first = next(x for x in inside if accepts(cls, name, round(x, 6)))
    last = next(x for x in reversed(inside) if accepts(cls, name, round(x, 6)))
    return round(first, 6), round(last, 6), step


def docstring_attributes(cls: type) -> dict[str, str]:
    """The first sentences of the `Attributes:` section, of the class and of those that it extends."""
    found: dict[str, str] = {}
    for part in reversed(cls.__mro__[:-1]):
        section = re.search(
            r"^    Attributes:\n(.*?)(?:\n\s*\n|\Z)", part.__doc__ or "", re.M | re.S
        )
        if section is None:
            continue
        entries = re.split(r"^        (?=\w[\w, ]*: )", section[1], flags=re.M)
        for entry in filter(str.strip, entries):
            names, _, text = entry.partition(": ")
            for name in names.split(","):
                found[name.strip()] = _sentences(" ".join(text.split()))
    return found


def _sentences(text: str) -> str:
    """The first sentence, and more while it is short."""
    said = ""
    for sentence in re.split(r"(?<=[.:)]) +(?=[A-Z`(])", text.replace("`", "")):
        if said and len(said) + len(sentence) > HELP_CHARACTERS:
            break
        said += (" " if said else "") + sentence
    return said.rstrip(" :")


def _text(value: object) -> str:
    return AUTOMATIC if value is None else str(value)
