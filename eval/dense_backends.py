"""The fastest exact dense attention that a pipeline can have on this machine: what a speed-up should be measured against."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from sparsediff.eval.measure import denoisers, denoising_seconds, warm_up

# diffusers' names of backends that compute exact softmax attention in the dtype of the model.  Those that quantise are
# no dense baseline.
EXACT = ("native", "_native_cudnn", "_native_flash", "_native_efficient", "flash", "_flash_3", "flash_4_hub", "xformers")  # fmt: skip
STEPS = 2
NEAR = 1.1  # a backend within this of the fastest is timed again
AGAIN = 2
FASTER = 0.97  # of the pipeline's own time: two runs of one backend differ by a few percent


def best_backend(pipe: object, arguments: dict[str, object]) -> tuple[str | None, str]:
    """Name of the backend whose steps are fastest, and the times of all in words.

    None if no backend is faster than the pipeline's own by more than two runs of one differ, or none can be chosen.
    """
    if not _choosers(pipe):
        return None, "the attention processors of this model choose no backend"
    if pipe._execution_device.type == "cpu":
        return None, "on a CPU PyTorch's own attention is the only exact backend"
    times = backend_seconds(pipe, arguments)
    words = ", ".join(f"{n or 'own'} {t / STEPS:.3f} s" for n, t in times.items())
    fastest = min(times, key=times.get)
    if fastest is None or times[fastest] > FASTER * times[None]:
        return None, f"no exact backend is faster than the pipeline's own; a step takes: {words}"
    return fastest, f"a step takes: {words}"


def backend_seconds(pipe: object, arguments: dict[str, object]) -> dict[str | None, float]:
    """Seconds that a few denoising steps take on the pipeline's own backend (None) and on each of `EXACT` that runs.

    The fastest, those near it and the pipeline's own take turns and are told by their best time.
    """
    few = {**arguments, "num_inference_steps": STEPS}
    warm_up(pipe, few)
    times: dict[str | None, float] = {None: denoising_seconds(pipe, few)}
    for name in EXACT:
        # Whatever a backend cannot do, from a missing package to a mask, it says by an exception of its own choice.
        with contextlib.suppress(Exception), attention_backend(pipe, name):
            warm_up(pipe, few)
            times[name] = denoising_seconds(pipe, few)
    best = min(times.values())
    near = [name for name, seconds in times.items() if name is None or seconds <= NEAR * best]
    for _ in range(AGAIN if len(near) > 1 else 0):
        for name in near:
            lent = contextlib.nullcontext() if name is None else attention_backend(pipe, name)
            with lent:
                times[name] = min(times[name], denoising_seconds(pipe, few))
    return times


@contextlib.contextmanager
def attention_backend(pipe: object, name: str) -> Iterator[None]:
    """Dense attention runs on a backend of diffusers, and afterwards on what it ran before.

    `set_attention_backend` would also change the process-wide default and could not be taken back.

    Raises:
        ValueError: diffusers knows no such backend, or the model's processors choose none.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName

    try:
        backend = AttentionBackendName(name)
    except ValueError:
        known = ", ".join(member.value for member in AttentionBackendName)
        raise ValueError(f"diffusers knows no attention backend {name!r}; known: {known}") from None
    processors = _choosers(pipe)
    if not processors:
        raise ValueError("the attention processors of this model choose no backend")
    before = [(p, p._attention_backend) for p in processors]
    try:
        for processor in processors:
            processor._attention_backend = backend
        yield
    finally:
        for processor, backend in before:
            processor._attention_backend = backend


def own_backend(pipe: object) -> str:
    """The backend that dense attention of the pipeline runs on; "" is diffusers' default."""
    names = {getattr(p._attention_backend, "value", p._attention_backend) for p in _choosers(pipe)}
    return " and ".join(sorted(str(n) for n in names if n is not None))


def _choosers(pipe: object) -> list[object]:
    found = (getattr(m, "processor", None) for model in denoisers(pipe) for m in _modules(model))
    return [p for p in found if hasattr(p, "_attention_backend")]


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    return getattr(model, "_orig_mod", model).modules()
