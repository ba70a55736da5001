"""The one pipeline behind the page: loaded once, used by one visitor at a time, stock between two runs."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import sparsediff
from sparsediff.adapter import Preset, adapter_for
from sparsediff.calibration import Calibration
from sparsediff.demo.forms import offered_methods
from sparsediff.demo.jobs import Job, Turns
from sparsediff.demo.limits import Limits, fixed_fields, limits_of
from sparsediff.demo.meters import StepPoint
from sparsediff.demo.served import served
from sparsediff.demo.settings import Settings
from sparsediff.eval.arms import DENSE, Arm, sparse_arm
from sparsediff.eval.capture import Capture, capture
from sparsediff.eval.compare import Request
from sparsediff.eval.measure import Made, denoisers, generate
from sparsediff.eval.metrics import choose
from sparsediff.eval.models import default_request, load_pipeline
from sparsediff.progress import step_bar
from sparsediff.report import RunReport

CACHE_BYTES = 1 << 30
CAPTURED_BYTES = 24 << 20  # of masks, at most, before what repeats is counted once
CAPTURED_STEPS = 6
REPORT = "report.html"

OnStep = Callable[[StepPoint], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseRun:
    """What a method made.

    Attributes:
        made: the clip and its times.
        report: densities and dense calls.
        masks: blocks read at some steps.
    """

    made: Made
    report: RunReport
    masks: Capture


@dataclass
class DenseCache:
    """Clips of the stock pipeline by request, the latest used kept longest.

    Attributes:
        limit: bytes of clips and latents together; the latest stays whatever its size.
    """

    limit: int = CACHE_BYTES
    _held: OrderedDict[Request, Made] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, request: Request) -> Made | None:
        """The clip of exactly this request."""
        with self._lock:
            if request in self._held:
                self._held.move_to_end(request)
            return self._held.get(request)

    def put(self, request: Request, made: Made) -> None:
        """Keep a clip, and let go of the oldest while there are too many bytes."""
        with self._lock:
            self._held[request] = made
            self._held.move_to_end(request)
            while len(self._held) > 1 and sum(map(_bytes, self._held.values())) > self.limit:
                self._held.popitem(last=False)

    def __contains__(self, request: object) -> bool:
        return request in self._held

    def __len__(self) -> int:
        return len(self._held)


class Studio:
    """A model and what may be done with it.

    Attributes:
        served: what is known of the pipeline's class.
        defaults: fields of a `Request` that the page begins with.
        fixed: fields of a `Request` that the pipeline's call has no argument for.

    Args:
        model: a bundled name, a folder or a model id.
        device, dtype: as `sparsediff.eval.models.load_pipeline` takes them.
        calibrations: folders of `sparsediff calibrate`, for methods that need one.
        defaults: fields of a `Request` that the page begins with instead of the model's own; what a visitor may ask for
            grows with them.

    Raises:
        ValueError: no such model or one that the page cannot serve, a default that it does not take, or a calibration that
            is none.
        OSError: a model or calibration that is not there.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str | None = None,
        dtype: str | None = None,
        calibrations: tuple[str, ...] = (),
        defaults: Mapping[str, object] | None = None,
    ) -> None:
        self.served = served(model)
        self.model = model
        self.defaults = {**default_request(model), **(defaults or {})}
        self.fixed = fixed_fields(self.served)
        if wrong := sorted(self.fixed & self.defaults.keys()):
            raise ValueError(f"{self.served.pipeline} takes no {', '.join(wrong)}; leave it out")
        self._asked = (device, dtype)
        self.calibrations = {Calibration.from_pretrained(f).method: f for f in calibrations}
        self.methods = offered_methods(frozenset(self.calibrations))
        self.turns = Turns()
        self.dense = DenseCache()
        self.pipe: object | None = None
        self.limits: Limits | None = None
        self.failure: str | None = None
        self._loaded = threading.Event()
        self._warm: set[tuple] = set()
        self._folder = tempfile.TemporaryDirectory(prefix="sparsediff-demo-")

    @property
    def place(self) -> dict[str, str | None]:
        """Where it runs, as flags of the command; None where the default is meant."""
        return dict(zip(("device", "dtype"), self._asked, strict=True))

    @property
    def device(self) -> torch.device | None:
        """Where the pipeline is; None before it is loaded."""
        return None if self.pipe is None else self.pipe._execution_device

    @property
    def presets(self) -> tuple[Preset, ...]:
        """What the adapter of the model recommends; nothing before it is loaded."""
        return () if self.pipe is None else adapter_for(self.pipe.transformer).presets

    @contextlib.contextmanager
    def new_folder(self) -> Iterator[Path]:
        """For the results of one job: goes if the job ends before it has a report, as all do when the server ends."""
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        try:
            yield folder
        except BaseException:
            if not (folder / REPORT).exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def close(self) -> None:
        """Throw away all results."""
        self._folder.cleanup()

    # -- loading ------------------------------------------------------------------------------------------------------

    def start_loading(self) -> None:
        """Load the model in the background; `wait_until_loaded` waits for it."""
        threading.Thread(target=self._load, daemon=True, name="sparsediff-demo-load").start()

    def wait_until_loaded(self, job: Job | None = None) -> None:
        """Until the model is there, or nobody wants the job.

        Raises:
            Cancelled: while waiting.
            RuntimeError: it could not be loaded; the message says why.
        """
        while not self._loaded.wait(0.1):
            if job is not None:
                job.check()
        if self.failure is not None:
            raise RuntimeError(f"The model could not be loaded: {self.failure}")

    @property
    def loaded(self) -> bool:
        """Whether loading has ended, well or not."""
        return self._loaded.is_set()

    def _load(self) -> None:
        try:
            pipe = load_pipeline(self.model, device=self._asked[0], dtype=self._asked[1])
            self.limits = limits_of(pipe, self.served, self.defaults)
            sparsediff.enable(
                pipe
            ).disable()  # a model without an adapter is refused now, not at the first click
            choose(None, None)  # imports what the first comparison would wait for
            self.pipe = pipe
        except Exception as error:  # a server without its model still has to say why
            self.failure = " ".join(str(error).split()) or type(error).__name__
        finally:
            self._loaded.set()

    # -- running ------------------------------------------------------------------------------------------------------

    def arm(self, settings: Settings) -> Arm:
        """The configured method, with its calibration if there is one.

        Raises:
            ValueError, TypeError: a parameter out of range, or a calibration that does not fit.
        """
        folder = self.calibrations.get(settings.method)
        arm = sparse_arm(settings.method, calibration=folder, **settings.parameters)
        schedule = settings.build_schedule()
        if schedule is None:
            return arm
        when = ", ".join(f"{k}={v}" for k, v in settings.schedule.items()) or "dense_steps=0"
        return dataclasses.replace(arm, schedule=schedule, label=f"{arm.label} {when}")

    def run_dense(self, job: Job, request: Request, on_step: OnStep) -> Made:
        """The stock clip of a request, from the cache if it is there; the caller has its turn."""
        made = self.dense.get(request)
        if made is None:
            self._warm_up(DENSE, request, job)
            made = self._generate(job, request, lambda point, latents: on_step(point))
            self.dense.put(request, made)
        return made

    def run_sparse(
        self, job: Job, request: Request, arm: Arm, dense: Made, on_step: OnStep
    ) -> SparseRun:
        """A method's clip of a request; the caller has its turn.  The pipeline is stock again afterwards."""
        self._warm_up(arm, request, job)
        with arm.entered(self.pipe) as handle:

            def tell(point: StepPoint, latents: Tensor | None) -> None:
                so_far = handle.report()
                density = so_far.steps[-1].density if so_far.steps else 1.0
                on_step(
                    StepPoint(
                        step=point.step,
                        steps=point.steps,
                        seconds=point.seconds,
                        density=density,
                        speedup=so_far.estimated_speedup,
                        divergence=_apart(latents, dense, point.step - 1),
                    )
                )

            layers, steps = self._captured(handle, request)
            with capture(handle, layers=layers, steps=steps) as masks:
                made = self._generate(job, request, tell)
            masks.about |= {"prompt": request.prompt, "seed": str(request.seed)}
            return SparseRun(made=made, report=handle.report(), masks=masks)

    def _generate(
        self, job: Job, request: Request, on_step: Callable[[StepPoint, Tensor | None], None]
    ) -> Made:
        last = time.perf_counter()

        def stepped(step: int, latents: Tensor | None) -> None:
            nonlocal last
            job.check()
            now = time.perf_counter()
            point = StepPoint(step=step + 1, steps=request.steps, seconds=now - last)
            last = now
            on_step(point, latents)

        with _stopping(self.pipe, job), step_bar(self.pipe, shown=False):
            return generate(self.pipe, request.arguments(), trajectory=True, on_step=stepped)

    def _warm_up(self, arm: Arm, request: Request, job: Job) -> None:
        """On a GPU the first call at a size compiles and tunes; those seconds are nobody's."""
        key = (arm.name, request.height, request.width, request.frames)
        if self.device.type != "cuda" or key in self._warm:
            return
        with _stopping(self.pipe, job):
            arm.warm_up(self.pipe, request.arguments())
        self._warm.add(key)

    def _captured(self, handle: sparsediff.Handle, request: Request) -> tuple[list[str], list[int]]:
        """Which layers and steps to record: a few steps of all layers, of fewer where masks are large."""
        layers = [name for state in handle.states for name in state.layers]
        steps = sorted(
            {round(i * (request.steps - 1) / (CAPTURED_STEPS - 1)) for i in range(CAPTURED_STEPS)}
        )
        limits = self.limits
        tokens = (
            (1 + ((request.frames or 1) - 1) // limits.frame_step)
            * (request.height // limits.multiple)
            * (request.width // limits.multiple)
        )
        heads = max(
            getattr(model.config, "num_attention_heads", 1) for model in denoisers(self.pipe)
        )
        # two guidance branches, the smallest usual block, one bit a pair; short clips take less than a byte
        one = max(1, 2 * heads * (tokens // 64 + 1) ** 2 // 8)
        while len(steps) > 2 and one * len(layers) * len(steps) > CAPTURED_BYTES:
            steps = steps[1::2]
        few = max(1, CAPTURED_BYTES // (one * len(steps)))
        return layers[:: -(-len(layers) // few)], steps


@contextlib.contextmanager
def _stopping(pipe: object, job: Job) -> Iterator[None]:
    """Stop a run that nobody wants between two calls of a network, not only between two steps."""

    def check(module: object, args: tuple) -> None:
        job.check()

    networks = [*denoisers(pipe), getattr(getattr(pipe, "vae", None), "decoder", None)]
    hooks = [n.register_forward_pre_hook(check) for n in networks if isinstance(n, torch.nn.Module)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _apart(latents: Tensor | None, dense: Made, step: int) -> float | None:
    """Relative L2 distance to the dense run after the same step."""
    if latents is None or dense.latents is None or step >= len(dense.latents):
        return None
    reference = dense.latents[step].float()
    # Kept in half precision: compared in it too, so that equal steps are equal.
    difference = latents.detach().to("cpu", torch.float16).float() - reference
    return (difference.norm() / reference.norm().clamp_min(1e-20)).item()


def _bytes(made: Made) -> int:
    return made.video.nbytes + (0 if made.latents is None else made.latents.nbytes)
