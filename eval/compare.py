"""One prompt twice, dense and sparse: what it cost and what it gained."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import sparsediff
from sparsediff.eval.arms import sparse_arm
from sparsediff.eval.environment import environment
from sparsediff.eval.measure import generate, warm_up
from sparsediff.eval.metrics import Fidelity, fidelity
from sparsediff.eval.video import contact_sheet, side_by_side, write_mp4
from sparsediff.methods import Method
from sparsediff.report import RunReport
from sparsediff.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate.  None leaves a value to the pipeline."""

    prompt: str
    negative_prompt: str | None = None
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    text_tokens: int | None = None  # the pipeline pads the prompt to so many
    seed: int = 0

    def arguments(self) -> dict[str, object]:
        """Keyword arguments of the pipeline's call."""
        named = {
            "negative_prompt": self.negative_prompt,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "height": self.height,
            "width": self.width,
            "num_frames": self.frames,
            "max_sequence_length": self.text_tokens,
        }
        given = {name: value for name, value in named.items() if value is not None}
        generator = torch.Generator("cpu").manual_seed(self.seed)
        return {"prompt": self.prompt, "generator": generator, "output_type": "np", **given}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A sparse run beside its dense twin: same prompt, seed, steps and scheduler.

    One clip says what happened to that clip; it is no mean over prompts.
    """

    model: str
    request: Request
    method: str
    schedule: str
    report: RunReport
    fidelity: Fidelity
    dense_seconds: float
    sparse_seconds: float
    dense_denoiser_seconds: float
    sparse_denoiser_seconds: float
    environment: dict[str, str]

    @property
    def speedup(self) -> float:
        """Dense time over sparse time, the whole call with text encoding and decoding."""
        return self.dense_seconds / self.sparse_seconds

    @property
    def denoiser_speedup(self) -> float:
        """The same for the transformer alone."""
        return self.dense_denoiser_seconds / self.sparse_denoiser_seconds

    def to_json(self) -> str:
        """As JSON text; an infinite PSNR (identical videos) is written as null."""
        data = dataclasses.asdict(self)
        data |= {"speedup": self.speedup, "denoiser_speedup": self.denoiser_speedup}
        return json.dumps(_finite(data), indent=2)

    def __str__(self) -> str:
        psnr = "identical" if math.isinf(self.fidelity.psnr) else f"{self.fidelity.psnr:.2f} dB"
        rows = [
            ("density", f"{self.report.density:.3f}", "of dense attention, over all steps"),
            ("PSNR", psnr, "to the dense video; higher is better"),
            ("SSIM", f"{self.fidelity.ssim:.4f}", "at most 1; higher is better"),
            ("denoiser", f"{self.denoiser_speedup:.2f}x", f"{self.dense_denoiser_seconds:.1f} s dense, {self.sparse_denoiser_seconds:.1f} s sparse"),
            ("whole call", f"{self.speedup:.2f}x", f"{self.dense_seconds:.1f} s dense, {self.sparse_seconds:.1f} s sparse, with text and decoding"),
        ]  # fmt: skip
        return "\n".join(f"  {name:<11}{value:>10}   {note}" for name, value, note in rows)


def compare(
    pipe: object,
    request: Request,
    method: str | Method = "auto",
    *,
    schedule: Schedule | None = None,
    model: str = "",
    **method_params: object,
) -> tuple[Comparison, Tensor, Tensor]:
    """Generate `request` dense (stock) and sparse; leaves the pipeline disabled.

    Returns:
        The comparison, the dense and the sparse video (`float32 [F, H, W, 3]` in [0, 1]).
    """
    # Refuse what cannot run sparse before the dense run, not after it.
    sparsediff.enable(pipe, method, schedule=schedule, **method_params).disable()
    warm_up(pipe, request.arguments(), decode=True)
    dense = generate(pipe, request.arguments())
    sparse_arm(method, **method_params).warm_up(pipe, request.arguments())
    with sparsediff.enable(pipe, method, schedule=schedule, **method_params) as handle:
        sparse = generate(pipe, request.arguments())
        report = handle.report()
    comparison = Comparison(
        model=model,
        request=request,
        method=report.method,
        schedule=report.schedule,
        report=report,
        fidelity=fidelity(sparse.video, dense.video),
        dense_seconds=dense.total_seconds,
        sparse_seconds=sparse.total_seconds,
        dense_denoiser_seconds=dense.denoiser_seconds,
        sparse_denoiser_seconds=sparse.denoiser_seconds,
        environment=environment(),
    )
    return comparison, dense.video, sparse.video


def save_comparison(
    folder: Path, comparison: Comparison, dense: Tensor, sparse: Tensor, *, fps: int
) -> list[Path]:
    """Write both clips, the clips side by side, a sheet of frames and the figures; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    psnr = comparison.fidelity.psnr
    clips = {
        f"dense  {comparison.dense_denoiser_seconds:.1f} s": dense,
        f"sparse  {comparison.sparse_denoiser_seconds:.1f} s, {psnr:.1f} dB": sparse,
        "difference x4": ((sparse - dense).abs() * 4).clamp(0, 1),
    }
    scale = max(1, 256 // dense.shape[1])
    files = [
        folder / name
        for name in ("dense.mp4", "sparse.mp4", "side_by_side.mp4", "frames.png", "comparison.json")
    ]
    write_mp4(files[0], dense, fps)
    write_mp4(files[1], sparse, fps)
    write_mp4(files[2], side_by_side(clips, scale=scale), fps)
    contact_sheet(clips, title=comparison.request.prompt, scale=scale).save(files[3])
    files[4].write_text(comparison.to_json())
    return files


def _finite(x):
    if isinstance(x, dict):
        return {k: _finite(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
