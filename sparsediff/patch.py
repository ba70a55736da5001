"""What `enable` changes on a live pipeline, and how each change is taken back.

Three things: the processors of the eligible attention modules (or their `forward`, where there are none), two forward
hooks and `cache_context` on the transformer, and `progress_bar` on the pipeline.  Every replacement knows its handle, so the handle is found from the
pipeline itself, and every one turns into the stock thing (hooks into ones that do nothing) when it is deep-copied or
pickled: a copy of an enabled pipeline runs stock.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from typing import TYPE_CHECKING

import torch
from torch import nn

from sparsediff.progress import show_density
from sparsediff.state import RunState

if TYPE_CHECKING:
    from sparsediff.api import Handle
    from sparsediff.clock import Clock


class TransformerPatch:
    """One enabled transformer."""

    def __init__(self, model: nn.Module, state: RunState) -> None:
        self.model = model
        self.state = state
        self._hooks: list = []
        self._own_cache_context = vars(model).get("cache_context")

    def apply(self, handle: Handle) -> None:
        """Change the model."""
        model, state = self.model, self.state
        before, after = _BeforeForward(handle, state), _AfterForward(state)
        self._hooks.append(model.register_forward_pre_hook(before, with_kwargs=True))
        self._hooks.append(model.register_forward_hook(after))
        if hasattr(model, "cache_context"):
            model.__dict__["cache_context"] = _CacheContext(model, state)
        for index, (_, module, _) in enumerate(state.modules):
            wrapper = state.adapter.wrapper(module, state.key, index)
            state.wrappers.append(wrapper)
            wrapper.attach(module)

    def undo(self) -> None:
        """Put everything back, also after a patch that was interrupted half-way."""
        replaced = []
        for (name, module, _), wrapper in zip(
            self.state.modules, self.state.wrappers, strict=False
        ):
            if not wrapper.detach(module):
                replaced.append(f"{name}.{wrapper.place}")
        for hook in self._hooks:
            hook.remove()
        if isinstance(vars(self.model).get("cache_context"), _CacheContext):
            if self._own_cache_context is None:
                del self.model.__dict__["cache_context"]
            else:
                self.model.__dict__["cache_context"] = self._own_cache_context
        self.state.release()
        if replaced:
            warnings.warn(
                f"these were replaced after sparsediff.enable() and are left as they are: "
                f"{', '.join(replaced)}",
                RuntimeWarning,
                stacklevel=3,
            )


class PipelinePatch:
    """The progress bar of an enabled pipeline."""

    def __init__(self, pipe: object) -> None:
        self._pipe = weakref.ref(pipe)
        own = vars(pipe).get("progress_bar")
        if isinstance(own, _ProgressBar):  # a shallow copy of an enabled pipeline carries it along
            del pipe.progress_bar
            own = None
        self._own = own

    def apply(self, handle: Handle) -> None:
        """Change the pipeline."""
        pipe = self._pipe()
        pipe.progress_bar = _ProgressBar(handle, pipe)

    def undo(self) -> None:
        """Put the bar back, unless somebody has replaced ours since."""
        pipe = self._pipe()
        if pipe is None or not isinstance(vars(pipe).get("progress_bar"), _ProgressBar):
            return
        del pipe.progress_bar
        if self._own is not None:
            pipe.progress_bar = self._own


def handle_of(target: object) -> Handle | None:
    """The handle that an enabled transformer or pipeline carries."""
    if isinstance(target, nn.Module):
        hooks = target._forward_pre_hooks.values()
        return next((h.handle for h in hooks if isinstance(h, _BeforeForward)), None)
    bar = vars(target).get("progress_bar")
    return bar.handle if isinstance(bar, _ProgressBar) else None


# nn.Module hooks survive offloading, which silently drops wrappers of `forward`; and run eagerly they are not replayed
# one call late by Dynamo.


class _BeforeForward:
    def __init__(self, handle: Handle, state: RunState) -> None:
        self.handle, self.state = handle, state

    @torch.compiler.disable
    def __call__(self, module, args, kwargs):
        self.state.begin_forward(module, args, kwargs)

    def __reduce__(self):
        return _no_hook, ()


class _AfterForward:
    def __init__(self, state: RunState) -> None:
        self.state = state

    @torch.compiler.disable
    def __call__(self, module, args, output):
        self.state.end_forward()

    def __reduce__(self):
        return _no_hook, ()


class _CacheContext:
    """`model.cache_context(name)`, overheard: it says which guidance branch a call belongs to."""

    def __init__(self, model: nn.Module, state: RunState) -> None:
        self.model, self.state = model, state
        self._stock = model.cache_context

    @contextlib.contextmanager
    def __call__(self, name, **fields):
        outer, self.state.context = self.state.context, (name, fields.get("step_index"))
        try:
            with self._stock(name, **fields) as value:
                yield value
        finally:
            self.state.context = outer

    def __reduce__(self):
        return functools.partial, (type(self.model).cache_context, self.model)


class _ProgressBar:
    """`pipe.progress_bar`: its life is the pipeline's run; it shows density and estimated speed-up as well."""

    def __init__(self, handle: Handle, pipe: object) -> None:
        self.handle, self._pipe, self._stock = handle, pipe, pipe.progress_bar

    @torch.compiler.disable
    def __call__(self, iterable=None, total=None):
        self.handle._warn_of_replaced_transformers(self._pipe)
        bar = self._stock(iterable=iterable, total=total)
        bar.close = _Close(bar.close, self.handle._clock)
        return show_density(bar, self.handle.recorder)

    def __reduce__(self):
        return functools.partial, (type(self._pipe).progress_bar, self._pipe)


class _Close:
    """Opens a run, and closes it with the bar: tqdm calls `close` however a `with` block or a loop over it ends."""

    def __init__(self, stock, clock: Clock) -> None:
        self._stock, self._clock, self._run = stock, clock, clock.open_run()

    def __call__(self):
        self._clock.close_run(self._run)
        return self._stock()


def _no_hook():
    return _nothing


def _nothing(*_):
    return None
