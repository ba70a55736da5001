"""Measuring a `Calibration`: run the prompts, let the method's calibrator watch every attention call."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sparsediff.calibration import Calibration, Calibrator, Call, ModelLayout
from sparsediff.methods import CalibratedMethod, Method, build_method
from sparsediff.report import RunReport

PARTIAL = "partial.pt"


class AttentionError(Calibrator):
    """Relative L2 error of the sparse outputs of an enabled method, call by call; feeds the sparse output forward."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.calls = 0

    def attend(self, call: Call) -> Tensor:
        """Both outputs, where the schedule lets the method choose."""
        if call.sparse is None:
            return call.dense()
        dense, sparse = call.dense(), call.sparse()
        difference = (sparse.float() - dense.float()).norm() / dense.float().norm().clamp_min(1e-20)
        self.total = self.total + difference
        self.calls += 1
        return sparse

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
        return float(self.total) / max(1, self.calls)


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
        progress: show a progress bar over generations.
        call: arguments of the pipeline's call, such as `num_frames`; the size and the number of steps count.
        method_params: parameters of the method by name.

    Raises:
        ValueError: no prompts, a method that needs none, a model that is not supported, or a run whose attention no
            method can serve.
    """
    from tqdm.auto import tqdm

    from sparsediff.api import model_layout, watch

    method = build_method(method, **method_params)
    if not isinstance(method, CalibratedMethod):
        raise ValueError(f"{method.name} measures nothing beforehand; enable it as it is")
    if not prompts or isinstance(prompts, str):
        raise ValueError("prompts must be a list of at least one prompt")
    method = replace(method, calibration=None)
    layout = model_layout(pipe)
    work = _Work(folder, _fingerprint(method, layout, prompts, seed, call))
    calibrator = method.calibrator(layout)
    total = (calibrator.passes + 1) * len(prompts)
    grids = set(work.resume(calibrator))
    with tqdm(
        total=total, initial=work.done, disable=not progress, desc=f"calibrate {method.name}"
    ) as bar:

        def generate(watched: Calibrator, i: int, method: CalibratedMethod) -> RunReport:
            calls = []

            def attend(call: Call) -> Tensor:
                calls.append(call.site.name)
                grids.add(str(call.site.grid))
                if method.bound_to_grid and len(grids) > 1:
                    raise ValueError(
                        f"{method.name} is measured at one size, and the prompts ran at several: "
                        f"{', '.join(sorted(grids))}; give the size in call={{...}}"
                    )
                return watched.attend(call)

            with _quiet(pipe), watch(pipe, attend, method=method) as handle:
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
        report = generate(error, i, method.calibrated(calibration))
        densities.append(report.density)
    return replace(calibration, density=sum(densities) / len(densities), error=error.mean)


class _Work:
    """Unfinished work in a folder: whatever was seen, and for what."""

    def __init__(self, folder: str | Path | None, fingerprint: str) -> None:
        self.path = None if folder is None else Path(folder) / PARTIAL
        self.fingerprint, self.done = fingerprint, 0

    def resume(self, calibrator: Calibrator) -> list[str]:
        if self.path is None or not self.path.exists():
            return []
        # Only numbers, strings and tensors are ever in it.
        stored = torch.load(self.path, weights_only=True)
        if stored["fingerprint"] != self.fingerprint:
            return []  # other prompts, parameters or model
        self.done = stored["done"]
        calibrator.load_state(stored["state"])
        return stored["grids"]

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
def _quiet(pipe: object) -> Iterator[None]:
    """One bar for the whole calibration instead of one a generation."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before


def _fingerprint(
    method: Method, layout: ModelLayout, prompts: Sequence[str], seed: int, call: dict | None
) -> str:
    text = repr((str(method), layout, list(prompts), seed, sorted((call or {}).items(), key=str)))
    return hashlib.sha256(text.encode()).hexdigest()


def _provenance(pipe: object, prompts: Sequence[str], seed: int, call: dict | None) -> dict:
    import diffusers

    import sparsediff

    parameter = next(pipe.transformer.parameters())
    return {
        "model": str(getattr(pipe, "name_or_path", "") or type(pipe).__name__),
        "prompts": len(prompts),
        "prompts_sha256": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        "seed": seed,
        "call": {k: v for k, v in (call or {}).items() if isinstance(v, int | float | str)},
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else "cpu",
        "sparsediff": sparsediff.__version__,
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
