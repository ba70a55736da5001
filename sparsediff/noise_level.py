"""One number in [0, 1] for how noisy a sample is, whatever a scheduler counts in.

The noise level is the share of noise in `(1 - level) x + level noise`, for data of unit variance: sigma itself in flow
matching.  A sample `a x + b noise` that another scheduler makes is, but for a factor, the flow sample of level
`b / (a + b)`, so that 0.95 says the same of all of them: `a, b` are `sqrt(abar), sqrt(1 - abar)` for DDPM and its kin,
and `sigma_data, sigma` for those of Karras et al. (arXiv:2206.00364).
"""

from __future__ import annotations

import numpy as np
import torch

NUM_TRAIN_TIMESTEPS = 1000  # what timesteps count to where no scheduler says otherwise


def noise_levels(scheduler: object) -> list[float]:
    """The level at each of `scheduler.timesteps`; reads them back to the host.

    A scheduler that tells nothing about its noise (masked tokens, block refinement) gets the share of the run that is
    still to come, which is what it masks.
    """
    timesteps = timestep_values(scheduler)
    sigmas = _sigmas(scheduler)
    # One a step and a last one; a scheduler of higher order may hold others in between.
    if len(sigmas) == len(timesteps) + 1:
        return [_of_sigma(scheduler, sigma) for sigma in sigmas[:-1]]
    levels = [noise_level(scheduler, t) for t in timesteps]
    if None in levels:
        return [1.0 - i / len(timesteps) for i in range(len(timesteps))]
    return levels


def noise_level(scheduler: object | None, timestep: float) -> float | None:
    """The level at one timestep, be it among those of a run or not; None if the scheduler does not tell.

    Without a scheduler timesteps are taken for flow matching's, from 1000 (noise) to 0.
    """
    if scheduler is None:
        return timestep / NUM_TRAIN_TIMESTEPS
    if _is_flow(scheduler):
        return _of_sigma(scheduler, timestep / train_timesteps(scheduler))
    signal = getattr(scheduler, "alphas_cumprod", None)
    if signal is None or _config(scheduler, "timestep_type") == "continuous":
        return None
    signal = torch.as_tensor(signal).double().cpu().numpy().clip(0.0, 1.0)
    noise = np.sqrt(1.0 - signal)
    # Timesteps of Karras' and other spacings lie between the whole ones.
    return float(np.interp(timestep, np.arange(len(signal)), noise / (np.sqrt(signal) + noise)))


def timestep_values(scheduler: object) -> list[float]:
    """`scheduler.timesteps` as numbers, one transfer."""
    return [float(t) for t in torch.as_tensor(scheduler.timesteps).tolist()]


def train_timesteps(scheduler: object) -> int:
    """What the scheduler's timesteps count to."""
    return _config(scheduler, "num_train_timesteps") or NUM_TRAIN_TIMESTEPS


def _of_sigma(scheduler: object, sigma: float) -> float:
    if _is_flow(scheduler):
        # Mochi counts up: its scheduler's sigma is the share of the signal.
        return 1.0 - sigma if _config(scheduler, "invert_sigmas") else sigma
    # Noise of this deviation on data of unit variance, or of the one that the scheduler assumes.
    return sigma / (sigma + (_config(scheduler, "sigma_data") or 1.0))


def _is_flow(scheduler: object) -> bool:
    if hasattr(scheduler, "alphas_cumprod"):
        return bool(_config(scheduler, "use_flow_sigmas"))
    sigmas = _sigmas(scheduler)
    return bool(sigmas) and max(sigmas) <= 1.0 and _config(scheduler, "sigma_data") is None


def _sigmas(scheduler: object) -> list[float]:
    sigmas = getattr(scheduler, "sigmas", None)
    return [] if sigmas is None else [float(x) for x in torch.as_tensor(sigmas).tolist()]


def _config(scheduler: object, name: str) -> object:
    return getattr(scheduler, "config", {}).get(name)
