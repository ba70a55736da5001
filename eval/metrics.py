"""How far one video is from another, and which of the metrics can be had here.

torchmetrics computes SSIM and MS-SSIM; PSNR is exact in double precision.  `metric_names.py` says what each name means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsediff.eval import perceptual, temporal
from sparsediff.eval import st_lpips as shift_tolerant
from sparsediff.eval.metric_names import METRICS
from sparsediff.eval.video import require_same_shape

# Five scales of windows of 11 pixels need this.
MS_SSIM_SIZE = 176
FRAMES_AT_A_TIME = 8
# What is computed from frames; latents, attention and VBench have their own ways.
FRAME_METRICS = ("psnr", "ssim", "ms_ssim", "lpips", "st_lpips", "flicker", "warping_error")


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """A video against its dense twin, per frame and over the clip.

    Attributes:
        psnr: decibels, from the mean squared error of the whole clip; `inf` for identical videos.  Higher is better.
        ssim: mean over frames, at most 1.  Higher is better.
        frame_psnr, frame_ssim: the same per frame.
    """

    psnr: float
    ssim: float
    frame_psnr: tuple[float, ...]
    frame_ssim: tuple[float, ...]


def fidelity(video: Tensor, reference: Tensor) -> Fidelity:
    """Compare two videos `[F, H, W, 3]` of values in [0, 1].

    Raises:
        ValueError: if shapes differ or values are not finite.
        ImportError: without torchmetrics (`pip install 'sparsediff[eval]'`).
    """
    _require_comparable(video, reference)
    frame_ssim = _ssim(video, reference)
    errors = (video.double() - reference.double()).square().flatten(1).mean(1)
    return Fidelity(
        psnr=psnr_from_mse(errors.mean().item()),
        ssim=sum(frame_ssim) / len(frame_ssim),
        frame_psnr=tuple(psnr_from_mse(e) for e in errors.tolist()),
        frame_ssim=frame_ssim,
    )


def psnr_from_mse(error: float) -> float:
    """Decibels for a mean squared error of values in [0, 1]; `inf` where there is none."""
    return math.inf if error == 0 else -10.0 * math.log10(error)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Metrics of a clip by name, and of its frames."""

    clip: dict[str, float]
    frames: dict[str, tuple[float, ...]]


def score(
    names: Sequence[str],
    video: Tensor,
    reference: Tensor | None = None,
    *,
    lpips_weights: str | Path | None = None,
) -> Scores:
    """Compute `FRAME_METRICS` of a video `[F, H, W, 3]` in [0, 1]; without a reference only those of one clip alone.

    Raises:
        ValueError: an unknown name, shapes that differ, values that are not finite, frames too few or too small.
        ImportError: a package that a metric needs is not installed; the message says which.
    """
    check_names(names)
    if reference is None:
        names = [n for n in names if not METRICS[n].against_dense]
    else:
        _require_comparable(video, reference)
    frames = {name: FUNCTIONS[name](video, reference, lpips_weights) for name in names}
    clip = {name: sum(curve) / len(curve) for name, curve in frames.items()}
    if "psnr" in frames:  # of the clip's error, not the mean of decibels
        clip["psnr"] = psnr_from_mse((video.double() - reference.double()).square().mean().item())
    return Scores(clip=clip, frames=frames)


