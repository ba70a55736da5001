"""Shift-Tolerant LPIPS (Ghildyal and Liu, ECCV 2022): perceptual distance with weights from a package, offline.

The definition is LPIPS' (Zhang et al., CVPR 2018), the AlexNet trunk is blurred before it is subsampled and was trained
anew: values are not interchangeable with LPIPS and always carry this name.  The weights are those that
`stlpips-pytorch` ships; only they are read from it.
"""

from __future__ import annotations

import functools
import importlib.metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsediff.eval.video import require_same_shape

DISTRIBUTION = "stlpips-pytorch"
WEIGHTS = "alex_shift_tolerant.pth"
# layer number in the stored trunk -> padding; pooling and blurring stand between the first three
CONVOLUTIONS = {0: 2, 5: 2, 9: 1, 11: 1, 13: 1}


def st_lpips(
    video: Tensor, reference: Tensor, *, weights: str | Path | None = None, batch: int = 8
) -> Tensor:
    """Distance of each frame of two videos `[F, H, W, 3]` with values in [0, 1]: `float32 [F]`, 0 for equal frames.

    Args:
        video: on any device; the network runs there.
        reference: of the same shape.
        weights: a file with the network; by default the one of the installed package.
        batch: frames at a time.

    Raises:
        ValueError: shapes differ, or frames are smaller than 32 pixels.
        ImportError: the package with the weights is not installed (`pip install stlpips-pytorch`).
    """
    require_same_shape(video, reference)
    if min(video.shape[1:3]) < 32:
        raise ValueError(
            f"frames of at least 32 x 32 pixels are needed, got {list(video.shape[1:3])}"
        )
    network = _network(str(weights or installed_weights()), str(video.device))
    frames = zip(video.split(batch), reference.split(batch), strict=True)
    return torch.cat([_distance(network, a, b) for a, b in frames])


@torch.no_grad()
def _distance(network: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    both = torch.cat([a, b]).movedim(-1, 1).float() * 2 - 1
    x = (both - network["scaling_layer.shift"]) / network["scaling_layer.scale"]
    total = torch.zeros(len(a), device=a.device)
    for i, (number, padding) in enumerate(CONVOLUTIONS.items()):
        if 0 < i < 3:
            x = _blur(F.max_pool2d(x, 3, 1), network[f"net.slice{i + 1}.{number - 1}.filt"])
        layer = f"net.slice{i + 1}.{number}"
        x = F.conv2d(x, network[f"{layer}.weight"], network[f"{layer}.bias"], padding=padding)
        if i == 0:
            x = _blur(x, network["net.slice1.1.filt"])
        x = x.relu()
        unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
        first, second = unit.chunk(2)
        difference = F.conv2d((first - second).square(), network[f"lin{i}.model.1.weight"])
        total += difference.mean((1, 2, 3))
    return total


def _blur(x: Tensor, kernel: Tensor) -> Tensor:
    """Subsample by 2 after a low-pass filter, channel by channel."""
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=len(kernel))


@functools.lru_cache(maxsize=2)
def _network(path: str, device: str) -> dict[str, Tensor]:
    stored = torch.load(path, map_location=device, weights_only=True)
    return {name: x.float() for name, x in stored.items()}


def installed_weights() -> Path:
    """The file that the package ships.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        files = importlib.metadata.files(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            f"ST-LPIPS needs its weights: pip install --no-deps {DISTRIBUTION}, or name a file with --lpips-weights"
        ) from None
    return next(Path(f.locate()) for f in files if f.name == WEIGHTS)
