"""`enable` and what it returns."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from typing import Literal

import torch
from torch import nn

from sparsediff.adapter import ADAPTERS, adapter_for
from sparsediff.clock import Clock
from sparsediff.kernels.attention import select_backend
from sparsediff.methods import METHODS, Method, build_method
from sparsediff.processor import SparseProcessor, wrap_processor
from sparsediff.progress import ProgressBar
from sparsediff.recorder import Recorder
from sparsediff.report import RunReport
from sparsediff.schedule import Schedule
from sparsediff.state import RunState

COMPONENTS = ("transformer", "transformer_2")  # Wan 2.2 has two experts

# Which handle an enabled transformer belongs to: enabling again, or through another pipeline, replaces it.
_HANDLES: weakref.WeakKeyDictionary[nn.Module, Handle] = weakref.WeakKeyDictionary()


def enable(
    pipe_or_transformer: object,
    method: str | Method = "auto",
    *,
    schedule: Schedule | None = None,
    calibration: None = None,
    on_unsupported: Literal["raise", "dense"] = "raise",
    **method_params: object,
) -> Handle:
    """Make a diffusers pipeline attend sparsely, from its next call on.

    ```python
    handle = sparsediff.enable(pipe)                                     # the default hybrid
    handle = sparsediff.enable(pipe, "lite_attention", threshold=-6.0)   # a published method by name
    ```

    Works before or after `.to()`, offloading, `torch.compile`, LoRA and `fuse_qkv_projections`.  Enabling an enabled
    pipeline replaces its settings.

    Args:
        pipe_or_transformer: a pipeline (all its experts are enabled), or one transformer.
        method: a name from `list_methods()`, or a configured `Method`.
        schedule: which steps and layers stay dense; None takes the method's published choice.
        calibration: for methods that need a measured artefact.  None of those available does.
        on_unsupported: what to do with a transformer or layer that cannot run sparse: raise here, or leave it dense
            and say so in the report.
        method_params: the method's parameters, under the paper's names.

    Returns:
        A handle: `summary()`, `report()`, `disable()`; also a context manager.

    Raises:
        ValueError: unknown method, parameter or model, or a setting that cannot work.  Nothing is patched then.
        TypeError: an argument of the wrong kind.
    """
    method = build_method(method, **method_params)
    if calibration is not None:
        raise ValueError(f"{method.name} takes no calibration; leave calibration=None")
    if schedule is not None and not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a sparsediff.Schedule, got {type(schedule).__name__}")
    if on_unsupported not in ("raise", "dense"):
        raise ValueError(f"on_unsupported must be 'raise' or 'dense', got {on_unsupported!r}")
    schedule = schedule or method.default_schedule()
    pipe, transformers = _transformers(pipe_or_transformer)
    if pipe is None and schedule.needs_step_count:
        raise ValueError(
            "dense_steps as a fraction needs the number of steps, which a bare transformer does not know; enable the "
            "pipeline, or use dense_above_sigma or a whole number"
        )
    return Handle(pipe, transformers, method, schedule, on_unsupported)


def disable(pipe_or_transformer: object) -> None:
    """Restore a pipeline or transformer exactly; one that is not enabled is left as it is."""
    for model in _transformers(pipe_or_transformer)[1].values():
        if model in _HANDLES:
            _HANDLES[model].disable()


def list_methods() -> dict[str, str]:
    """Name -> one line, of every method that `enable` takes."""
    return {name: cls.summary for name, cls in METHODS.items()}


class Handle:
    """An enabled pipeline.  Made by `enable`; leaving its `with` block disables."""

    def __init__(
        self,
        pipe: object | None,
        transformers: dict[str, nn.Module],
        method: Method,
        schedule: Schedule,
        on_unsupported: str,
    ) -> None:
        self.method = method
        self.schedule = schedule
        self.unsupported: dict[str, str] = {}  # what runs stock, and why (on_unsupported="dense")
        self.states: list[RunState] = []
        self._recorder = Recorder(method=str(method), schedule=str(schedule))
        self._clock = Clock(pipe)
        self._undo: list = []
        supported = self._check(transformers, on_unsupported)
        # From here on nothing refuses: everything that can is above, so a pipeline is never half-patched.
        for model in supported.values():
            if model in _HANDLES:
                _HANDLES[model].disable()
        for name, model in supported.items():
            self._patch(name, model)
        if pipe is not None and hasattr(pipe, "progress_bar"):
            self._undo.append(ProgressBar(pipe, self._recorder).restore)

    # -- what the user asks ---------------------------------------------------------------------------------------

    @property
    def enabled(self) -> bool:
        """Whether the pipeline is still patched by this handle."""
        return bool(self._undo)

    def report(self) -> RunReport:
        """Density, dense calls and time of the last generation, per layer and step.  Waits for the device."""
        return self._recorder.report()

    def summary(self) -> str:
        """The report in words."""
        lines = [str(self.report())]
        lines += [f"  not sparse  {name}: {reason}" for name, reason in self.unsupported.items()]
        return "\n".join(lines)

    def begin_generation(self, num_steps: int | None = None) -> None:
        """Tell a denoising loop of your own that a new generation of `num_steps` steps starts.

        Pipelines need no call: their scheduler tells.
        """
        self._clock.begin_generation(num_steps)

    def disable(self) -> None:
        """Restore the pipeline exactly; the report stays readable.  A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.disable()

    def __repr__(self) -> str:
        return (
            f"<sparsediff.Handle {self.method.name}, {'enabled' if self.enabled else 'disabled'}>"
        )

    # -- patching -------------------------------------------------------------------------------------------------

    def _check(
        self, transformers: dict[str, nn.Module], on_unsupported: str
    ) -> dict[str, nn.Module]:
        """The transformers that can run sparse."""
        supported = {}
        for name, model in transformers.items():
            try:
                _check_transformer(name, model)
            except ValueError as error:
                if on_unsupported == "raise":
                    raise
                self.unsupported[name] = str(error)
            else:
                supported[name] = model
        return supported

    def _patch(self, name: str, model: nn.Module) -> None:
        state = RunState(
            name=name,
            model=model,
            adapter=adapter_for(model),
            method=self.method,
            schedule=self.schedule,
            clock=self._clock,
            recorder=self._recorder,
        )
        self.states.append(state)
        for index, (_, module) in enumerate(state.modules):
            wrapper = wrap_processor(module.processor, state.key, index)
            state.wrappers.append(wrapper)
            module.processor = wrapper
            self._undo.append(
                lambda module=module, wrapper=wrapper: _restore_processor(module, wrapper)
            )

        # nn.Module hooks survive offloading, which silently drops wrappers of `forward`; run eagerly, they are not
        # replayed one call late by Dynamo.
        @torch.compiler.disable
        def before(module, args, kwargs):
            state.begin_forward(module, args, kwargs)

        @torch.compiler.disable
        def after(module, args, output):
            state.end_forward(module)

        self._undo.append(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        self._undo.append(model.register_forward_hook(after).remove)
        if hasattr(model, "cache_context"):
            self._undo.append(_listen_to_cache_context(model, state))
        _HANDLES[model] = self
        self._undo.append(lambda: _HANDLES.pop(model, None))


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


def _uncompiled(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)  # torch.compile(model) wraps


def _check_transformer(name: str, model: nn.Module) -> None:
    adapter = adapter_for(model)
    layers = adapter.attention_layers(model)
    if not layers:
        raise ValueError(f"{name} has no attention layer that could run sparse")
    for layer, module in layers:
        stock = module.processor
        if isinstance(stock, SparseProcessor):  # enabled before: look at what will be restored
            stock = stock.stock
        if type(stock).__name__ not in adapter.processors:
            raise ValueError(
                f"{name}.{layer} uses {type(stock).__name__}, not one of {', '.join(sorted(adapter.processors))}; "
                "restore the stock attention processor first"
            )
        if getattr(stock, "_parallel_config", None) is not None:
            raise ValueError(f"{name} runs with context parallelism, which is not supported yet")
    parameter = next(model.parameters())
    dtype = (
        parameter.dtype
        if parameter.dtype in (torch.float16, torch.bfloat16, torch.float32)
        else torch.bfloat16
    )
    head_dim = adapter.head_dim(model)
    select_backend(parameter.device, dtype, head_dim, (128, 128))


def _restore_processor(module: nn.Module, wrapper: SparseProcessor) -> None:
    stock = wrapper.restore()
    if module.processor is wrapper:
        module.processor = stock
    else:
        warnings.warn(
            f"{type(module).__name__}: the attention processor was replaced after sparsediff.enable(); left as it is",
            RuntimeWarning,
            stacklevel=3,
        )


def _listen_to_cache_context(model: nn.Module, state: RunState):
    """Let `state` know inside which `model.cache_context(name)` a call is made; returns the undo."""
    had_own = vars(model).get("cache_context")
    stock = model.cache_context

    @contextlib.contextmanager
    def cache_context(name, **fields):
        outer, state.context = state.context, _Context(name, fields.get("step_index"))
        try:
            with stock(name, **fields) as value:
                yield value
        finally:
            state.context = outer

    model.__dict__["cache_context"] = cache_context

    def undo() -> None:
        if vars(model).get("cache_context") is not cache_context:
            return
        if had_own is None:
            del model.__dict__["cache_context"]
        else:
            model.__dict__["cache_context"] = had_own

    return undo


class _Context:
    def __init__(self, name: str, step_index: int | None) -> None:
        self.name, self.step_index = name, step_index
