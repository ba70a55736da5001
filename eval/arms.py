"""The settings that are compared: the stock pipeline, its best dense backend, methods, and random blocks as a floor."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import sparsediff
from sparsediff.api import Handle, with_calibration
from sparsediff.calibration import Calibration
from sparsediff.eval.dense_backends import attention_backend
from sparsediff.eval.literals import parse_settings, split_outside_brackets
from sparsediff.eval.measure import warm_up
from sparsediff.eval.random_blocks import Random
from sparsediff.eval.results import Role
from sparsediff.methods import (  # fmt: skip
    AdaSpa,
    CalibratedMethod,
    Custom,
    DraftAttention,
    Method,
    PAROAttention,
    SparseD,
    SparseVDiT,
    build_method,
)
from sparsediff.schedule import Schedule

RANDOM = "random"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One setting.

    Attributes:
        role: what it is for.
        label: for people.
        method: None for dense arms.
        schedule: None for dense arms.
        backend: diffusers' name of the attention backend; None leaves the pipeline's own, which the dense steps of all
            other arms run on.
    """

    role: Role
    label: str
    method: Method | None = None
    schedule: Schedule | None = None
    backend: str | None = None

    @property
    def name(self) -> str:
        """The label as an identifier that can name a file."""
        return re.sub(r"[^A-Za-z0-9_.=+-]+", "-", self.label).strip("-.")

    @property
    def calibration(self) -> Calibration | None:
        """Of the method, if it has one."""
        return self.method.calibration if isinstance(self.method, CalibratedMethod) else None

    @contextlib.contextmanager
    def entered(self, pipe: object, *, schedule: Schedule | None = None) -> Iterator[Handle | None]:
        """The pipeline in this setting, as it was afterwards; `schedule` in the place of the arm's own, for warming up."""
        if self.method is not None:
            with sparsediff.enable(pipe, self.method, schedule=schedule or self.schedule) as handle:
                yield handle
        elif self.backend is not None:
            with attention_backend(pipe, self.backend):
                yield None
        else:
            yield None

    def warm_up(self, pipe: object, arguments: dict[str, object], *, decode: bool = False) -> float:
        """Run few steps of a call in this setting whose time nobody counts; returns their seconds.

        One step is dense and chooses blocks beside its attention, one is sparse.  On a GPU kernels are compiled then, so
        blocks are chosen there without a dense call too, as methods do that choose again in the middle of a run.

        Args:
            decode: as `sparsediff.eval.measure.warm_up`.
        """
        schedules = [Schedule(dense_steps=1)]
        if self.method is not None and pipe._execution_device.type == "cuda":
            schedules.append(Schedule())
        seconds = 0.0
        for schedule in schedules:
            with self.entered(pipe, schedule=schedule):
                seconds += warm_up(pipe, arguments, decode=decode)
            decode = False
        return seconds


DENSE = Arm(role="dense", label="dense")


def sparse_arm(
    method: str | Method,
    *,
    calibration: Calibration | str | Path | None = None,
    **settings: object,
) -> Arm:
    """An arm by its method; the label names what was set and what differs from the defaults.

    Args:
        method: a name, `random`, or a configured `Method`.
        calibration: as `sparsediff.enable` takes it.
        settings: parameters of the method and fields of `Schedule`, whose names never meet.

    Raises:
        ValueError, TypeError, OSError: as `sparsediff.enable`.
    """
    when = {f.name: settings.pop(f.name) for f in fields(Schedule) if f.name in settings}
    built = _random(settings) if method == RANDOM else build_method(method, **settings)
    built = with_calibration(
        built, calibration, None if isinstance(method, Method) else frozenset(settings)
    )
    schedule = replace(built.default_schedule(), **when)
    shown = {
        f.name: getattr(built, f.name)
        for f in fields(built)
        if f.repr and (f.name in settings or getattr(built, f.name) != f.default)
    }
    shown |= when
    if calibration is not None:
        shown["calibration"] = _calibration_name(calibration)
    label = " ".join([built.name, ", ".join(f"{k}={v}" for k, v in shown.items())]).strip()
    role = RANDOM if built.name == RANDOM else "sparse"
    return Arm(role=role, label=label, method=built, schedule=schedule)


def parse_arm(text: str) -> Arm:
    """`auto`, `auto:density=0.3`, `lite_attention:threshold=-1,tile=(64,64),dense_steps=2`, `paro_attention:calibration=FOLDER`.

    Raises:
        ValueError, TypeError, OSError: as `sparse_arm`, and for what cannot be read.
    """
    name, _, rest = text.partition(":")
    settings = parse_settings(split_outside_brackets(rest), f"--arm {name}:")
    return sparse_arm(name.strip(), **settings)


def asked_density(method: str, parameters: dict[str, object]) -> float | None:
    """The density of sparse calls that the parameters of a method state; None for methods steered otherwise."""
    by_name = {
        AdaSpa.name: lambda p: 1 - p["sparsity"],
        DraftAttention.name: lambda p: 1 - p["sparsity"],
        SparseD.name: lambda p: p["select"],
        PAROAttention.name: lambda p: p["density"],
        SparseVDiT.name: lambda p: p["density"],
        Custom.name: _custom_density,
        "auto": _custom_density,
        RANDOM: lambda p: p["density"],
    }
    return by_name[method](parameters) if method in by_name else None


def random_twin(arm: Arm) -> Arm | None:
    """Random blocks at the density that the arm asks for, under its schedule; None if it states none."""
    density = asked_density(arm.method.name, arm.method.parameters())
    if density is None or arm.role != "sparse":
        return None
    block = arm.method.parameters().get("block")
    twin = sparse_arm(RANDOM, density=density, **({"block": block} if block else {}))
    return replace(twin, schedule=arm.schedule, label=f"random as {arm.label}")


def check_arms(pipe: object, arms: Sequence[Arm]) -> None:
    """Refuse what cannot run, before anything does.

    Raises:
        ValueError: two arms of one name, or what `sparsediff.enable` refuses.
    """
    names = [arm.name for arm in arms]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"two arms are alike: {', '.join(twice)}; leave one out")
    for arm in arms:
        with arm.entered(pipe):
            pass


def _custom_density(parameters: dict[str, object]) -> float | None:
    # A budget of mass, or a vote on the way, reaches what density it reaches.
    steered = (
        parameters.get("budget") == "row_top_p" or parameters.get("vote_threshold_log2") is not None
    )
    return None if steered else parameters["density"]


def _random(parameters: dict[str, object]) -> Method:
    known = [f.name for f in fields(Random)]
    if unknown := [n for n in parameters if n not in known]:
        raise ValueError(
            f"{RANDOM} has no parameter {unknown[0]!r}; its parameters: {', '.join(known)}"
        )
    return Random(**parameters)


def _calibration_name(calibration: Calibration | str | Path) -> str:
    return Path(calibration).name if isinstance(calibration, str | Path) else "given"
