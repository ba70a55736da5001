"""A prefix by noise level, in real pipelines under schedulers that are no flow matching."""

import diffusers
import pytest
import torch

import sparsediff
from sparsediff import Schedule
from sparsediff.noise_level import noise_levels
from sparsediff.pipelines import tiny

COGVIDEOX = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "snr_shift_scale": 1.0,
}
# Dense steps of 12 by default, and the noise level of the first.
SCHEDULERS = {
    "its own": (None, 2, 1.0),
    "ddim": (diffusers.CogVideoXDDIMScheduler(**COGVIDEOX), 2, 1.0),
    "dpm": (diffusers.CogVideoXDPMScheduler(**COGVIDEOX), 2, 1.0),
    # starts below 0.95: only the least share is dense
    "non-zero snr": (
        diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
        ),
        2,
        0.90,
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_auto_keeps_its_prefix_under_every_scheduler(name, monkeypatch):
    monkeypatch.setattr("sparsediff.block_attention.CPU_BREAK_EVEN", 2.0)
    scheduler, dense, start = SCHEDULERS[name]
    pipe = tiny.load("tiny-cogvideox")
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipe.scheduler = scheduler
    with sparsediff.enable(pipe) as handle:
        out = pipe(
            "a red star",
            height=64,
            width=64,
            num_frames=17,
            num_inference_steps=12,
            guidance_scale=1.0,
            max_sequence_length=16,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).frames
        steps = handle.report().steps
    assert out.isfinite().all()
    assert [s.dense_share == 1 for s in steps] == [i < dense for i in range(12)]
    assert [s.sigma for s in steps] == noise_levels(pipe.scheduler)
    assert steps[0].sigma == pytest.approx(start, abs=0.005)
    assert handle.schedule == Schedule(dense_above_sigma=0.95, min_dense_share=0.15)
