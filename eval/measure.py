"""One call of a pipeline, measured: frames, latents on the way, seconds of its parts, memory, energy.

Nothing waits for the device while the clip is made.  Parts are told apart without knowing the pipeline: what comes
before the first call of a transformer is text, what comes after the last is decoding.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsediff.api import COMPONENTS
from sparsediff.eval.resources import EnergyMeter, PeakMemory
from sparsediff.eval.video import to_video_tensor
from sparsediff.progress import step_bar
from sparsediff.timing import Mark, mark, seconds_between, wait

WARM_UP_STEPS = 2  # one that may be dense and choose blocks, one that is sparse


@dataclass(frozen=True, kw_only=True)
class Made:
    """A clip and what it took.

    Attributes:
        video: `float32 [F, H, W, 3]` in [0, 1], on the CPU; of one frame if the pipeline makes images.
        total_seconds: the whole call, by the wall clock after the device has finished.
        denoiser_seconds: inside the transformers.
        text_seconds, decode_seconds: before the first and after the last call of a transformer.
        step_seconds: inside the transformers, by denoising step; empty where the pipeline does not tell its steps.
        latents: after every step, `float16 [steps, ...]` on the CPU; None where nobody asked or the pipeline does not
            tell.
        latents_sha256: of what the transformer was given first.
        peak_memory_bytes, energy_joules: None where the device does not tell.
    """

    video: Tensor
    total_seconds: float
    denoiser_seconds: float
    text_seconds: float
    decode_seconds: float
    step_seconds: tuple[float, ...]
    latents: Tensor | None
    latents_sha256: str
    peak_memory_bytes: int | None
    energy_joules: float | None

    @property
    def frames_sha256(self) -> str:
        """Of the frames: equal only for identical clips."""
        return sha256(self.video)


def generate(
    pipe: object,
    arguments: dict[str, object],
    *,
    trajectory: bool = False,
    on_step: Callable[[int, Tensor | None], None] | None = None,
) -> Made:
    """Run the pipeline once.

    Args:
        pipe: stock or enabled.
        arguments: of its call; `generator` should be fresh.
        trajectory: keep the latents after every step.
        on_step: called after every step with its number, from 0, and its latents, where the pipeline tells its steps;
            what it raises ends the run.

    Raises:
        ValueError: the pipeline returns neither a video nor an image, or one with NaN or infinite values.
    """
    device = pipe._execution_device
    observer = _CallObserver(device, trajectory=trajectory, on_step=on_step)
    told = contextlib.nullcontext()
    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
        arguments = {**arguments, "callback_on_step_end": observer.step_ended}
    else:
        told = _steps_of_bar(pipe, observer.step_ended)
    memory, energy = PeakMemory(device), EnergyMeter(device)
    with observer.watching(pipe):
        wait(device)
        memory.start()
        energy.start()
        begun, started = mark(device), time.perf_counter()
        with told:
            output = pipe(**arguments)
        ended = mark(device)
        wait(device)
        total = time.perf_counter() - started
    video = to_video_tensor(_pictures(pipe, output))
    if not video.isfinite().all():
        raise ValueError(
            "the clip holds NaN or infinite values: try another dtype, such as bfloat16 or float32"
        )
    spans = observer.spans
    return Made(
        video=video,
        total_seconds=total,
        denoiser_seconds=observer.denoiser_seconds(),
        text_seconds=seconds_between(begun, spans[0][1]) if spans else 0.0,
        decode_seconds=seconds_between(spans[-1][2], ended) if spans else 0.0,
        step_seconds=observer.step_seconds(),
        latents=observer.trajectory(),
        latents_sha256=sha256(observer.first_input),
        peak_memory_bytes=memory.stop(),
        energy_joules=energy.stop(),
    )


def _pictures(pipe: object, output: object) -> object:
    """The frames, or the one image, of a pipeline's output."""
    for name in ("frames", "images"):
        found = getattr(output, name, None)
        if found is not None:
            return found
    raise ValueError(
        f"{type(pipe).__name__} returns neither frames nor images, and nothing else can be measured"
    )


def warm_up(pipe: object, arguments: dict[str, object], *, decode: bool = False) -> float:
    """Run few steps whose time nobody counts, without a progress bar; returns their seconds.

    `decode`: the frames too, so that the decoder's first run is not counted either.
    """
    started = time.perf_counter()
    few: dict[str, object] = {"num_inference_steps": WARM_UP_STEPS}
    if not decode:
        few["output_type"] = "latent"
    with step_bar(pipe, shown=False):
        pipe(**{**arguments, **few})
        wait(pipe._execution_device)
    return time.perf_counter() - started


