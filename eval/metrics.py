"""How far one video is from another.  torchmetrics does the arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


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
    if video.shape != reference.shape or video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(
            f"two videos [F, H, W, 3] of one shape are needed, got {list(video.shape)} and {list(reference.shape)}"
        )
    for name, x in {"video": video, "reference": reference}.items():
        if not x.isfinite().all():
            raise ValueError(f"the {name} holds NaN or infinite values")
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError:
        raise ImportError("SSIM needs torchmetrics; pip install 'sparsediff[eval]'") from None
    a, b = (x.movedim(-1, 1).to(torch.float32) for x in (video, reference))
    ssim = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    errors = (a.double() - b.double()).square().flatten(1).mean(1)
    frame_ssim = tuple(ssim.reshape(-1).tolist())
    return Fidelity(
        psnr=psnr_from_mse(errors.mean().item()),
        ssim=sum(frame_ssim) / len(frame_ssim),
        frame_psnr=tuple(psnr_from_mse(e) for e in errors.tolist()),
        frame_ssim=frame_ssim,
    )


def psnr_from_mse(error: float) -> float:
    """Decibels for a mean squared error of values in [0, 1]; `inf` where there is none."""
    return math.inf if error == 0 else -10.0 * math.log10(error)
