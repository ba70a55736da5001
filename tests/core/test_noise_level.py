"""One noise level for all of diffusers' schedulers: against what their own `add_noise` and definitions say."""

import diffusers
import pytest
import torch

from sparsediff import AttentionSite, Auto, DraftAttention, Schedule, TokenGrid
from sparsediff.noise_level import noise_level, noise_levels

STEPS = 20
# What CogVideoX-5b, CogVideoX-2b and Stable Diffusion's models ship with.
COGVIDEOX = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
}
VARIANCE_PRESERVING = {
    "ddpm": lambda: diffusers.DDPMScheduler(),
    "ddim": lambda: diffusers.DDIMScheduler(),
    "ddim inverse": lambda: diffusers.DDIMInverseScheduler(),
    "cogvideox ddim 2b": lambda: diffusers.CogVideoXDDIMScheduler(**COGVIDEOX, snr_shift_scale=3.0),
    "cogvideox ddim 5b": lambda: diffusers.CogVideoXDDIMScheduler(
        **COGVIDEOX, snr_shift_scale=1.0, timestep_spacing="trailing"
    ),
    "cogvideox dpm 5b": lambda: diffusers.CogVideoXDPMScheduler(
        **COGVIDEOX, snr_shift_scale=1.0, timestep_spacing="trailing"
    ),
    "lcm": lambda: diffusers.LCMScheduler(),
    "tcd": lambda: diffusers.TCDScheduler(),
    "pndm": lambda: diffusers.PNDMScheduler(),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(),
    "dpm++": lambda: diffusers.DPMSolverMultistepScheduler(),
    "dpm++ karras": lambda: diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True),
    "dpm++ single": lambda: diffusers.DPMSolverSinglestepScheduler(),
    "deis": lambda: diffusers.DEISMultistepScheduler(),
    "sa": lambda: diffusers.SASolverScheduler(),
    "euler": lambda: diffusers.EulerDiscreteScheduler(),
    "euler continuous": lambda: diffusers.EulerDiscreteScheduler(
        timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True,
        sigma_min=0.002, sigma_max=700.0,
    ),
    "euler ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(),
    "heun": lambda: diffusers.HeunDiscreteScheduler(),
    "kdpm2": lambda: diffusers.KDPM2DiscreteScheduler(),
    "lms": lambda: diffusers.LMSDiscreteScheduler(),
}  # fmt: skip
FLOW = {
    "flow euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
    "flow lcm": lambda: diffusers.FlowMatchLCMScheduler(shift=3.0),
    "flow unipc": lambda: diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    ),
    "flow dpm++": lambda: diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    ),
    "flow inverted": lambda: diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
}
EDM = {
    "edm euler": lambda: diffusers.EDMEulerScheduler(sigma_data=1.0),
    "edm dpm++": lambda: diffusers.EDMDPMSolverMultistepScheduler(),
    "consistency": lambda: diffusers.CMStochasticIterativeScheduler(num_train_timesteps=100),
}
TOKENS = {
    "block refinement": lambda: diffusers.BlockRefinementScheduler(),
}
ALL = VARIANCE_PRESERVING | FLOW | EDM | TOKENS
# diffusers' Heun and its kin under numpy 2
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]


def made(name, steps=STEPS):
    scheduler = ALL[name]()
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("name", ALL)
def test_levels_fall_from_noise_to_data(name):
    scheduler = made(name)
    levels = noise_levels(scheduler)
    assert len(levels) == len(scheduler.timesteps)
    assert all(0.0 <= x <= 1.0 for x in levels)
    falling = levels[::-1] if "inverse" in name else levels
    assert falling == sorted(falling, reverse=True)
    assert falling[0] > 0.9
    assert falling[-1] < 0.5


@pytest.mark.parametrize("name", [n for n in VARIANCE_PRESERVING if n != "euler continuous"])
def test_the_level_is_the_share_of_noise_that_the_scheduler_adds(name):
    """Of ones and noise of ones: `(a + b, b)` are what `add_noise` makes of data 1 and 0."""
    scheduler = made(name)
    whole = [t for t in dict.fromkeys(scheduler.timesteps.tolist()) if t == int(t)]
    assert len(whole) >= 2
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1)
    levels = dict(zip(scheduler.timesteps.tolist(), noise_levels(scheduler), strict=True))
    for t in whole:
        # Solvers that add noise by their sigmas are told the scheduler's own timesteps.
        a = diffusers.DDPMScheduler.from_config(scheduler.config)
        a.alphas_cumprod = scheduler.alphas_cumprod.double()
        when = torch.tensor([int(t)])
        signal = a.add_noise(one, zero, when).item()
        noise = a.add_noise(zero.double(), one, when).item()
        assert levels[t] == pytest.approx(noise / (signal + noise), abs=2e-3)
        assert noise_level(scheduler, t) == pytest.approx(noise / (signal + noise), abs=1e-6)


