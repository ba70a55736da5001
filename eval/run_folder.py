"""What an evaluation has already written, what it still owes, and whether going on would mix two different runs."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError

from sparsediff.adapter import weight_dtype
from sparsediff.api import model_layout
from sparsediff.calibrator import model_name, weight_marks
from sparsediff.eval.arms import Arm
from sparsediff.eval.clips import Reference
from sparsediff.eval.dense_backends import own_backend
from sparsediff.eval.environment import environment, git_commit
from sparsediff.eval.measure import denoisers
from sparsediff.eval.results import (
    ARMS,
    ArmResult,
    ClipResult,
    Results,
    load_arm,
    replace_clip,
    require_same_run,
    save_arm,
)
from sparsediff.eval.suites import Suite
from sparsediff.eval.typed_json import encode

REFERENCES = "reference"
# Fields of an arm that say what it is; the rest is what came out.
IDENTITY = ("role", "method", "parameters", "schedule", "attention_backend", "calibration", "suite", "suite_version", "model", "revision", "fps", "call", "configuration")  # fmt: skip


class RunFolder:
    """The results of one run on disk; every finished clip is written at once.

    Raises:
        ValueError: the folder holds results of another configuration; the message names what differs.
    """

    def __init__(self, folder: str | Path, blanks: list[ArmResult]) -> None:
        self.folder = Path(folder)
        (self.folder / ARMS).mkdir(parents=True, exist_ok=True)
        self._git_hash = blanks[0].git_hash
        stored = {a.arm: a for a in map(load_arm, sorted((self.folder / ARMS).glob("*.json")))}
        self.arms = {blank.arm: self._resume(blank, stored.get(blank.arm)) for blank in blanks}
        for other in stored.values():
            self._refuse_other_run(other, blanks[0])
        self._indices = {
            clip.key: clip.index for arm in {**stored, **self.arms}.values() for clip in arm.clips
        }

    def index(self, key: tuple[str, int]) -> int:
        """Number of a prompt and seed: the one it has in the folder, else the next."""
        if key not in self._indices:
            self._indices[key] = max(self._indices.values(), default=-1) + 1
        return self._indices[key]

    def lacks(self, arm: str, key: tuple[str, int]) -> bool:
        """Whether this clip is still to be made."""
        return self.arms[arm].clip(key) is None

    def add(self, arm: str, clip: ClipResult) -> None:
        """Write a finished clip."""
        before = self.arms[arm]
        changes: dict[str, object] = {"clips": replace_clip(before, clip).clips}
        if before.git_hash != self._git_hash:
            note = f"clips were made at the commits {before.git_hash} and {self._git_hash}"
            changes |= {"git_hash": self._git_hash, "notes": (*before.notes, note)}
        self.update(arm, **changes)

    def update(self, arm: str, **changes: object) -> None:
        """Write changed fields of an arm."""
        self.arms[arm] = dataclasses.replace(self.arms[arm], **changes)
        save_arm(self.folder, self.arms[arm])

    def reference_path(self, key: tuple[str, int]) -> Path:
        """Where the dense twin of unfinished clips waits."""
        return self.folder / REFERENCES / f"{self.index(key)}.safetensors"

    def load_reference(self, key: tuple[str, int], dense: str) -> Reference | None:
        """The dense twin of a run that was interrupted, if it is there and whole."""
        path, clip = self.reference_path(key), self.arms[dense].clip(key)
        if clip is None or not path.is_file():
            return None
        try:
            return Reference.load(path, clip.frames_sha256)
        except (SafetensorError, KeyError):  # damaged: the dense clip is made again
            return None

    def drop_reference(self, key: tuple[str, int]) -> None:
        """All arms have this clip."""
        self.reference_path(key).unlink(missing_ok=True)
        folder = self.folder / REFERENCES
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    def results(self) -> Results:
        """All arms of the folder, also those of earlier runs."""
        from sparsediff.eval.results import load_results

        return load_results(self.folder)

    def _resume(self, blank: ArmResult, stored: ArmResult | None) -> ArmResult:
        if stored is None:
            return blank
        differ = []
        for name in IDENTITY:
            before, now = encode(getattr(stored, name)), encode(getattr(blank, name))
            if isinstance(before, dict) and isinstance(now, dict):
                differ += [f"{k} (was {before.get(k)!r}, is {now.get(k)!r})" for k in {**before, **now} if before.get(k) != now.get(k)]  # fmt: skip
            elif before != now:
                differ.append(f"{name} (was {before!r}, is {now!r})")
        if differ:
            raise ValueError(
                f"{self.folder} holds clips of {blank.arm} that were made with another {', '.join(differ)}; "
                "choose another --out, or remove the folder to start over"
            )
        return stored

    def _refuse_other_run(self, stored: ArmResult, blank: ArmResult) -> None:
        try:
            require_same_run(stored, blank)
        except ValueError as error:
            raise ValueError(
                f"{self.folder} holds another run: {error}; choose another --out"
            ) from None


def blank_arm(
    arm: Arm,
    pipe: object,
    *,
    suite: Suite,
    call: dict[str, object],
    configuration: dict[str, str],
    model: str,
    fps: int,
    notes: tuple[str, ...],
) -> ArmResult:
    """An arm before its first clip, with everything that its figures depend on."""
    calibration = arm.calibration
    parameters = {} if arm.method is None else _plain(arm.method.parameters())
    blank = ArmResult(
        arm=arm.name,
        label=arm.label,
        role=arm.role,
        suite=suite.name,
        suite_version=suite.version,
        model=model,
        call={name: describe(value) for name, value in call.items()},
        fps=fps,
        revision=getattr(getattr(pipe, "config", None), "_commit_hash", None),
        layout=_layout(pipe),
        method="" if arm.method is None else arm.method.name,
        parameters=parameters,
        schedule="" if arm.schedule is None else str(arm.schedule),
        attention_backend=arm.backend or own_backend(pipe),
        calibration=None if calibration is None else _plain(dict(calibration.provenance)),
        configuration=configuration,
        git_hash=git_commit(),
        environment=environment(pipe._execution_device),
        seeds=suite.seeds,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        notes=notes,
    )
    marks = {name: encode(getattr(blank, name)) for name in IDENTITY}
    text = json.dumps(marks, sort_keys=True)
    return dataclasses.replace(blank, config_hash=hashlib.sha256(text.encode()).hexdigest())


def configuration(pipe: object, metrics: tuple[str, ...], repeats: int) -> dict[str, str]:
    """What must be equal in arms that are compared, in words."""
    found = environment(pipe._execution_device)
    scheduler = getattr(pipe, "scheduler", None)
    settings = dict(getattr(scheduler, "config", {}))
    # Which of them nobody set: a list whose order is another in every process.
    settings.pop("_use_default_values", None)
    settings = json.dumps(settings, sort_keys=True, default=str)
    model = denoisers(pipe)[0]
    return {
        "pipeline": type(pipe).__name__,
        "weights": _short_hash(repr(weight_marks(pipe, model_layout(pipe)))),
        "scheduler": f"{type(scheduler).__name__} {_short_hash(settings)}",
        "dtype": str(weight_dtype(model)).removeprefix("torch."),
        "dense attention backend": own_backend(pipe) or "diffusers' default",
        "metrics": ", ".join(metrics),
        "repeats": str(repeats),
        **{name: found[name] for name in ("device", "threads", "torch", "diffusers", "sparsediff")},
    }


def run_name(pipe: object, model: str) -> str:
    """The model as results call it."""
    return model or model_name(pipe)


def describe(value: object) -> object:
    """A call's argument as JSON holds it; pictures and tensors by their hash."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [describe(v) for v in value]
    if isinstance(value, dict):
        return {str(k): describe(v) for k, v in value.items()}
    if hasattr(value, "numpy"):
        value = value.detach().cpu().float().numpy()
    data = value.tobytes() if hasattr(value, "tobytes") else repr(value).encode()
    return f"{type(value).__name__} {hashlib.sha256(data).hexdigest()[:12]}"


def _plain(values: dict[str, object]) -> dict[str, object]:
    return {str(k): describe(v) for k, v in values.items()}


def _layout(pipe: object) -> dict[str, object]:
    layout = model_layout(pipe)
    return {
        "transformers": dict(layout.transformers),
        "layers": len(layout.layers),
        "heads": layout.heads,
        "head_dim": layout.head_dim,
    }


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
