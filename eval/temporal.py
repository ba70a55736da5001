"""How a clip changes from frame to frame: flicker, and what of it motion does not explain.

Both look at one clip alone and count motion or its estimate in, so they mean something beside the dense clip's value.
The warping error is that of Lai et al. (Learning Blind Video Temporal Consistency, ECCV 2018): a frame is compared with
the next one carried back along the optical flow, where the flow there and back agrees.  The flow is TV-L1 from
scikit-image, on frames whose shorter side is at most `FLOW_SIZE` pixels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FLOW_SIZE = 256
FLOW = {"num_warp": 3, "num_iter": 5}  # a fifth of the default's time for the same errors
LEVELS = 255.0


def flicker(video: Tensor) -> tuple[float, ...]:
    """Mean absolute change between consecutive frames of `[F, H, W, 3]` in [0, 1], in levels of 255; F - 1 values.

    Raises:
        ValueError: fewer than two frames.
    """
    _require_two_frames(video)
    change = (video[1:].float() - video[:-1].float()).abs().flatten(1).mean(1)
    return tuple((change * LEVELS).tolist())


def warping_error(video: Tensor) -> tuple[float, ...]:
    """Mean absolute change between consecutive frames that motion does not explain, in levels of 255; F - 1 values.

    Args:
        video: `[F, H, W, 3]` in [0, 1], at least 16 pixels high and wide.

    Raises:
        ValueError: fewer than two frames, or frames too small for a flow.
        ImportError: without scikit-image (`pip install 'sparsediff[eval]'`).
    """
    _require_two_frames(video)
    if min(video.shape[1:3]) < 16:
        raise ValueError(
            f"optical flow needs frames of at least 16 x 16 pixels, got {list(video.shape[1:3])}"
        )
    frames = _shrink(video.float().cpu())
    grey = frames.mean(-1).numpy()
    pairs = zip(frames[:-1].numpy(), frames[1:].numpy(), grey[:-1], grey[1:], strict=True)
    return tuple(_unexplained(*pair) for pair in pairs)


def _unexplained(
    first: np.ndarray, second: np.ndarray, grey: np.ndarray, grey2: np.ndarray
) -> float:
    there, back = _flow(grey, grey2), _flow(grey2, grey)
    carried = _carry(second, there)
    returned = there + np.moveaxis(_carry(np.moveaxis(back, 0, -1), there), -1, 0)
    length = np.square(there).sum(0) + np.square(back).sum(0)
    # Where the way there and back does not meet, something was covered or uncovered (Sundaram et al., ECCV 2010).
    seen = np.square(returned).sum(0) <= 0.01 * length + 0.5
    if not seen.any():
        seen[:] = True
    return float(np.abs(first - carried)[seen].mean() * LEVELS)


def _flow(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """`[2, H, W]`: where each pixel of `one` is found in `two`, in pixels down and right."""
    try:
        from skimage.registration import optical_flow_tvl1
    except ImportError:
        raise ImportError(
            "the warping error needs scikit-image; pip install 'sparsediff[eval]'"
        ) from None
    if np.array_equal(one, two):
        return np.zeros((2, *one.shape), np.float32)
    return optical_flow_tvl1(one, two, dtype=np.float32, **FLOW)


def _carry(picture: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """`picture [H, W, C]` read at every pixel plus `flow`, between pixels linearly, at the border from its edge."""
    height, width = picture.shape[:2]
    rows, columns = np.mgrid[:height, :width] + flow
    at = np.stack([2 * columns / max(width - 1, 1) - 1, 2 * rows / max(height - 1, 1) - 1], -1)
    source = torch.from_numpy(np.ascontiguousarray(picture, np.float32)).movedim(-1, 0)[None]
    grid = torch.from_numpy(at.astype(np.float32))[None]
    out = F.grid_sample(source, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return out[0].movedim(0, -1).numpy()


def _shrink(video: Tensor) -> Tensor:
    shorter = min(video.shape[1:3])
    if shorter <= FLOW_SIZE:
        return video
    scale = FLOW_SIZE / shorter
    size = [round(side * scale) for side in video.shape[1:3]]
    small = F.interpolate(video.movedim(-1, 1), size=size, mode="area")
    return small.movedim(1, -1)


def _require_two_frames(video: Tensor) -> None:
    if len(video) < 2:
        raise ValueError("changes from frame to frame need at least two frames")
