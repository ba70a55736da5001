"""LPIPS (Zhang et al., CVPR 2018), computed by its authors' package; `st_lpips.py` is the one that works offline."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from sparsediff.eval.video import require_same_shape


def lpips(video: Tensor, reference: Tensor, *, batch: int = 8) -> Tensor:
    """Distance of each frame of two videos `[F, H, W, 3]` in [0, 1], AlexNet: `float32 [F]`, 0 for equal frames.

    Raises:
        ValueError: shapes differ, or frames are smaller than 64 pixels.
        ImportError: without the package `lpips` and torchvision, or with a torchvision that does not fit torch.
        OSError: AlexNet's weights are neither in torch's cache nor to be downloaded.
    """
    require_same_shape(video, reference)
    if min(video.shape[1:3]) < 64:
        raise ValueError(
            f"LPIPS needs frames of at least 64 x 64 pixels, got {list(video.shape[1:3])}"
        )
    network = lpips_network(str(video.device))
    frames = zip(video.split(batch), reference.split(batch), strict=True)
    with torch.no_grad():
        # The package wants [-1, 1] and colours first.
        parts = [network(*(x.movedim(-1, 1).float() * 2 - 1 for x in pair)) for pair in frames]
    return torch.cat([part.reshape(-1) for part in parts])


@functools.lru_cache(maxsize=2)
def lpips_network(device: str) -> torch.nn.Module:
    """The network on a device; what is missing raises as in `lpips`."""
    try:
        import lpips as package
    except (ImportError, RuntimeError) as error:
        # A torchvision built for another torch raises RuntimeError when imported.
        raise ImportError(
            "LPIPS needs the packages lpips and torchvision, the latter of the same build as torch "
            f"(pip install 'sparsediff[lpips]' on a CUDA machine): {error}.  Without them, use st_lpips"
        ) from None
    try:
        return package.LPIPS(net="alex", verbose=False).eval().to(device)
    except OSError as error:
        raise OSError(
            f"AlexNet's weights for LPIPS cannot be had ({error}); put alexnet-owt-7be5be79.pth into "
            "~/.cache/torch/hub/checkpoints, or use st_lpips"
        ) from None


def require_offline() -> None:
    """Refuse where `lpips` could not run without a download.

    Raises:
        ImportError: a package is not installed.
        OSError: AlexNet is not in torch's cache.
    """
    for name in ("lpips", "torchvision"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(
                f"the package {name} is not installed (pip install 'sparsediff[lpips]' on a CUDA machine)"
            )
    if not list((Path(torch.hub.get_dir()) / "checkpoints").glob("alexnet-*.pth")):
        raise OSError("AlexNet's weights are not in torch's cache; --metrics lpips downloads them")