def denoising_seconds(pipe: object, arguments: dict[str, object]) -> float:
    """Seconds inside the transformers in one call that decodes nothing."""
    observer = _CallObserver(pipe._execution_device, trajectory=False)
    with observer.watching(pipe), step_bar(pipe, shown=False):
        pipe(**{**arguments, "output_type": "latent"})
        wait(pipe._execution_device)
    return observer.denoiser_seconds()


def makes_video(pipe: object) -> bool:
    """Whether the call of a pipeline, or of a pipeline's class, takes frames, a video or their number; those that do not make images."""
    names = inspect.signature(pipe.__call__).parameters
    return any("frame" in name or "video" in name for name in names)


def denoisers(pipe: object) -> list[nn.Module]:
    """The transformers of a pipeline."""
    found = (getattr(pipe, name, None) for name in COMPONENTS)
    return [m for m in found if isinstance(m, nn.Module)]


def sha256(x: Tensor | None) -> str:
    """Of the values as float32; empty for none."""
    if x is None:
        return ""
    return hashlib.sha256(
        x.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
    ).hexdigest()


def divergence(latents: Tensor, reference: Tensor) -> tuple[float, ...]:
    """Relative L2 distance of two trajectories `[steps, ...]` after each step.

    Raises:
        ValueError: their shapes differ.
    """
    if latents.shape != reference.shape:
        raise ValueError(
            f"two trajectories of one shape are needed, got {list(latents.shape)} and {list(reference.shape)}"
        )
    found = []
    for a, b in zip(latents, reference, strict=True):
        difference = (a.float() - b.float()).norm()
        found.append((difference / b.float().norm().clamp_min(1e-20)).item())
    return tuple(found)


class _CallObserver:
    """What is seen of one call of a pipeline."""

    def __init__(
        self,
        device: torch.device,
        *,
        trajectory: bool,
        on_step: Callable[[int, Tensor | None], None] | None = None,
    ) -> None:
        self.device = device
        self._on_step = on_step
        self.spans: list[
            tuple[int, Mark, Mark]
        ] = []  # step, start, stop of each call of a transformer
        self.first_input: Tensor | None = None
        self._latents: list[Tensor] | None = [] if trajectory else None
        self._step = 0

    @contextlib.contextmanager
    def watching(self, pipe: object) -> Iterator[None]:
        hooks = [
            hook
            for model in denoisers(pipe)
            for hook in (
                model.register_forward_pre_hook(self._before, with_kwargs=True),
                model.register_forward_hook(self._after),
            )
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def step_ended(self, pipe: object, step: int, timestep: object, tensors: dict) -> dict:
        self._step += 1
        if self._latents is not None and (latents := tensors.get("latents")) is not None:
            self._latents.append(_to_host(latents))
        if self._on_step is not None:
            self._on_step(self._step - 1, tensors.get("latents"))
        return {}

    def denoiser_seconds(self) -> float:
        return sum(seconds_between(start, stop) for _, start, stop in self.spans)

    def step_seconds(self) -> tuple[float, ...]:
        total = [0.0] * self._step
        for step, start, stop in self.spans:
            if step < self._step:
                total[step] += seconds_between(start, stop)
        return tuple(total)

    def trajectory(self) -> Tensor | None:
        return torch.stack(self._latents) if self._latents else None

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.first_input is None:
            given = kwargs.get("hidden_states", args[0] if args else None)
            self.first_input = given.detach().clone() if isinstance(given, Tensor) else None
        self._started = mark(self.device)

    def _after(self, module: nn.Module, args: tuple, output: object) -> None:
        self.spans.append((self._step, self._started, mark(self.device)))


@contextlib.contextmanager
def _steps_of_bar(pipe: object, ended: Callable) -> Iterator[None]:
    """Read the steps off the progress bar of a pipeline that has no callback (HunyuanVideo 1.5); it does not show latents."""
    own, bar_of = vars(pipe).get("progress_bar"), pipe.progress_bar

    def watched(*args: object, **kwargs: object) -> object:
        bar = bar_of(*args, **kwargs)
        update = bar.update

        def advanced(n: int = 1) -> object:
            ended(pipe, 0, None, {})
            return update(n)

        bar.update = advanced
        return bar

    pipe.progress_bar = watched
    try:
        yield
    finally:
        if own is None:
            del pipe.progress_bar
        else:
            pipe.progress_bar = own


def _to_host(x: Tensor) -> Tensor:
    """A copy in half precision on the CPU that nobody waits for."""
    half = x.detach().half()
    if half.device.type != "cuda":
        return half.clone() if half is x else half
    return torch.empty_like(half, device="cpu", pin_memory=True).copy_(half, non_blocking=True)
