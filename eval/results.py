"""What an evaluation leaves behind: typed, versioned, one JSON file an arm.

    FOLDER/arms/<arm>.json               an `ArmResult`
    FOLDER/clips/<arm>/<index>.mp4       what people look at; metrics are taken before this lossy file is written
    FOLDER/captures/<arm>.safetensors    block masks, where they were asked for

Clips of different arms belong together by prompt and seed.  Numbers that JSON lacks are written as the strings "inf",
"-inf" and "nan": the PSNR of identical clips is infinite.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sparsediff.eval.metric_names import METRICS as METRICS
from sparsediff.eval.typed_json import decode, encode

SCHEMA_VERSION = 1
ARMS, CLIPS, CAPTURES = "arms", "clips", "captures"
DAMAGED = "delete that file and run the evaluation again, which makes only its clips anew"

# dense: the stock pipeline, which every other arm is compared with.  dense-best: the fastest exact dense attention
# backend of this machine.  sparse: a method.  random: blocks drawn at the density of a method, its floor.
Role = Literal["dense", "dense-best", "sparse", "random"]
ROLES = ("dense", "dense-best", "sparse", "random")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Seconds of repeated runs, in the order they were made."""

    samples: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError("a time needs at least one sample")

    @property
    def median(self) -> float:
        """The middle sample; of an even number the mean of the middle two."""
        ordered, half = sorted(self.samples), len(self.samples) // 2
        return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2

    @property
    def low(self) -> float:
        """The fastest."""
        return min(self.samples)

    @property
    def high(self) -> float:
        """The slowest."""
        return max(self.samples)


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds of one clip; None for what was not measured.

    Attributes:
        total: the whole call of the pipeline, by the wall clock after the device has finished.
        denoiser: inside the transformers, over all steps and guidance branches.
        attention: inside the self-attention calls that can be sparse, choosing blocks included; part of `denoiser`.
        mask: choosing blocks and building their lists; part of `attention`.
        text: before the first call of the transformer: encoding the prompt, preparing the noise.
        decode: after the last call of the transformer: the autoencoder.
    """

    total: Spread
    denoiser: Spread
    attention: Spread | None = None
    mask: Spread | None = None
    text: Spread | None = None
    decode: Spread | None = None


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One denoising step; None for what was not measured.

    Attributes:
        step: from 0.
        sigma: noise level in [0, 1].
        density: over the step's attention calls, dense ones count 1.
        dense_share: share of the calls that ran dense.
        seconds: inside the transformer.
        latent_divergence: relative L2 distance of the latents after this step from the dense arm's.
        attention_error: relative L1 distance of attention outputs from dense attention on the same inputs, mean over
            the sampled layers.
    """

    step: int
    sigma: float | None = None
    density: float | None = None
    dense_share: float | None = None
    seconds: float | None = None
    latent_divergence: float | None = None
    attention_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class LayerResult:
    """One attention layer.

    Attributes:
        name: as `component.module`.
        steps: density at every step of the clip, in the order of `ClipResult.steps`; None where the layer was not
            called (a second expert, a cache).
        heads: density of each head over all steps.
        calls, dense_calls: attention calls, and how many of them ran dense.
    """

    name: str
    steps: tuple[float | None, ...]
    heads: tuple[float, ...]
    calls: int
    dense_calls: int


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What operation counts predict, to stand beside what was measured.

    Attributes:
        tokens: of one attention call.
        attention_share: of self-attention in the transformer's arithmetic, dense.
        density: over all steps.
        speedup: predicted dense denoiser time over this arm's; None where work is so little that launching it takes
            longer, and arithmetic predicts nothing.
    """

    tokens: int
    attention_share: float
    density: float
    speedup: float | None


@dataclass(frozen=True, kw_only=True)
class ClipResult:
    """One clip of one arm.

    Attributes:
        index: number of the (prompt, seed) pair, the same in all arms of a folder; names the video file.
        metrics: name in `METRICS` -> value over the clip.
        frame_curves: name in `METRICS` -> value of each frame (of each pair of consecutive frames for `flicker` and
            `warping_error`, one fewer).
        density: over all layers, steps and branches; dense calls count 1.
        dense_calls: reason -> number of attention calls that ran dense for it.
        backends: attention kernel -> why it ran.
        video: path of the MP4 file relative to the folder; None if none was written.
        shape: frames, height, width in pixels.
        contrast: standard deviation of the clip's values in [0, 1]; a picture of one colour has none.
        peak_memory_bytes: on the device (CUDA: allocated by torch; CPU: resident memory of the process).
        energy_joules: of the whole device while the clip was made, as its driver counts.
        latents_sha256: of what the transformer was given at the first step: arms that share seed and prompt share it.
        frames_sha256: of the frames before encoding: equal only for identical clips.
    """

    index: int
    prompt: str
    seed: int
    timings: Timings
    density: float = 1.0
    metrics: dict[str, float] = field(default_factory=dict)
    frame_curves: dict[str, tuple[float, ...]] = field(default_factory=dict)
    steps: tuple[StepResult, ...] = ()
    layers: tuple[LayerResult, ...] = ()
    forecast: Forecast | None = None
    dense_calls: dict[str, int] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    energy_joules: float | None = None
    video: str | None = None
    shape: tuple[int, ...] = ()
    contrast: float | None = None
    latents_sha256: str = ""
    frames_sha256: str = ""

    @property
    def key(self) -> tuple[str, int]:
        """What pairs clips of different arms."""
        return (self.prompt, self.seed)


@dataclass(frozen=True, kw_only=True)
class Check:
    """Outcome of a self-check.

    Attributes:
        name: which check, as in `sparsediff.eval.checks`.
        passed: False: the figures it guards are not to be trusted as they stand; None: it could not be made.
        detail: one sentence with the numbers.
    """

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """One setting of one method over all clips, with everything its figures depend on.

    Attributes:
        arm: identifier, unique in a folder, usable as a file name.
        label: the same for people, such as `auto density=0.3`.
        method, parameters, schedule: as enabled; empty for dense arms.
        attention_backend: diffusers' name of the dense backend; "" is diffusers' default.
        calibration: provenance of the calibration, where the method has one.
        suite, suite_version: where the prompts came from.
        model, revision: name or folder, and the revision if the model came from a hub.
        layout: transformers, number of layers, heads, head size.
        call: arguments of the pipeline's call that all clips share.
        configuration: everything else that must be equal in arms that are compared, by name.
        config_hash: of method, parameters, schedule, calibration, call and configuration.
        environment: versions and device.
        warmup_seconds: of the first, uncounted step: compiling and tuning kernels happen there.
        repeat: of a dense arm: its first clip made once more, through sparsediff with a wholly dense schedule.
        checks: see `sparsediff.eval.checks`.
        notes: what a reader should know, such as a metric that could not be had.
    """

    arm: str
    label: str
    role: Role
    suite: str
    suite_version: str
    model: str
    call: dict[str, object]
    fps: int
    clips: tuple[ClipResult, ...] = ()
    revision: str | None = None
    layout: dict[str, object] = field(default_factory=dict)
    method: str = ""
    parameters: dict[str, object] = field(default_factory=dict)
    schedule: str = ""
    attention_backend: str = ""
    calibration: dict[str, object] | None = None
    configuration: dict[str, str] = field(default_factory=dict)
    config_hash: str = ""
    git_hash: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    created: str = ""
    warmup_seconds: float | None = None
    repeat: ClipResult | None = None
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if not self.arm or any(c in self.arm for c in "/\\\0") or self.arm.startswith("."):
            raise ValueError(f"an arm's identifier names a file, which {self.arm!r} cannot")
        if self.role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, got {self.role!r}")
        keys = [clip.key for clip in self.clips]
        if len(set(keys)) < len(keys):
            raise ValueError(f"{self.arm} holds two clips of one prompt and seed")

    def clip(self, key: tuple[str, int]) -> ClipResult | None:
        """The clip of a prompt and seed, if it was made."""
        return next((clip for clip in self.clips if clip.key == key), None)

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(encode(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = "the text") -> ArmResult:
        """Read `to_json`'s text.

        Raises:
            ValueError: no such JSON, another schema version, or a field that is missing, unknown or of another type;
                the message names `source` and the field.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{source} is no JSON (line {error.lineno}: {error.msg}): {DAMAGED}"
            ) from None
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"{source} has results of schema {version!r}, this sparsediff reads {SCHEMA_VERSION}; "
                "run the evaluation again with another --out, or read it with the version that wrote it"
            )
        return decode(cls, data, source)