@pytest.mark.parametrize("name", FLOW)
def test_in_flow_matching_the_level_is_sigma(name):
    scheduler = made(name)
    x = torch.ones(1, 1, 1, 1)
    sigmas = 1.0 - scheduler.sigmas if name == "flow inverted" else scheduler.sigmas
    assert noise_levels(scheduler) == pytest.approx(sigmas[:-1].tolist(), abs=1e-6)
    assert noise_levels(scheduler)[0] == pytest.approx(1.0, abs=1e-3)
    for t, level in zip(scheduler.timesteps, noise_levels(scheduler), strict=True):
        assert noise_level(scheduler, float(t)) == pytest.approx(level, abs=1.1e-3)
    if name == "flow euler":  # its own word for what it adds
        noisy = scheduler.scale_noise(0 * x, scheduler.timesteps[3:4], x).item()
        assert noise_levels(scheduler)[3] == pytest.approx(noisy, abs=1e-6)


def test_edm_sigmas_are_weighed_against_the_data_they_assume():
    assert noise_levels(made("edm euler"))[0] == pytest.approx(80 / 81)
    assert noise_levels(made("edm dpm++"))[0] == pytest.approx(80 / 80.5)
    assert noise_level(made("edm euler"), 1.0) is None, "a lone c_noise tells no schedule"


def test_euler_with_continuous_timesteps_is_read_by_its_sigmas():
    levels = noise_levels(made("euler continuous"))
    assert levels[0] == pytest.approx(700 / 701, rel=1e-4)
    assert noise_level(made("euler continuous"), 1.0) is None


def test_zero_terminal_snr_starts_at_pure_noise():
    for name in ("cogvideox ddim 5b", "cogvideox dpm 5b"):
        assert noise_levels(made(name))[0] == pytest.approx(1.0, abs=1e-3)


def test_masked_tokens_count_down_evenly():
    assert noise_levels(made("block refinement", 4)) == [1.0, 0.75, 0.5, 0.25]


def dense_steps(schedule, levels):
    grid = TokenGrid.video(1, 8, 8)
    sites = (
        AttentionSite(
            layer=5, num_layers=9, step=i, num_steps=len(levels), sigma=x, branch="", grid=grid
        )
        for i, x in enumerate(levels)
    )
    return [schedule.dense_reason(site) is not None for site in sites]


@pytest.mark.parametrize("steps", [4, 20, 50])
@pytest.mark.parametrize("name", [n for n in ALL if "inverse" not in n])
def test_auto_keeps_a_sensible_share_of_the_steps_dense_on_all_of_them(name, steps):
    levels = noise_levels(made(name, steps))
    dense = dense_steps(Auto().default_schedule(), levels)
    assert dense == sorted(dense, reverse=True), "a prefix"
    share = sum(dense) / len(dense)
    # Linear betas and Karras' sigmas up to 700 do spend up to half of their steps on nearly pure noise.
    assert 0.15 <= share <= 0.5
    draft = sum(dense_steps(DraftAttention().default_schedule(), levels)) / len(levels)
    assert share <= draft
    assert draft >= 0.25


def test_the_minimum_needs_a_step_count_and_never_takes_away():
    grid = TokenGrid.video(1, 8, 8)
    schedule = Schedule(dense_above_sigma=0.95, min_dense_share=0.2)
    site = AttentionSite(
        layer=0, num_layers=1, step=0, num_steps=None, sigma=0.5, branch="", grid=grid
    )
    assert schedule.dense_reason(site) is None
    assert not schedule.needs_step_count, "so a bare transformer takes it"
    assert dense_steps(schedule, [0.5] * 10) == [True] * 2 + [False] * 8
    assert dense_steps(schedule, [1.0] * 4 + [0.5] * 6) == [True] * 4 + [False] * 6
