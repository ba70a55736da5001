"""`enable` and what it returns."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from sparsediff.adapter import ADAPTERS, ModelAdapter, adapter_for, weight_dtype
from sparsediff.calibration import Calibration, ModelLayout
from sparsediff.clock import Clock, check_step_count
from sparsediff.kernels.attention import DTYPES, select_backend
from sparsediff.methods import METHODS, CalibratedMethod, Method, build_method
from sparsediff.patch import PipelinePatch, TransformerPatch, handle_of
from sparsediff.recorder import Recorder
from sparsediff.report import RunReport
from sparsediff.schedule import Schedule
from sparsediff.state import Observer, RunState
from sparsediff.token_grid import TokenGrid

# Wan 2.2 has two experts, MiniMax-H3 another model for references; language models are a `model`.
COMPONENTS = ("transformer", "transformer_2", "transformer_ref", "model")


def enable(
    pipe_or_transformer: object,
    method: str | Method = "auto",
    *,
    schedule: Schedule | None = None,
    calibration: Calibration | str | Path | None = None,
    on_unsupported: Literal["raise", "dense"] = "raise",
    num_steps: int | None = None,
    **method_params: object,
) -> Handle:
    """Make a diffusers pipeline attend sparsely, from its next call on.

    ```python
    handle = sparsediff.enable(pipe)                                     # the default hybrid
    handle = sparsediff.enable(pipe, "lite_attention", threshold=-6.0)   # a published method by name
    ```

    Works before or after `.to()`, offloading, `torch.compile`, LoRA and `fuse_qkv_projections`.  Enabling an enabled
    pipeline replaces its settings; disabling then leaves it stock, it does not bring the former settings back.

    Args:
        pipe_or_transformer: a pipeline (all its experts are enabled), or one transformer.
        method: a name from `list_methods()`, or a configured `Method`.
        schedule: which steps and layers stay dense; None takes the method's published choice.
        calibration: what `sparsediff.calibrate` measured, for methods that take one: the object, its folder, or a
            repository of the Hugging Face hub.
        on_unsupported: what to do with a transformer or layer that cannot run sparse: raise here, or leave it dense
            and say so in the report.
        num_steps: steps of every generation, for a bare transformer in a denoising loop of your own; a pipeline tells
            itself.  `handle.begin_generation` can say another number for one generation.
        method_params: the method's parameters, under the paper's names.

    Returns:
        A handle: `summary()`, `report()`, `disable()`; also a context manager.

    Raises:
        ValueError: unknown method, parameter or model, or a setting that cannot work.  Nothing is patched then.
        TypeError: an argument of the wrong kind.
    """
    given = None if isinstance(method, Method) else frozenset(method_params)
    method = _suited(build_method(method, **method_params), pipe_or_transformer)
    method = with_calibration(method, calibration, given)
    if schedule is not None and not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a sparsediff.Schedule, got {type(schedule).__name__}")
    if on_unsupported not in ("raise", "dense"):
        raise ValueError(f"on_unsupported must be 'raise' or 'dense', got {on_unsupported!r}")
    if num_steps is not None:
        check_step_count(num_steps)
    schedule = schedule or method.default_schedule()
    return _enable(pipe_or_transformer, method, schedule, on_unsupported, num_steps=num_steps)


def _enable(
    target: object,
    method: Method,
    schedule: Schedule,
    on_unsupported: str,
    observer: Observer | None = None,
    num_steps: int | None = None,
) -> Handle:
    pipe, transformers = _transformers(target)
    if pipe is None and num_steps is None:
        _require_no_step_count(method, schedule)
    supported, unsupported = _split(transformers, method, on_unsupported)
    if supported and isinstance(method, CalibratedMethod) and method.calibration is not None:
        method.calibration.check_model(_layout(supported))
    # Everything that can refuse is above.  Only an interrupt can come between here and the end.
    for model in transformers.values():
        if (former := handle_of(model)) is not None:
            former._release(model)
    if pipe is not None and (former := handle_of(pipe)) is not None:
        former.disable()
    handle = Handle(method, schedule, _clock(pipe, num_steps, supported), unsupported)
    try:
        handle._patch(pipe, supported, observer)
    except BaseException:
        handle.disable()
        raise
    return handle


def _require_no_step_count(method: Method, schedule: Schedule) -> None:
    """Refuse for a bare transformer what would fail, or wait for ever, in the run."""
    fix = "enable the pipeline, or say enable(transformer, ..., num_steps=50)"
    if schedule.needs_step_count:
        raise ValueError(
            f"dense_steps={schedule.dense_steps} is a fraction of a number of steps that a bare transformer does not "
            f"know; {fix}, or use dense_above_sigma or a whole number"
        )
    if method.needs_step_count:
        raise ValueError(
            f"{method.name} acts at shares of a number of steps that a bare transformer does not know; {fix}"
        )


def watch(
    target: object, observer: Observer, *, method: Method, schedule: Schedule | None = None
) -> Handle:
    """`enable`, but every attention call that could run sparse goes to `observer`, which returns its output."""
    return _enable(target, method, schedule or method.default_schedule(), "raise", observer)


def model_layout(target: object) -> ModelLayout:
    """What of a pipeline a calibration depends on.

    Raises:
        ValueError: it holds no transformer that is supported.
    """
    return _layout(_transformers(target)[1])


def require_stock_pipeline(target: object) -> None:
    """Refuse what cannot be watched from outside, or is somebody else's at the moment.

    Raises:
        TypeError: a bare transformer.
        ValueError: an enabled pipeline, which watching would disable, or one without a transformer.
    """
    pipe, transformers = _transformers(target)
    if pipe is None:
        raise TypeError(
            f"calibrate() generates whole clips: give it the pipeline, not a bare {type(target).__name__}"
        )
    if any(adapter.modality == "text" for adapter in _adapters(transformers)):
        raise ValueError(
            f"calibrate() generates clips, and {type(pipe).__name__} is a language model; use 'sparse_d', which needs none"
        )
    if any(handle_of(part) is not None for part in (pipe, *transformers.values())):
        raise ValueError(
            "this pipeline is enabled, and calibrating it would disable it; call sparsediff.disable(pipe) first, and "
            "enable() again afterwards"
        )


def _layout(transformers: dict[str, nn.Module]) -> ModelLayout:
    adapters = {name: adapter_for(model) for name, model in transformers.items()}
    return ModelLayout(
        transformers={name: type(model).__name__ for name, model in transformers.items()},
        layers=tuple(
            f"{name}.{layer}"
            for name, model in transformers.items()
            for layer, _, _ in adapters[name].attention_layers(model)
        ),
        heads=max(adapters[name].num_heads(model) for name, model in transformers.items()),
        head_dim=max(adapters[name].head_dim(model) for name, model in transformers.items()),
    )


def with_calibration(
    method: Method,
    calibration: Calibration | str | Path | None,
    given: Collection[str] | None = None,
) -> Method:
    """The method ready to run: with its calibration, if it takes one.

    Args:
        method: without it.
        calibration: the object, its folder, or a repository of the Hugging Face hub.
        given: parameters that were set by name; None: those that differ from their defaults.

    Raises:
        ValueError: it takes none, needs one and has none, or this one was not measured for it or for what was given.
        TypeError: something else than a calibration.
        OSError: a folder or repository without one.
    """
    takes_one = isinstance(method, CalibratedMethod)
    if calibration is not None:
        if not takes_one:
            raise ValueError(
                f"{method.name} takes no calibration; leave it out, or take the method it was measured for"
            )
        if isinstance(calibration, str | Path):
            calibration = Calibration.from_pretrained(calibration)
        if not isinstance(calibration, Calibration):
            raise TypeError(
                f"calibration must be a Calibration, a folder or a repository, got {type(calibration).__name__}"
            )
        method = method.calibrated(calibration, given)
    if takes_one and method.needs_calibration and method.calibration is None:
        raise ValueError(
            f"{method.name} has to be measured first: sparsediff calibrate --method {method.name} --model MODEL "
            f"--prompt PROMPT --out FOLDER, then enable(pipe, {method.name!r}, calibration=FOLDER) or --calibration FOLDER"
        )
    return method


def disable(pipe_or_transformer: object) -> None:
    """Restore a pipeline or transformer exactly; one that is not enabled is left as it is."""
    pipe, transformers = _transformers(pipe_or_transformer)
    if pipe is not None and (handle := handle_of(pipe)) is not None:
        handle.disable()
    for model in transformers.values():
        if (handle := handle_of(model)) is not None:
            handle._release(model)


def list_methods() -> dict[str, str]:
    """Name -> one line, of every method that `enable` takes."""
    return {name: cls.summary for name, cls in METHODS.items()}


class Handle:
    """An enabled pipeline.  Made by `enable`; leaving its `with` block disables."""

    def __init__(
        self, method: Method, schedule: Schedule, clock: Clock, unsupported: dict[str, str]
    ) -> None:
        self.method = method
        self.schedule = schedule
        self.unsupported = unsupported  # what runs stock, and why (on_unsupported="dense")
        self.recorder = Recorder(method=str(method), schedule=str(schedule))
        self._clock = clock
        self._patches: dict[str, TransformerPatch] = {}
        self._pipeline_patch: PipelinePatch | None = None

    @property
    def enabled(self) -> bool:
        """Whether any transformer is still patched by this handle."""
        return bool(self._patches)

    @property
    def states(self) -> list[RunState]:
        """The state of every enabled transformer."""
        return [patch.state for patch in self._patches.values()]

    def report(self) -> RunReport:
        """Density, dense calls and time of the last generation, per layer and step.  Waits for the device."""
        return self.recorder.report()

    def summary(self) -> str:
        """The report in words, what stayed stock, and the memory that masks take."""
        lines = [str(self.report())]
        if (calibration := getattr(self.method, "calibration", None)) is not None:
            lines.append(f"  measured  {calibration}")
        lines += [f"  not sparse  {name}: {reason}" for name, reason in self.unsupported.items()]
        if held := sum(state.state_bytes() for state in self.states):
            lines.append(f"  masks     {held / 2**20:.1f} MiB kept between steps")
        return "\n".join(lines)

    def begin_generation(self, num_steps: int | None = None) -> None:
        """Tell a denoising loop of your own that a new generation of `num_steps` steps starts.

        Pipelines need no call: their scheduler tells.

        Raises:
            ValueError: not a whole number of steps.
        """
        if num_steps is not None:
            check_step_count(num_steps)
        self._clock.begin_generation(num_steps)

    def disable(self) -> None:
        """Restore the pipeline exactly; the report stays readable.  A second call does nothing."""
        if self._pipeline_patch is not None:
            self._pipeline_patch.undo()
            self._pipeline_patch = None
        while self._patches:
            self._patches.popitem()[1].undo()

    def _release(self, model: nn.Module) -> None:
        """Restore one transformer; with the last of them the handle is disabled."""
        for name in [n for n, patch in self._patches.items() if patch.model is model]:
            self._patches.pop(name).undo()
        if not self._patches:
            self.disable()

    def _patch(
        self,
        pipe: object | None,
        transformers: dict[str, nn.Module],
        observer: Observer | None = None,
    ) -> None:
        """Change a live pipeline; `enable` calls it once."""
        for name, model in transformers.items():
            state = RunState(
                name=name,
                model=model,
                adapter=adapter_for(model),
                method=self.method,
                schedule=self.schedule,
                clock=self._clock,
                recorder=self.recorder,
                observer=observer,
            )
            self._patches[name] = patch = TransformerPatch(model, state)
            patch.apply(self)
        if pipe is not None and transformers and hasattr(pipe, "progress_bar"):
            self._pipeline_patch = PipelinePatch(pipe)
            self._pipeline_patch.apply(self)

    def _warn_of_replaced_transformers(self, pipe: object) -> None:
        """Say so if the pipeline now holds another transformer than the one that was enabled."""
        for name, patch in self._patches.items():
            now = getattr(pipe, name, None)
            if isinstance(now, nn.Module) and _uncompiled(now) is not patch.model:
                warnings.warn(
                    f"pipe.{name} was replaced after sparsediff.enable() and runs dense; call enable() again",
                    RuntimeWarning,
                    stacklevel=4,
                )

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.disable()

    def __repr__(self) -> str:
        return (
            f"<sparsediff.Handle {self.method.name}, {'enabled' if self.enabled else 'disabled'}>"
        )


def _transformers(target: object) -> tuple[object | None, dict[str, nn.Module]]:
    """`(pipeline or None, {component name: transformer})`."""
    if isinstance(target, nn.Module):
        return None, {"transformer": _uncompiled(target)}
    found = {name: getattr(target, name, None) for name in COMPONENTS}
    found = {name: _uncompiled(m) for name, m in found.items() if isinstance(m, nn.Module)}
    if not found:
        raise ValueError(
            f"{type(target).__name__} has no transformer; supported transformers: {', '.join(sorted(ADAPTERS))}"
        )
    return target, found


def _adapters(transformers: dict[str, nn.Module]) -> list[ModelAdapter]:
    """Of those that have one."""
    return [adapter_for(m) for m in transformers.values() if type(m).__name__ in ADAPTERS]


def _suited(method: Method, target: object) -> Method:
    """The method, or what takes its place on a language model."""
    adapters = _adapters(_transformers(target)[1])
    return method.for_text() if any(a.modality == "text" for a in adapters) else method


def _clock(pipe: object | None, num_steps: int | None, transformers: dict[str, nn.Module]) -> Clock:
    """One for all transformers of a pipeline, which are of one kind."""
    adapters = _adapters(transformers)
    return adapters[0].clock(pipe, num_steps) if adapters else Clock(pipe, num_steps)


def _uncompiled(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)  # torch.compile(model) wraps


def _split(
    transformers: dict[str, nn.Module], method: Method, on_unsupported: str
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The transformers that can run sparse, and why the others cannot."""
    supported, unsupported = {}, {}
    for name, model in transformers.items():
        try:
            _check_transformer(name, model, method)
        except ValueError as error:
            if on_unsupported == "raise":
                raise
            unsupported[name] = str(error)
        else:
            supported[name] = model
    return supported, unsupported


def _check_transformer(name: str, model: nn.Module, method: Method) -> None:
    adapter = adapter_for(model)
    adapter.check_model(model)
    for layer, module, _ in adapter.attention_layers(model):
        adapter.check_layer(f"{name}.{layer}", module)
    device, dtype = next(model.parameters()).device, weight_dtype(model)
    if dtype == torch.float64:
        raise ValueError(f"{name} is in float64; kernels take float32, bfloat16 and float16")
    # Quantised weights say nothing about activations, which are bfloat16 as a rule.
    dtype = dtype if dtype in DTYPES else torch.bfloat16
    for grid in (SMALL_GRID, LARGE_GRID):
        choice = select_backend(
            device,
            dtype,
            adapter.head_dim(model),
            method.block_size(grid),
            method.backend,
        )
        if choice.name == "reference":
            raise ValueError(f"{name} has no fast kernel on {device}: {choice.reason}")


# A method's blocks may depend on the length; these are short and long for any method.
SMALL_GRID, LARGE_GRID = TokenGrid.video(1, 32, 32), TokenGrid.video(33, 64, 64)
