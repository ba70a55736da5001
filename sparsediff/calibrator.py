"""Measuring a `Calibration`: run the prompts, let the method's calibrator watch every attention call."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sparsediff.adapter import weight_dtype
from sparsediff.calibration import Calibration, Calibrator, Call, ModelLayout
from sparsediff.calibration_memory import relative_error
from sparsediff.methods import CalibratedMethod, Method, build_method
from sparsediff.progress import step_bar
from sparsediff.report import RunReport

PARTIAL = "partial.pt"
OURS = ("prompt", "generator", "output_type")  # arguments of the pipeline's call


class AttentionError(Calibrator):
    """Relative L2 error of the sparse outputs of an enabled method, call by call; feeds the sparse output forward."""

    def __init__(self) -> None:
        self.total = 0.0
        self.calls = 0

    def attend(self, call: Call) -> Tensor:
        """Both outputs, where the schedule lets the method choose."""
        if call.sparse is None:
            return call.dense()
        output, was_sparse = call.sparse()
        if not was_sparse:  # a search in a dense call is no approximation
            return output
        # Read back at once: two experts may be on two devices.
        self.total += relative_error(output, call.dense(), 2).item()
        self.calls += 1
        return output

    def tensors(self) -> dict[str, Tensor]:
        """Nothing to store."""
        return {}

    def state(self) -> dict[str, object]:
        """What has been summed."""
        return {"total": self.total, "calls": self.calls}

    def load_state(self, state: dict[str, object]) -> None:
        """Go on summing."""
        self.total, self.calls = state["total"], state["calls"]

    @property
    def mean(self) -> float:
        """Over the sparse calls."""
        return self.total / max(1, self.calls)


def calibrate(
    pipe: object,
    method: str | Method,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
    call: dict[str, object] | None = None,
    **method_params: object,
) -> Calibration:
    """Measure what a method needs on a pipeline, and what density and attention error it then reaches.

    Args:
        pipe: a diffusers pipeline; stock before and after.
        method: `"paro_attention"`, `"sparse_vdit"`, `"lite_attention"`, or a configured one of them.
        prompts: one or two are what the papers use; every one is generated once a pass and once for the error.
        seed: of the noise; prompt `i` gets `seed + i`.
        folder: where the artefact goes, and unfinished work until then: the same call picks it up again.
        progress: show progress bars over generations and their steps, and say what became of unfinished work.
        call: arguments of the pipeline's call, such as `num_frames`; the size and the number of steps count.
        method_params: parameters of the method by name.

    Raises:
        ValueError: no prompts, a method that needs none, a model that is not supported, a pipeline that is enabled, or
            a run whose attention no method can serve, or sums that the host's memory cannot hold.
        TypeError: a bare transformer.
    """
    from tqdm.auto import tqdm

    from sparsediff.api import model_layout, require_stock_pipeline, watch

    method = build_method(method, **method_params)
    if not isinstance(method, CalibratedMethod):
        raise ValueError(f"{method.name} measures nothing beforehand; enable it as it is")
    if not prompts or isinstance(prompts, str):
        raise ValueError("prompts must be a list of at least one prompt")
    if ours := [name for name in OURS if name in (call or {})]:
        raise ValueError(
            f"call must not hold {', '.join(ours)}: calibrate() sets {', '.join(OURS)} itself, from prompts and seed"
        )
    require_stock_pipeline(pipe)
    method = replace(method, calibration=None)
    layout = model_layout(pipe)
    work = _Work(folder, _fingerprint(pipe, method, layout, prompts, seed, call))
    calibrator = method.calibrator(layout)
    total = (calibrator.passes + 1) * len(prompts)
    grids = set(work.resume(calibrator))

    def say(text: str) -> None:
        if progress:
            tqdm.write(text, file=sys.stderr)

    with (
        tqdm(
            total=total, initial=work.done, disable=not progress, desc=f"calibrate {method.name}"
        ) as bar,
        _saying_what_is_kept(work, total, say),
    ):
        if work.note:
            say(work.note)

        def generate(watched: Calibrator, i: int, method: CalibratedMethod) -> RunReport:
            calls = []

            def attend(call: Call) -> Tensor:
                calls.append(call.site.name)
                # Of the forward: a call may see fewer tokens, or see them in another order.
                grids.add(handle.recorder.grid)
                if method.bound_to_grid and len(grids) > 1:
                    raise ValueError(
                        f"{method.name} is measured at one size, and the prompts ran at several: "
                        f"{', '.join(sorted(grids))}; give the size in call={{...}}"
                    )
                return watched.attend(call)

            with step_bar(pipe, shown=progress), watch(pipe, attend, method=method) as handle:
                generator = torch.Generator("cpu").manual_seed(seed + i)
                pipe(prompt=prompts[i], generator=generator, output_type="latent", **(call or {}))
                report = handle.report()
            if not calls:
                reasons = "; ".join(report.dense_calls) or "it makes none"
                raise ValueError(f"no attention call of this run can be sparse: {reasons}")
            bar.update()
            return report

        for number in range(calibrator.passes):
            for i in range(len(prompts)):
                if (index := number * len(prompts) + i) < work.done:
                    continue
                calibrator.begin_generation(number)
                generate(calibrator, i, method)
                work.save(calibrator, index + 1, sorted(grids))
        calibration = Calibration(
            method=method.name,
            parameters=method.parameters(),
            model=layout,
            grid=grids.pop() if method.bound_to_grid else None,
            tensors=calibrator.tensors(),
        )
        calibration = _measure(calibration, method, prompts, generate)
    calibration = replace(calibration, provenance=_provenance(pipe, prompts, seed, call))
    if folder is not None:
        calibration.save_pretrained(folder)
        work.clear()
    return calibration


def _measure(calibration, method, prompts, generate) -> Calibration:
    error, densities = AttentionError(), []
    for i in range(len(prompts)):
        report = generate(error, i, method.calibrated(calibration, given=()))
        densities.append(report.density)
    return replace(calibration, density=sum(densities) / len(densities), error=error.mean)


class _Work:
    """Unfinished work in a folder: whatever was seen, and for what; `note` says what became of an earlier run's."""

    def __init__(self, folder: str | Path | None, fingerprint: dict[str, str]) -> None:
        self.path = None if folder is None else Path(folder) / PARTIAL
        self.fingerprint, self.done, self.note = fingerprint, 0, ""

    def resume(self, calibrator: Calibrator) -> list[str]:
        """Go on from what is there, if it is for the same; returns the grids that were met."""
        if self.path is None or not self.path.exists():
            return []
        try:
            # Only numbers, strings and tensors are ever in it.
            stored = torch.load(self.path, weights_only=True)
            before, done, grids, state = (
                stored[name] for name in ("fingerprint", "done", "grids", "state")
            )
            differ = [name for name, mark in self.fingerprint.items() if before.get(name) != mark]
            if not differ:
                calibrator.load_state(state)
        except Exception:  # a torn file makes `torch.load` raise nearly anything
            self.note = f"starting over: {self.path} is damaged"
            return []
        if differ:
            self.note = f"starting over: {self.path} was made with another {', '.join(differ)}"
            return []
        self.done, self.note = done, f"resuming: {self.path} ends after generation {done}"
        return grids

    def save(self, calibrator: Calibrator, done: int, grids: list[str]) -> None:
        self.done = done
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        stored = {"fingerprint": self.fingerprint, "done": done, "grids": grids}
        fresh = self.path.with_suffix(".new")
        torch.save({**stored, "state": calibrator.state()}, fresh)
        fresh.replace(self.path)

    def clear(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def _saying_what_is_kept(work: _Work, total: int, say: Callable[[str], None]) -> Iterator[None]:
    """On Ctrl-C; nothing to say where there is no folder."""
    try:
        yield
    except KeyboardInterrupt:
        if work.path is not None:
            kept = (
                f"{work.done} of {total} generations are kept in {work.path.parent}; the same again goes on from there"
                if work.done
                else "no generation was finished, so nothing is kept"
            )
            say(f"stopped: {kept}")
        raise


def _fingerprint(
    pipe: object,
    method: Method,
    layout: ModelLayout,
    prompts: Sequence[str],
    seed: int,
    call: dict | None,
) -> dict[str, str]:
    """A mark of each thing that work can be unfinished for, by the word that names it."""
    import sparsediff

    scheduler = getattr(pipe, "scheduler", None)
    parts = {
        "method": str(method),
        "model": (model_name(pipe), layout),
        "weights or dtype": weight_marks(pipe, layout),
        "scheduler": (type(scheduler).__name__, dict(getattr(scheduler, "config", {}))),
        "device": pipe._execution_device.type,
        "prompts": list(prompts),
        "seed": seed,
        "call": _content(call or {}),
        "version of sparsediff": sparsediff.__version__,
    }
    return {name: _sha256(repr(part).encode()) for name, part in parts.items()}


def _content(value: object) -> object:
    """What a value holds, the same in every process.

    The representation of an image tells where it lies in memory, that of a tensor leaves most of it out.
    """
    if isinstance(value, dict):
        return sorted((str(name), _content(x)) for name, x in value.items())
    if isinstance(value, list | tuple):
        return [_content(x) for x in value]
    if isinstance(value, Tensor):
        bits = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        return str(value.dtype), tuple(value.shape), _sha256(bits.numpy().tobytes())
    if hasattr(value, "tobytes"):  # an array or an image
        size = getattr(value, "shape", None) or getattr(value, "size", None)
        return type(value).__name__, size, _sha256(value.tobytes())
    if callable(value) or type(value).__repr__ is object.__repr__:
        return getattr(value, "__qualname__", type(value).__qualname__)
    return repr(value)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def weight_marks(pipe: object, layout: ModelLayout) -> list[tuple]:
    """Type and shape of every parameter of the transformers, and the sum of its first entries where it holds any."""
    marks = []
    for name in layout.transformers:
        for parameter in getattr(pipe, name).parameters():
            start = parameter.detach()
            # Offloaded ones are on "meta", and quantised ones are tensors of their own kind.
            known = type(start) is Tensor and not start.is_meta
            total = start.reshape(-1)[:4096].cpu().double().sum().item() if known else None
            marks.append((parameter.dtype, tuple(parameter.shape), total))
    return marks


def model_name(pipe: object) -> str:
    """Where it was loaded from, else its class."""
    return str(getattr(pipe, "name_or_path", "") or type(pipe).__name__)


def _provenance(pipe: object, prompts: Sequence[str], seed: int, call: dict | None) -> dict:
    import diffusers

    import sparsediff

    device = next(pipe.transformer.parameters()).device
    return {
        "model": model_name(pipe),
        "prompts": len(prompts),
        "prompts_sha256": _sha256(json.dumps(list(prompts)).encode()),
        "seed": seed,
        "call": {k: v for k, v in (call or {}).items() if isinstance(v, int | float | str)},
        "dtype": str(weight_dtype(pipe.transformer)).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "sparsediff": sparsediff.__version__,
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
