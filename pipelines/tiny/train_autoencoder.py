"""The autoencoder's part of `train.py`.

The shipped one had three chunks: `start`, 220 s on two H200; `longer`, 58 s on two, because over 33 frames quality
fell from 40 to 31.6 dB; `decoder`, 100 s on half of one, while transformers already trained on its latents.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import WEIGHTS, models, render
from .autoencoder import ClipAutoencoder, normalise_latents, psnr
from .chunks import Budget, Log, channels_last, mixed_precision, seeded
from .world import World


@dataclass(frozen=True, kw_only=True)
class AutoencoderRecipe:
    """Clip sizes as training goes on: up to a fraction, so many frames of so many pixels, so many clips.

    All convolutions are causal and, over 61 frames, all of them still see the beginning of the clip.  A decoder that
    has only met 17 frames falls from 40 to 20 dB on the frames after them, so long clips must be part of it.
    """

    phases: tuple[tuple[float, int, int, int], ...]
    learning_rate: float = 1.2e-3
    warmup: int = 100
    fresh: bool = True
    decoder_only: bool = False  # a denoiser trained on the latents stays valid
    exam: tuple[int, int, int, int] = (33, 128, 16, 4)  # frames, size, batch, rounds


AUTOENCODER_RECIPES = {
    "start": AutoencoderRecipe(phases=((0.8, 17, 64, 16), (1.0, 17, 128, 6))),
    "longer": AutoencoderRecipe(phases=((1.0, 61, 64, 6),), learning_rate=6e-4, warmup=20, fresh=False),
    "decoder": AutoencoderRecipe(phases=((1.0, 33, 128, 4),), learning_rate=4e-4, warmup=20, fresh=False, decoder_only=True),
    "toy": AutoencoderRecipe(phases=((1.0, 5, 32, 2),), warmup=2, exam=(5, 32, 2, 1)),
    "toy-decoder": AutoencoderRecipe(phases=((1.0, 5, 32, 2),), fresh=False, decoder_only=True, exam=(5, 32, 2, 1)),
}  # fmt: skip


def train_autoencoder(args: argparse.Namespace, world: World, log: Log) -> None:
    """Charbonnier and squared error, a pull of the latents towards mean 0 and variance 1, noise on the latents.

    The noise teaches the decoder to shrug off the small errors a diffusion model makes.
    """
    device, cuda = world.device, world.device.type == "cuda"
    recipe = AUTOENCODER_RECIPES[args.recipe]
    torch.manual_seed(args.seed)
    model = models.build_autoencoder()
    if not recipe.fresh:
        load_autoencoder(model, args.out)
    clips = ClipAutoencoder(
        model.to(device), compile=cuda, channels_last=channels_last(world, args, log)
    )
    world.same_weights(model.parameters())
    learning = [model.decoder, model.post_quant_conv] if recipe.decoder_only else [model]
    model.requires_grad_(False)
    parameters = [p.requires_grad_() for part in learning for p in part.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-4, fused=cuda
    )
    generator = seeded(args.seed, 1, world.rank, *map(ord, args.recipe))
    noise = torch.Generator(device).manual_seed(args.seed + world.rank)
    for fraction in (budget := Budget(world, args.seconds, args.iterations)):
        warming = min(1, (budget.iteration + 1) / recipe.warmup)
        rate = recipe.learning_rate * warming * (1 - fraction) + 1e-6
        optimizer.param_groups[0]["lr"] = rate
        frames, size, batch = next(clip for until, *clip in recipe.phases if fraction < until)
        scenes = render.sample_scenes(batch, generator)
        video = render.render(scenes, frames, size, size, device)
        with mixed_precision(device):
            latents = clips.encode(video).float()
            level = 0.2 * torch.rand(batch, 1, 1, 1, 1, device=device, generator=noise)
            jitter = torch.randn(latents.shape, device=device, generator=noise)
            out = clips.decode(latents + level * jitter).float()
        moments = latents.transpose(0, 1).flatten(1)
        pull = moments.mean(1).square().mean() + (moments.std(1) - 1).square().mean()
        error = out - video
        loss = (error.square() + 1e-6).sqrt().mean() + 4 * error.square().mean() + 0.02 * pull
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        world.average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if budget.iteration % 200 == 0:
            log(stage="autoencoder", recipe=args.recipe, iteration=budget.iteration, size=size, rate=rate,
                loss=loss.item(), psnr_noisy=psnr(out, video).mean().item(), pull=pull.item())  # fmt: skip
    log(stage="autoencoder", recipe=args.recipe, iteration=budget.iteration)
    finish_autoencoder(model.requires_grad_(False), recipe, args, world, log)
    world.leave()


@torch.no_grad()
def finish_autoencoder(
    model: nn.Module,
    recipe: AutoencoderRecipe,
    args: argparse.Namespace,
    world: World,
    log: Log,
) -> None:
    """Normalise the latents of a fresh model, measure on held-out clips, save."""
    clips, generator = ClipAutoencoder(model), seeded(args.seed, 2)
    frames, size, batch, rounds = recipe.exam

    def held_out(held_out: bool) -> Tensor:
        scenes = render.sample_scenes(batch, generator, held_out=held_out)
        return render.render(scenes, frames, size, size, world.device)

    if recipe.fresh:
        latents = torch.cat([clips.encode(held_out(False)) for _ in range(rounds)])
        values = latents.transpose(0, 1).flatten(1)
        normalise_latents(model, values.mean(1), values.std(1))
        # nothing here trains the log variance that the class has; it is pinned to nearly none
        model.quant_conv.weight[models.LATENT_CHANNELS :] = 0
        model.quant_conv.bias[models.LATENT_CHANNELS :] = -12.0
    scores = []
    for _ in range(rounds):
        video = held_out(True)
        scores.append(psnr(clips.decode(clips.encode(video)).clamp(-1, 1), video))
    scores = torch.cat(scores)
    log(stage="autoencoder", recipe=args.recipe, held_out_psnr=scores.mean().item(),
        worst=scores.min().item(), clips=len(scores), frames=frames, size=size)  # fmt: skip
    if world.rank == 0:
        save_weights(model, args.out / "autoencoder.safetensors")


def load_autoencoder(model: nn.Module, folder: Path) -> None:
    """Fill `model` with what an earlier chunk saved, else with the weights in the package."""
    own, shipped = folder / "autoencoder.safetensors", WEIGHTS / "tiny-wan" / "vae"
    stored = load_file(own if own.exists() else shipped / "diffusion_pytorch_model.safetensors")
    model.load_state_dict({k: v.float() for k, v in stored.items()})


def save_weights(model: nn.Module, path: Path) -> None:
    """The state of a module in bfloat16."""
    save_file(
        {
            k: v.detach().to("cpu", torch.bfloat16).contiguous()
            for k, v in model.state_dict().items()
        },
        path,
    )