@dataclass(frozen=True)
class Results:
    """All arms of a folder, the dense one first.

    Raises:
        ValueError: arms that do not belong together (another suite, model, call, ...); the message names the field.
    """

    folder: Path
    arms: tuple[ArmResult, ...]

    def __post_init__(self) -> None:
        if len({a.arm for a in self.arms}) < len(self.arms):
            raise ValueError("two arms have one identifier")
        for arm in self.arms[1:]:
            require_same_run(self.arms[0], arm)

    @property
    def dense(self) -> ArmResult | None:
        """The arm that the others are compared with."""
        return next((a for a in self.arms if a.role == "dense"), None)

    @property
    def others(self) -> tuple[ArmResult, ...]:
        """Every arm but the stock dense one."""
        return tuple(a for a in self.arms if a.role != "dense")

    def arm(self, name: str) -> ArmResult:
        """By identifier.

        Raises:
            ValueError: there is none of that name; the message lists those there are.
        """
        found = next((a for a in self.arms if a.arm == name), None)
        if found is None:
            raise ValueError(f"no arm {name!r}; there are {', '.join(a.arm for a in self.arms)}")
        return found

    def pairs(self, arm: ArmResult) -> list[tuple[ClipResult, ClipResult]]:
        """`(clip of the arm, dense clip)` of every prompt and seed that both have."""
        if self.dense is None:
            return []
        found = ((clip, self.dense.clip(clip.key)) for clip in arm.clips)
        return [(clip, dense) for clip, dense in found if dense is not None]

    def video_path(self, clip: ClipResult) -> Path | None:
        """Where the clip's file is, if it is there."""
        path = None if clip.video is None else self.folder / clip.video
        return path if path is not None and path.is_file() else None

    def capture_path(self, arm: ArmResult) -> Path | None:
        """Where the arm's captured masks are, if there are any."""
        path = self.folder / CAPTURES / f"{arm.arm}.safetensors"
        return path if path.is_file() else None


