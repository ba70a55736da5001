"""Metrics against independent implementations, and on distortions whose order is known."""

import importlib.util
import math

import pytest
import torch
from random_st_lpips import random_network
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

from sparsediff.eval.metric_names import METRICS
from sparsediff.eval.metrics import FRAME_METRICS, choose, fidelity, score
from sparsediff.eval.perceptual import lpips
from sparsediff.eval.st_lpips import st_lpips


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


# -- every metric of frames -----------------------------------------------------------------------------------------

COMPUTED = ("psnr", "ssim", "ms_ssim", "st_lpips", "flicker", "warping_error")


@pytest.fixture(scope="module")
def moving():
    """A disc over a waving background, `[5, 176, 176, 3]`: large enough for every metric."""
    t, y, x = torch.meshgrid(
        torch.arange(5.0), torch.linspace(-1, 1, 176), torch.linspace(-1, 1, 176), indexing="ij"
    )
    disc = ((x - 0.05 * t) ** 2 + y**2 < 0.1).float()
    waves = 0.5 + 0.2 * torch.sin(9 * (x - 0.03 * t) + 3 * y)
    return torch.stack([waves * (1 - disc) + disc, waves, waves * (1 - 0.5 * disc)], -1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "network.pth"
    torch.save(random_network(), path)
    return path


def blurred(clip, radius):
    frames = clip.movedim(-1, 1)
    kernel = torch.ones(3, 1, 2 * radius + 1, 2 * radius + 1) / (2 * radius + 1) ** 2
    return nn.functional.conv2d(frames, kernel, padding=radius, groups=3).movedim(1, -1)


@pytest.mark.parametrize(
    "distortions",
    [
        [lambda c: c] + [lambda c, s=s: noisy(c, s) for s in (0.02, 0.08, 0.3)],
        [lambda c: c] + [lambda c, r=r: blurred(c, r) for r in (1, 3, 8)],
        [lambda c: c] + [lambda c, s=s: (c + s).clamp(0, 1) for s in (0.02, 0.1, 0.4)],
    ],
    ids=["noise", "blur", "brightness"],
)
def test_known_distortions_order_as_they_should(moving, weights, distortions):
    names = ("psnr", "ssim", "ms_ssim", "st_lpips")
    found = [score(names, d(moving), moving, lpips_weights=weights).clip for d in distortions]
    for name in names:
        values = [f[name] for f in found]
        assert values == sorted(values, reverse=METRICS[name].higher_is_better), name
    assert found[0]["st_lpips"] == 0
    assert math.isinf(found[0]["psnr"])


def test_flicker_and_warping_error_tell_motion_from_flicker(moving):
    """Motion is flicker to the one, and explained to the other; noise is neither's friend."""
    clean = score(("flicker", "warping_error"), moving).clip
    jittery = score(("flicker", "warping_error"), noisy(moving, 0.05)).clip
    frozen = score(("flicker", "warping_error"), moving[:1].repeat(5, 1, 1, 1)).clip
    assert frozen["flicker"] == 0
    assert frozen["warping_error"] == pytest.approx(0, abs=1e-4)
    assert clean["warping_error"] < 0.2 * clean["flicker"]
    assert jittery["flicker"] > clean["flicker"] + 5
    assert jittery["warping_error"] > 5 * clean["warping_error"]


def test_flicker_is_in_levels_of_255():
    clip = torch.zeros(3, 8, 8, 3)
    clip[1] = 10 / 255
    assert score(("flicker",), clip).frames["flicker"] == pytest.approx((10.0, 10.0))


def test_a_shift_is_carried_back_exactly():
    """A picture that moves by three pixels leaves no error but at its border."""
    wide = torch.nn.functional.interpolate(
        torch.rand(1, 3, 20, 30, generator=torch.Generator().manual_seed(0)), size=(80, 120), mode="bicubic"
    ).clamp(0, 1)[0].movedim(0, -1)  # fmt: skip
    clip = torch.stack([wide[:, i : i + 100] for i in (0, 3, 6)])
    found = score(("flicker", "warping_error"), clip).clip
    assert found["flicker"] > 10
    assert found["warping_error"] < 1


def test_large_frames_are_shrunk_for_the_flow():
    clip = torch.rand(2, 300, 520, 3, generator=torch.Generator().manual_seed(0))
    assert len(score(("warping_error",), clip).frames["warping_error"]) == 1


def test_black_frames_have_every_metric(weights):
    black = torch.zeros(3, 176, 176, 3)
    found = score(COMPUTED, black, black, lpips_weights=weights)
    assert math.isinf(found.clip["psnr"])
    assert found.clip["ssim"] == pytest.approx(1)
    assert found.clip["st_lpips"] == 0
    assert found.clip["warping_error"] == 0
    grey = score(COMPUTED, black, black + 0.5, lpips_weights=weights).clip
    assert all(math.isfinite(v) for v in grey.values())


def test_frames_have_as_many_values_as_the_metric_means(moving, weights):
    found = score(COMPUTED, noisy(moving, 0.1), moving, lpips_weights=weights).frames
    for name, curve in found.items():
        assert len(curve) == (5 if METRICS[name].against_dense else 4)
    alone = score(COMPUTED, moving)
    assert set(alone.clip) == {"flicker", "warping_error"}


def test_clips_of_other_lengths_are_refused_with_their_lengths(moving):
    with pytest.raises(ValueError, match="they have 4 and 5 frames"):
        score(("psnr",), moving[:4], moving)
    with pytest.raises(ValueError, match="one shape"):
        score(("psnr",), moving[:, :100], moving)


def test_what_cannot_be_measured_is_noted_or_refused(monkeypatch):
    names, notes = choose(None, (128, 128))
    assert {"psnr", "ssim", "flicker", "warping_error"} <= set(names)
    assert "ms_ssim" not in names
    assert any(
        n.startswith("MS-SSIM was not measured: MS-SSIM needs frames of at least 176")
        for n in notes
    )
    with pytest.raises(ValueError, match="at least 176"):
        choose(["ms_ssim"], (128, 400))
    with pytest.raises(ValueError, match=r"unknown metric psnt; known: psnr"):
        choose(["psnt"], None)
    with pytest.raises(ValueError, match="one frame"):
        choose(["flicker"], None, 1)
    with pytest.raises(OSError, match="there is no file"):
        choose(["st_lpips"], None, lpips_weights="nowhere.pth")
    assert set(names) <= set(FRAME_METRICS)


@pytest.mark.skipif(importlib.util.find_spec("lpips") is not None, reason="lpips is installed")
def test_lpips_without_its_package_says_what_to_do(moving):
    with pytest.raises(ImportError, match=r"pip install 'sparsediff\[lpips\]'.*use st_lpips"):
        lpips(moving, moving)
    with pytest.raises(ImportError, match="packages lpips and torchvision"):
        choose(["lpips"], None)
    assert any("LPIPS was not measured: the package lpips" in n for n in choose(None, None)[1])


def test_lpips_agrees_with_itself(moving):
    """Runs where the packages and AlexNet are at hand."""
    pytest.importorskip("lpips")
    try:
        values = lpips(noisy(moving, 0.1), moving)
    except (ImportError, OSError) as error:
        pytest.skip(str(error))
    assert lpips(moving, moving).abs().max() == 0
    assert (values > 0).all()


@pytest.mark.skipif(
    importlib.util.find_spec("stlpips_pytorch") is not None, reason="weights are installed"
)
def test_st_lpips_without_weights_says_what_to_do(moving):
    with pytest.raises(ImportError, match="pip install --no-deps stlpips-pytorch, or name a file"):
        st_lpips(moving, moving)
