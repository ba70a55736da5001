"""Recording which blocks a run really read, for people who want to look.

```python
with capture(handle, layers=[0, 5], steps=[3, -1]) as seen:
    pipe(prompt)
seen.save("masks.safetensors")
```

Off, it costs nothing; on, every captured call waits for the device to copy its mask (and works out block scores, if asked).
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

import sparsediff
from sparsediff.api import Handle
from sparsediff.block_mask import block_areas
from sparsediff.eval.captured import Capture, CapturedCall
from sparsediff.kernels.block_scores import block_mass
from sparsediff.witness import WitnessedCall

__all__ = ["Capture", "CaptureTooLargeError", "CapturedCall", "capture"]

MAX_BYTES = 256 << 20

REMEDY = "choose fewer layers=, steps=, heads= or branches=, leave scores out, or raise max_bytes="


class CaptureTooLargeError(ValueError):
    """What was chosen cannot fit into `max_bytes`."""


@contextlib.contextmanager
def capture(
    handle: Handle,
    *,
    layers: Collection[int | str] | None = None,
    steps: Collection[int] | None = None,
    heads: Collection[int] | None = None,
    branches: Collection[str] | None = None,
    scores: bool = False,
    max_bytes: int = MAX_BYTES,
) -> Iterator[Capture]:
    """Record the block masks of the last generation that runs inside the `with` block.

    Args:
        handle: of an enabled pipeline.
        layers: names (`component.module`) or places in execution order over all transformers, negative ones from the end;
            None: all.
        steps: from 0, negative ones from the end (where the number of steps is known); None: all.
        heads: numbers; None: all.
        branches: guidance branches by the pipeline's names; None: all.
        scores: also work out the exact softmax mass of every block, whatever the method chose by.  That takes about as
            long as a dense call, at each captured call.
        max_bytes: host memory that tensors may take.  A choice that cannot fit is refused at its first call; one that
            turns out too large stops the recording with a warning, never the run.

    Raises:
        ValueError: a disabled handle, one that is being captured, or an unknown layer or head.
        CaptureTooLargeError: too little `max_bytes`.
    """
    recorder = _Recorder(
        wanted=_layer_names(handle, layers),
        steps=None if steps is None else frozenset(steps),
        heads=None if heads is None else tuple(heads),
        branches=None if branches is None else frozenset(branches),
        scores=scores,
        max_bytes=max_bytes,
    )
    recorder.capture.about = {
        "method": str(handle.method),
        "schedule": str(handle.schedule),
        "sparsediff": sparsediff.__version__,
    }
    states = handle.states
    for state in states:
        state.witness = recorder
    try:
        yield recorder.capture
    finally:
        for state in states:
            state.witness = None


def _layer_names(handle: Handle, layers: Collection[int | str] | None) -> frozenset[str]:
    if not handle.enabled:
        raise ValueError("this handle is disabled: capture inside the `with` block of enable()")
    if any(state.witness is not None for state in handle.states):
        raise ValueError("this handle is being captured already; leave the other `with` first")
    known = [name for state in handle.states for name in state.layers]
    if layers is None:
        return frozenset(known)
    names = set()
    for layer in layers:
        if isinstance(layer, int) and -len(known) <= layer < len(known):
            names.add(known[layer])
        elif layer in known:
            names.add(layer)
        else:
            raise ValueError(
                f"no attention layer {layer!r}; there are {len(known)}, {known[0]} to {known[-1]}"
            )
    return frozenset(names)


@dataclass
class _Recorder:
    """The witness that fills a `Capture`."""

    wanted: frozenset[str]
    steps: frozenset[int] | None
    heads: tuple[int, ...] | None
    branches: frozenset[str] | None
    scores: bool
    max_bytes: int
    capture: Capture = field(default_factory=Capture)
    _held: dict[bytes, Tensor] = field(default_factory=dict)  # digest -> the one copy
    _bytes: int = 0
    _generation: int | None = None

    def __call__(self, call: WitnessedCall) -> None:
        if call.generation != self._generation:
            self._generation = call.generation
            self.capture.calls.clear()
            self.capture.complete = True
            self._held.clear()
            self._bytes = 0
        if not self.capture.complete or not self._is_wanted(call):
            return
        heads = self._heads(call.query.shape[2])
        self._refuse_if_hopeless(call, len(heads))
        bitmap = self._keep(_pick(call.bitmap, heads))
        windows = self._keep(_pick(_windows(call), heads))
        mass = self._keep(self._mass(call, heads))
        if self._bytes > self.max_bytes:
            self.capture.complete = False
            warnings.warn(
                f"mask capture stopped at step {call.step}, {call.layer}: its {self.max_bytes / 2**20:.0f} MiB are full; "
                f"{REMEDY}",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        self.capture.calls.append(
            CapturedCall(
                layer=call.layer,
                step=call.step,
                num_steps=call.num_steps,
                sigma=call.sigma,
                branch=call.branch,
                grid=call.grid,
                block_size=call.block_size,
                dense_reason=call.dense_reason,
                heads=heads,
                windows=() if call.order is None else call.order.windows,
                head_windows=windows,
                bitmap=bitmap,
                mass=mass,
            )
        )

    def _is_wanted(self, call: WitnessedCall) -> bool:
        steps = {call.step} if call.num_steps is None else {call.step, call.step - call.num_steps}
        return (
            call.layer in self.wanted
            and (self.steps is None or bool(steps & self.steps))
            and (self.branches is None or call.branch in self.branches)
        )

    def _heads(self, number: int) -> tuple[int, ...]:
        if self.heads is None:
            return tuple(range(number))
        if wrong := [head for head in self.heads if not 0 <= head < number]:
            raise ValueError(f"no head {wrong[0]}: layers have heads 0 to {number - 1}")
        return self.heads

    def _mass(self, call: WitnessedCall, heads: tuple[int, ...]) -> Tensor | None:
        """Rows as shares, so that half precision has its finest steps where the small blocks are."""
        if not self.scores or call.grid is None or call.query.shape != call.key.shape:
            return None
        tokens = call.query.shape[1]
        query, key = (x[:, :, list(heads)] for x in (call.query, call.key))
        mass = block_mass(query, key, call.block_size, scale=call.scale, kv_lengths=call.kv_lengths)
        rows, _ = block_areas(call.block_size, (tokens, tokens), mass.device)
        return (mass / rows[:, None]).half().cpu()

    def _keep(self, tensor: Tensor | None) -> Tensor | None:
        """The one copy of these contents: most methods keep a mask for many steps."""
        if tensor is None:
            return None
        tensor = tensor.contiguous()
        digest = hashlib.sha256(
            repr((tensor.shape, tensor.dtype)).encode() + tensor.view(torch.uint8).numpy().tobytes()
        ).digest()
        if digest not in self._held:
            self._held[digest] = tensor
            self._bytes += tensor.nbytes
        return self._held[digest]

    def _refuse_if_hopeless(self, call: WitnessedCall, heads: int) -> None:
        """Masks may repeat from step to step, so count them once a layer; scores never do."""
        if call.block_size is None:
            return
        batch, tokens = call.query.shape[:2]
        rows, columns = (-(-tokens // block) for block in call.block_size)
        steps = call.num_steps or 1
        if self.steps is not None:
            steps = min(steps, len(self.steps))
        need = 2 * batch * heads * rows * columns * steps if self.scores else 0
        if call.bitmap is not None:
            need += call.bitmap.shape[0] * heads * rows * -(-columns // 8)
        need *= len(self.wanted)
        if need > self.max_bytes:
            raise CaptureTooLargeError(
                f"capturing {len(self.wanted)} layers takes at least {need / 2**20:.0f} MiB, more than "
                f"max_bytes ({self.max_bytes / 2**20:.0f} MiB); {REMEDY}"
            )


def _pick(tensor: Tensor | None, heads: tuple[int, ...]) -> Tensor | None:
    """A copy of these heads on the CPU; the run goes on writing into the original."""
    if tensor is None:
        return None
    if tensor.shape[1] > 1:
        tensor = tensor[:, list(heads)]
    return tensor.to("cpu", torch.uint8, copy=True)


def _windows(call: WitnessedCall) -> Tensor | None:
    """`[B|1, H]`, the window that each head walks."""
    if call.order is None:
        return None
    if call.windows is not None:
        return call.windows
    heads = call.query.shape[2]
    return torch.tensor([call.order.heads or (0,) * heads])