def require_same_run(one: ArmResult, other: ArmResult) -> None:
    """Refuse to put arms beside each other whose difference would not be the method's alone.

    Raises:
        ValueError: the message names what differs.
    """
    fields = ("suite", "suite_version", "model", "revision", "fps", "call", "configuration")
    differ = []
    for name in fields:
        a, b = getattr(one, name), getattr(other, name)
        if isinstance(a, dict):
            differ += [
                f"{key} ({a.get(key)!r} and {b.get(key)!r})"
                for key in {**a, **b}
                if a.get(key) != b.get(key)
            ]
        elif a != b:
            differ.append(f"{name} ({a!r} and {b!r})")
    if differ:
        raise ValueError(
            f"arms {one.arm} and {other.arm} are not of one run and cannot be compared: they differ in {', '.join(differ)}"
        )


def save_arm(folder: Path, result: ArmResult) -> Path:
    """Write one arm; an interrupt leaves the former file whole."""
    path = folder / ARMS / f"{result.arm}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".json.new")
    fresh.write_text(result.to_json(), encoding="utf-8")
    fresh.replace(path)
    return path


def load_arm(path: Path) -> ArmResult:
    """Read one arm; see `ArmResult.from_json`."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text: {DAMAGED}") from None
    return ArmResult.from_json(text, source=str(path))


def load_results(folder: str | Path) -> Results:
    """Read a folder of results.

    Raises:
        FileNotFoundError: no results there.
        NotADirectoryError: a file.
        ValueError: a damaged file, or arms that do not belong together.
    """
    folder = Path(folder)
    if folder.is_file():
        raise NotADirectoryError(
            f"{folder} is a file; give the folder that `sparsediff eval run --out` wrote"
        )
    paths = sorted((folder / ARMS).glob("*.json"))
    if not paths:
        raise FileNotFoundError(
            f"{folder} holds no results; `sparsediff eval run --out {folder}` writes them"
        )
    arms = sorted((load_arm(path) for path in paths), key=lambda a: (ROLES.index(a.role), a.arm))
    return Results(folder, tuple(arms))


def replace_clip(result: ArmResult, clip: ClipResult) -> ArmResult:
    """The arm with `clip` added, or in the place of the one of its prompt and seed."""
    clips = [c for c in result.clips if c.key != clip.key] + [clip]
    return dataclasses.replace(result, clips=tuple(sorted(clips, key=lambda c: c.index)))
