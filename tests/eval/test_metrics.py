"""Metrics against independent implementations, and on distortions whose order is known."""

import math

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from sparsediff.eval.metrics import fidelity


@pytest.fixture(scope="module")
def clip():
    """A moving pattern `[F, H, W, 3]` in [0, 1]."""
    t, y, x = torch.meshgrid(
        torch.arange(4.0), torch.linspace(0, 6, 40), torch.linspace(0, 9, 56), indexing="ij"
    )
    return torch.stack([torch.sin(x + t), torch.cos(y - t), torch.sin(x * y / 5)], -1) * 0.4 + 0.5


def noisy(clip, sigma, seed=0):
    return (
        clip + sigma * torch.randn(clip.shape, generator=torch.Generator().manual_seed(seed))
    ).clamp(0, 1)


def test_psnr_agrees_with_scikit_image(clip):
    other = noisy(clip, 0.05)
    ours = fidelity(other, clip)
    theirs = peak_signal_noise_ratio(clip.double().numpy(), other.double().numpy(), data_range=1.0)
    assert ours.psnr == pytest.approx(theirs, abs=1e-6)
    frames = [
        peak_signal_noise_ratio(a.double().numpy(), b.double().numpy(), data_range=1.0)
        for a, b in zip(clip, other, strict=True)
    ]
    assert ours.frame_psnr == pytest.approx(frames, abs=1e-6)


def test_ssim_agrees_with_scikit_image(clip):
    other = noisy(clip, 0.05)
    theirs = [
        structural_similarity(
            a.double().numpy(), b.double().numpy(), data_range=1.0, channel_axis=-1,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )
        for a, b in zip(clip, other, strict=True)
    ]  # fmt: skip
    # The two treat the borders differently.
    assert fidelity(other, clip).frame_ssim == pytest.approx(theirs, abs=5e-3)


def test_more_distortion_is_worse(clip):
    results = [fidelity(noisy(clip, sigma), clip) for sigma in (0.0, 0.02, 0.1, 0.3)]
    assert [r.psnr for r in results] == sorted((r.psnr for r in results), reverse=True)
    assert [r.ssim for r in results] == sorted((r.ssim for r in results), reverse=True)


def test_identical_and_black_videos(clip):
    same = fidelity(clip, clip)
    assert math.isinf(same.psnr)
    assert same.ssim == pytest.approx(1.0)
    black = fidelity(torch.zeros_like(clip), clip)
    assert math.isfinite(black.psnr)
    assert black.ssim < 0.5
    assert math.isinf(fidelity(torch.zeros_like(clip), torch.zeros_like(clip)).psnr)


@pytest.mark.parametrize("shape", [(3, 40, 56, 3), (4, 40, 55, 3), (4, 3, 40, 56)])
def test_different_shapes_are_refused(clip, shape):
    with pytest.raises(ValueError, match="one shape"):
        fidelity(torch.zeros(shape), clip)


def test_nan_is_refused(clip):
    spoilt = clip.clone()
    spoilt[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="the video holds NaN"):
        fidelity(spoilt, clip)
