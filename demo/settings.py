"""What somebody asks the demo for, and the forms it travels in: a form, an address, a command, lines of Python."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from sparsediff.demo.forms import Field, method_fields, schedule_fields
from sparsediff.eval.compare import Request
from sparsediff.eval.models import RANDOM
from sparsediff.pipelines import tiny
from sparsediff.schedule import Schedule

# Names in an address; the rest are `set.NAME` for the method's parameters and `schedule.NAME`.
QUERY = ("prompt", "negative_prompt", "seed", "steps", "guidance", "height", "width", "frames")
TEXTS = ("prompt", "negative_prompt")
SET, SCHEDULE = "set.", "schedule."
# Beyond it a browser cannot tell neighbouring whole numbers apart, and beyond 64 bits the page cannot be sent.
LARGEST_NUMBER = 2**53


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One comparison.

    Attributes:
        request: what to generate.
        method: its name.
        parameters: of the method, those that are not its defaults.
        schedule: fields of a `Schedule`, those that are not its defaults; None takes the method's own schedule.
    """

    request: Request
    method: str = "auto"
    parameters: Mapping[str, object] = field(default_factory=dict)
    schedule: Mapping[str, object] | None = None

    def build_schedule(self) -> Schedule | None:
        """The schedule, if it is not the method's own.

        Raises:
            ValueError, TypeError: a field out of range.
        """
        return None if self.schedule is None else Schedule(**self.schedule)


def changed(fields: tuple[Field, ...], shown: Mapping[str, object]) -> dict[str, object]:
    """What a form says, read; only what differs from the defaults.

    Raises:
        ValueError: something that is no value; the message names the field.
    """
    values = {f.name: f.read(shown[f.name]) for f in fields if f.name in shown}
    return {
        f.name: values[f.name] for f in fields if f.name in values and values[f.name] != f.default
    }


# -- an address -------------------------------------------------------------------------------------------------------


def to_query(settings: Settings) -> dict[str, str]:
    """As query parameters, all text."""
    request = dataclasses.asdict(settings.request)
    query = {name: str(request[name]) for name in QUERY if request[name] not in (None, "")}
    query["method"] = settings.method
    query |= {f"{SET}{name}": _literal(value) for name, value in settings.parameters.items()}
    if settings.schedule is not None:
        shown = settings.schedule or {"dense_steps": 0}
        query |= {f"{SCHEDULE}{name}": repr(value) for name, value in shown.items()}
    return query


def from_query(
    query: Mapping[str, str], defaults: Request, methods: Mapping[str, object]
) -> Settings:
    """What an address asks for; what it leaves out is as in `defaults`.

    Raises:
        ValueError: it asks for something that does not exist or is no number; the message says what.
    """
    changes: dict[str, object] = {}
    for name in QUERY:
        if name not in query:
            continue
        changes[name] = query[name] if name in TEXTS else _number(name, query[name])
    method = query.get("method", "auto")
    if method not in methods:
        raise ValueError(
            f"the address asks for the method {method[:40]!r}; here are {', '.join(methods)}"
        )
    parameters = _group(query, SET, method_fields(method))
    schedule = _group(query, SCHEDULE, schedule_fields())
    has_schedule = any(name.startswith(SCHEDULE) for name in query)
    return Settings(
        request=dataclasses.replace(defaults, **changes),
        method=method,
        parameters=parameters,
        schedule=schedule if has_schedule else None,
    )


def _number(name: str, text: str) -> int | float:
    try:
        number = float(text) if name == "guidance" else int(text)
    except ValueError:
        raise ValueError(f"the address says {name}={text[:40]!r}, which is no number") from None
    if not abs(number) <= LARGEST_NUMBER:  # true of nan, too
        raise ValueError(f"the address says {name}={text[:40]!r}, which is out of all bounds")
    return number


def _group(query: Mapping[str, str], prefix: str, fields: tuple[Field, ...]) -> dict[str, object]:
    texts = {
        name.removeprefix(prefix): text for name, text in query.items() if name.startswith(prefix)
    }
    known = {f.name: f for f in fields}
    if unknown := [name for name in texts if name not in known]:
        raise ValueError(
            f"the address sets {unknown[0][:40]!r}, which is none of {', '.join(known)}"
        )
    shown = {
        name: text == "True" if known[name].kind == "switch" else text
        for name, text in texts.items()
    }
    return changed(fields, shown)


# -- a command and Python -----------------------------------------------------------------------------------------------


def command(settings: Settings, model: str, place: Mapping[str, str | None]) -> str:
    """The `sparsediff compare` command that makes the same comparison."""
    request, words = settings.request, ["sparsediff", "compare", "--model", model]
    for name in QUERY:
        value = getattr(request, name)
        if value is not None and value != "":
            words += [f"--{name.replace('_', '-')}", str(value)]
    words += ["--method", settings.method]
    for name, value in settings.parameters.items():
        words += ["--set", f"{name}={_literal(value)}"]
    for name, value in (settings.schedule if settings.schedule is not None else {}).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    if settings.schedule == {}:
        words += ["--dense-steps", "0"]
    for name, value in place.items():
        if value is not None:
            words += [f"--{name}", value]
    return shlex.join(words)


def python_lines(
    settings: Settings, model: str, place: Mapping[str, str | None], *, output: str = "frames"
) -> str:
    """The lines of Python that make the sparse clip; `output`: what the pipeline calls it, `frames` or `images`."""
    request = settings.request
    call = {name: value for name, value in request.arguments().items() if name != "generator"}
    call = [f"{name}={value!r}" for name, value in call.items()]
    enable = [repr(settings.method)]
    if settings.schedule is not None:
        inside = ", ".join(f"{name}={value!r}" for name, value in settings.schedule.items())
        enable.append(f"schedule=sparsediff.Schedule({inside})")
    if place.get("calibration"):
        enable.append(f"calibration={place['calibration']!r}")
    enable += [f"{name}={value!r}" for name, value in settings.parameters.items()]
    call.append(f"generator=torch.Generator('cpu').manual_seed({request.seed})")
    arguments = "".join(f"    {argument},\n" for argument in call)
    return "\n".join(
        [
            "import sparsediff, torch",
            *_loading(model, place),
            f"handle = sparsediff.enable(pipe, {', '.join(enable)})",
            f"{'video' if output == 'frames' else output} = pipe(\n{arguments}).{output}",
            "print(handle.summary())",
        ]
    )


def _loading(model: str, place: Mapping[str, str | None]) -> list[str]:
    device, dtype = place.get("device") or "cpu", place.get("dtype") or "float32"
    if model == RANDOM:
        return [
            "from sparsediff.testing import random_wan_pipeline",
            f"pipe = random_wan_pipeline().to({device!r}, torch.{dtype})",
        ]
    if model in tiny.MODELS:
        return [
            f"pipe = sparsediff.pipelines.tiny.load({model!r}, torch_dtype=torch.{dtype}, device={device!r})"
        ]
    return [
        "from diffusers import DiffusionPipeline",
        f"pipe = DiffusionPipeline.from_pretrained({model!r}, {tiny.dtype_keyword()}=torch.{dtype}).to({device!r})",
    ]


def _literal(value: object) -> str:
    """Text that both a form and `--set` read back: plain words bare, all else as Python."""
    return value if isinstance(value, str) else repr(value)