def choose(
    names: Sequence[str] | None,
    size: tuple[int, int] | None,
    frames: int | None = None,
    *,
    lpips_weights: str | Path | None = None,
    device: str = "cpu",
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which metrics to compute, and notes on those that cannot be.

    Args:
        names: those asked for, which must be possible; None: all that are, `lpips` only if nothing must be downloaded.
        size: height and width in pixels; None if not known yet.
        frames: of a clip; None if not known yet.
        lpips_weights: file with the network of ST-LPIPS.
        device: where LPIPS would run.

    Raises:
        ValueError: an unknown name, or one that the size rules out.
        ImportError: a package that a named metric needs is not installed.
    """
    if names is not None:
        check_names(names)
    chosen, notes = [], []
    for name in names if names is not None else FRAME_METRICS:
        try:
            _check_possible(name, size, frames, lpips_weights, None if names is None else device)
        except (ValueError, ImportError, OSError) as error:
            if names is not None:
                raise
            notes.append(f"{METRICS[name].label} was not measured: {error}")
        else:
            chosen.append(name)
    return tuple(chosen), tuple(notes)


def check_names(names: Sequence[str]) -> None:
    """Refuse what is not among `FRAME_METRICS`.

    Raises:
        ValueError: the message lists them.
    """
    if unknown := [n for n in names if n not in FRAME_METRICS]:
        raise ValueError(f"unknown metric {', '.join(unknown)}; known: {', '.join(FRAME_METRICS)}")


def _check_possible(
    name: str,
    size: tuple[int, int] | None,
    frames: int | None,
    lpips_weights: str | Path | None,
    device: str | None,
) -> None:
    """Raises what computing the metric would; without a device, also where LPIPS would have to download."""
    if name == "ms_ssim" and size is not None:
        _require_ms_ssim_size(size)
    if METRICS[name].against_dense is False and frames is not None and frames < 2:
        raise ValueError("a clip of one frame has no change from frame to frame")
    if name == "st_lpips" and lpips_weights is None:
        shift_tolerant.installed_weights()
    if name == "st_lpips" and lpips_weights is not None and not Path(lpips_weights).is_file():
        raise OSError(f"there is no file {lpips_weights}")
    if name == "lpips" and device is None:
        perceptual.require_offline()
    elif name == "lpips":
        perceptual.lpips_network(device)


def _require_comparable(video: Tensor, reference: Tensor) -> None:
    require_same_shape(video, reference)
    for name, x in {"video": video, "reference": reference}.items():
        if not x.isfinite().all():
            raise ValueError(f"the {name} holds NaN or infinite values")


def _require_ms_ssim_size(size: tuple[int, int]) -> None:
    if min(size) < MS_SSIM_SIZE:
        raise ValueError(
            f"MS-SSIM needs frames of at least {MS_SSIM_SIZE} x {MS_SSIM_SIZE} pixels, got {size[0]} x {size[1]}"
        )


# -- one function a metric: a value for each frame, or each pair of consecutive ones ----------------------------------


def _psnr(video: Tensor, reference: Tensor, _: object = None) -> tuple[float, ...]:
    errors = (video.double() - reference.double()).square().flatten(1).mean(1)
    return tuple(psnr_from_mse(e) for e in errors.tolist())


def _ssim(video: Tensor, reference: Tensor, _: object = None) -> tuple[float, ...]:
    return _by_frame(_torchmetrics().structural_similarity_index_measure, video, reference)


def _ms_ssim(video: Tensor, reference: Tensor, _: object = None) -> tuple[float, ...]:
    _require_ms_ssim_size(tuple(video.shape[1:3]))
    measure = _torchmetrics().multiscale_structural_similarity_index_measure
    # Products of powers: negative parts, of unlike pictures, would be undefined.
    return _by_frame(measure, video, reference, normalize="relu")


def _by_frame(measure, video: Tensor, reference: Tensor, **options: object) -> tuple[float, ...]:
    """A measure of torchmetrics, some frames at a time: it holds a dozen copies of what it is given."""
    values = []
    for pair in zip(video.split(FRAMES_AT_A_TIME), reference.split(FRAMES_AT_A_TIME), strict=True):
        a, b = (x.movedim(-1, 1).to(torch.float32) for x in pair)
        values += measure(a, b, data_range=1.0, reduction="none", **options).reshape(-1).tolist()
    return tuple(values)


def _lpips(video: Tensor, reference: Tensor, _: object = None) -> tuple[float, ...]:
    return tuple(perceptual.lpips(video, reference).tolist())


def _st_lpips(video: Tensor, reference: Tensor, weights: str | Path | None) -> tuple[float, ...]:
    return tuple(shift_tolerant.st_lpips(video, reference, weights=weights).tolist())


FUNCTIONS: dict[str, Callable[[Tensor, Tensor, object], tuple[float, ...]]] = {
    "psnr": _psnr,
    "ssim": _ssim,
    "ms_ssim": _ms_ssim,
    "lpips": _lpips,
    "st_lpips": _st_lpips,
    "flicker": lambda video, *_: temporal.flicker(video),
    "warping_error": lambda video, *_: temporal.warping_error(video),
}


def _torchmetrics():
    try:
        import torchmetrics.functional.image
    except ImportError:
        raise ImportError("SSIM needs torchmetrics; pip install 'sparsediff[eval]'") from None
    return torchmetrics.functional.image
