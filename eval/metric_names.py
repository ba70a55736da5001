"""Every metric by name: its unit, which way is better, and what it means in one line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a number is.

    Attributes:
        name: key of `ClipResult.metrics`.
        label: for people.
        unit: "" for a pure number.
        higher_is_better: None where neither is: less flicker than the dense clip may be a frozen picture.
        against_dense: whether it compares with the dense clip of the same prompt and seed; the others look at one clip
            alone and mean something as a difference to the dense clip's.
        meaning: one line.
    """

    name: str
    label: str
    unit: str
    higher_is_better: bool | None
    against_dense: bool
    meaning: str


def _vbench(dimension: str, meaning: str) -> Metric:
    return Metric(
        name=f"vbench_{dimension}",
        label=f"VBench {dimension.replace('_', ' ')}",
        unit="",
        higher_is_better=True,
        against_dense=False,
        meaning=meaning,
    )


_ALL = (
    Metric(name="psnr", label="PSNR", unit="dB", higher_is_better=True, against_dense=True,
           meaning="closeness to the dense clip pixel by pixel, from the mean squared error of the clip; infinite if identical"),
    Metric(name="ssim", label="SSIM", unit="", higher_is_better=True, against_dense=True,
           meaning="likeness of local structure to the dense clip, mean over frames, at most 1"),
    Metric(name="ms_ssim", label="MS-SSIM", unit="", higher_is_better=True, against_dense=True,
           meaning="SSIM over five scales; needs frames of at least 176 x 176 pixels"),
    Metric(name="lpips", label="LPIPS", unit="", higher_is_better=False, against_dense=True,
           meaning="perceptual distance to the dense clip (AlexNet, package lpips), mean over frames, 0 if identical"),
    Metric(name="st_lpips", label="ST-LPIPS", unit="", higher_is_better=False, against_dense=True,
           meaning="shift-tolerant perceptual distance to the dense clip, mean over frames; not interchangeable with LPIPS"),
    Metric(name="latent_divergence", label="latent divergence", unit="", higher_is_better=False, against_dense=True,
           meaning="relative L2 distance of the final latents to the dense arm's, before the decoder hides or adds anything"),
    Metric(name="attention_error", label="attention error", unit="", higher_is_better=False, against_dense=True,
           meaning="relative L1 error of attention outputs against dense attention on the same inputs, mean over sampled calls"),
    Metric(name="flicker", label="flicker", unit="levels of 255", higher_is_better=None, against_dense=False,
           meaning="mean absolute change between consecutive frames, motion included; compare with the dense clip's"),
    Metric(name="warping_error", label="warping error", unit="levels of 255", higher_is_better=False, against_dense=False,
           meaning="mean absolute change between consecutive frames that motion (optical flow) does not explain"),
    _vbench("subject_consistency", "the subject looks the same throughout"),
    _vbench("background_consistency", "the background looks the same throughout"),
    _vbench("temporal_flickering", "static parts do not flicker"),
    _vbench("motion_smoothness", "motion is smooth"),
    _vbench("dynamic_degree", "share of clips with large motion"),
    _vbench("aesthetic_quality", "aesthetic score of frames"),
    _vbench("imaging_quality", "absence of blur, noise and over-exposure"),
)  # fmt: skip

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
