"""Train the tiny models from nothing on rendered clips.

    python -m sparsediff.pipelines.tiny.train autoencoder --seconds 270 --out runs/tiny
    python -m sparsediff.pipelines.tiny.train denoiser --model tiny-wan --recipe start --seconds 200 --out runs/tiny
    python -m sparsediff.pipelines.tiny.train denoiser --model tiny-wan --recipe main --seconds 450 --out runs/tiny

Every call is one chunk: it reads what earlier chunks left in `--out` and writes its own.  `--iterations` in place of
`--seconds` makes a chunk deterministic for a seed.  Under `torchrun` gradients are averaged over the GPUs.
`--resume shipped` starts from the weights in the package.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import WEIGHTS, models, render
from .autoencoder import ClipAutoencoder, channels_last_is_faster, normalise_latents
from .optim import Muon, split_parameters
from .tasks import TASKS
from .world import World


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Clips of one size."""

    frames: int
    size: int
    batch: int  # clips an iteration, on each GPU
    clips: int  # distinct clips held on each GPU
    encode_batch: int = 32


SMALL = Bucket(frames=17, size=96, batch=192, clips=40_000, encode_batch=64)
DEFAULT = Bucket(frames=33, size=128, batch=64, clips=24_000)
HALF = Bucket(frames=33, size=128, batch=48, clips=24_000)
LONG = Bucket(frames=61, size=192, batch=12, clips=2_000, encode_batch=8)  # 9,216 tokens
WIDE = Bucket(frames=33, size=256, batch=12, clips=2_000, encode_batch=8)  # 9,216 tokens
TOY = Bucket(frames=5, size=32, batch=2, clips=4, encode_batch=2)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A stretch of the learning-rate schedule: `begin` and `end` are fractions of the whole."""

    begin: float
    end: float
    buckets: tuple[tuple[Bucket, float], ...]  # with the share of iterations each gets ...
    late_buckets: tuple[tuple[Bucket, float], ...] = ()  # ... and from `late` on
    late: float = 0.7
    learning_rate: float = 1e-3  # AdamW; Muon's update has half that root mean square
    warmup: int = 100  # iterations
    flat: float = (
        0.35  # the rate is constant up to this fraction of the schedule, then falls to zero
    )


RECIPES = {
    "start": Recipe(begin=0.0, end=0.3, buckets=((SMALL, 1.0),)),
    "main": Recipe(begin=0.3, end=1.0, buckets=((DEFAULT, 1.0),), late_buckets=((DEFAULT, 0.8), (LONG, 0.1), (WIDE, 0.1)), late=0.65),
    "more": Recipe(begin=0.0, end=1.0, buckets=((DEFAULT, 0.76), (LONG, 0.12), (WIDE, 0.12)), learning_rate=5e-4, flat=0.15),
    "whole": Recipe(begin=0.0, end=1.0, buckets=((SMALL, 1.0),), late_buckets=((HALF, 1.0),), late=0.22),
    "toy": Recipe(begin=0.0, end=1.0, buckets=((TOY, 1.0),), warmup=2),
}  # fmt: skip


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
    decoder_only: bool = (
        False  # the latents stay what they are, so a denoiser trained on them stays valid
    )
    exam: tuple[int, int, int, int] = (33, 128, 16, 4)  # frames, size, batch, rounds


AUTOENCODER_RECIPES = {
    "whole": AutoencoderRecipe(phases=((0.65, 17, 64, 16), (0.85, 61, 64, 6), (1.0, 33, 128, 4))),
    "start": AutoencoderRecipe(phases=((0.8, 17, 64, 16), (1.0, 17, 128, 6))),
    "longer": AutoencoderRecipe(phases=((1.0, 61, 64, 6),), learning_rate=6e-4, warmup=20, fresh=False),
    "decoder": AutoencoderRecipe(phases=((1.0, 33, 128, 4),), learning_rate=4e-4, warmup=20, fresh=False, decoder_only=True),
    "toy": AutoencoderRecipe(phases=((1.0, 5, 32, 2),), warmup=2, exam=(5, 32, 2, 1)),
    "toy-decoder": AutoencoderRecipe(phases=((1.0, 5, 32, 2),), fresh=False, decoder_only=True, exam=(5, 32, 2, 1)),
}  # fmt: skip


@dataclass
class Budget:
    """How far a chunk has come, by iterations or by the clock."""

    world: World
    seconds: float | None
    iterations: int | None
    iteration: int = 0
    fraction: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def __iter__(self) -> Iterator[float]:
        """Yield the fraction done, before each iteration, until the budget is spent."""
        while self.fraction < 1:
            yield self.fraction
            self.iteration += 1
            if self.iterations is not None:
                self.fraction = self.iteration / self.iterations
            elif self.iteration % 5 == 0 or self.iteration < 5:
                self.fraction = self.world.agree((time.monotonic() - self.started) / self.seconds)


class Log:
    """Lines on the console and in a JSON-lines file, from the first process only."""

    def __init__(self, world: World, path: Path) -> None:
        self.quiet, self.path, self.started = world.rank > 0, path, time.monotonic()

    def __call__(self, **values: float | str) -> None:
        """Write one record with the seconds since the start."""
        if self.quiet:
            return
        record = {"seconds": round(time.monotonic() - self.started, 1), **values}
        print(json.dumps(record), flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def mixed_precision(device: torch.device) -> AbstractContextManager:
    """Bfloat16 autocast on a GPU, nothing on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator for a tuple of numbers: (run seed, purpose, rank, ...)."""
    return torch.Generator().manual_seed(hash(numbers) & 0x7FFF_FFFF)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Decibels for each clip of `[B, ...]` with values in [-1, 1]."""
    return 10 * torch.log10(4 / (a - b).square().flatten(1).mean(1).clamp_min(1e-10))


def channels_last(world: World, args: argparse.Namespace, log: Log) -> bool:
    """Which memory layout suits the convolutions here: measured once, then remembered in `--out`."""
    if world.device.type == "cpu":
        return False
    path = args.out / "layout.json"
    if not path.exists():
        video = render.render(render.sample_scenes(16, seeded(0)), 17, 64, 64, world.device)
        gain = world.agree(channels_last_is_faster(video, mixed_precision(world.device)))
        log(stage="layout", channels_last_gain_ms=1000 * gain)
        path.write_text(json.dumps({"channels_last": gain > 0}))
    return json.loads(path.read_text())["channels_last"]


@contextmanager
def fastest_attention(world: World, log: Log) -> Iterator[None]:
    """Prefer cuDNN's attention over flash attention where it is faster and right."""
    if world.device.type == "cpu":
        yield
        return
    q, k, v = (
        torch.randn(3, 32, 4, 2304, 64, device=world.device, dtype=torch.bfloat16)
        .requires_grad_()
        .unbind(0)
    )
    seconds, outputs = {}, {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend):
            for i in range(8):
                if i == 3:
                    torch.cuda.synchronize()
                    started = time.monotonic()
                out = F.scaled_dot_product_attention(q, k, v)
                gradient = torch.autograd.grad(out.float().square().sum(), (q, k, v))
            torch.cuda.synchronize()
            seconds[backend] = world.agree(time.monotonic() - started)
            outputs[backend] = torch.stack(gradient)
    flash, cudnn = outputs.values()
    right = ((flash - cudnn).float().norm() / flash.float().norm()).item() < 0.02
    order = sorted(seconds, key=seconds.get) if right else [SDPBackend.FLASH_ATTENTION]
    log(
        stage="attention",
        order=[b.name for b in order],
        right=right,
        ms=[200 * s for s in seconds.values()],
    )
    with sdpa_kernel([*order, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True):
        yield


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


@torch.no_grad()
def encode_clips(
    clips: ClipAutoencoder,
    task,
    bucket: Bucket,
    generator: torch.Generator,
    device: torch.device,
    seconds: float,
) -> tuple[Tensor, Tensor]:
    """Latents `[N, 16, f, h, w]` in bfloat16 and token ids `[N, L]` of up to `bucket.clips` clips, or what the time allows."""
    latents, captions, started = [], [], time.monotonic()
    while len(captions) < bucket.clips and (not latents or time.monotonic() - started < seconds):
        scenes = render.sample_scenes(bucket.encode_batch, generator)
        captions += render.captions(scenes, generator)
        video = render.render(scenes, bucket.frames, bucket.size, bucket.size, device)
        with mixed_precision(device):
            latents.append(clips.encode(video).to(torch.bfloat16).contiguous())
        if device.type == "cuda" and len(latents) % 16 == 0:
            torch.cuda.synchronize()  # the clock must see the work, not the queue
    return torch.cat(latents), task.tokens(captions).to(device)


def train_denoiser(args: argparse.Namespace, world: World, log: Log) -> None:
    """Flow matching: predict `noise - latents` at a noise level drawn around the middle and shifted upwards."""
    device, cuda, recipe = world.device, world.device.type == "cuda", RECIPES[args.recipe]
    torch.manual_seed(args.seed)
    pipe = models.assemble(
        args.model, models.build_autoencoder(), *models.build_denoiser(args.model)
    )
    load_chunk(pipe, args)
    for part in (pipe.vae, pipe.transformer, pipe.text_encoder):
        part.to(device).requires_grad_(part is not pipe.vae)
    task = TASKS[args.model](pipe, seed=args.seed)
    task.prepare()
    average = [p.detach().clone() for p in trained(pipe)]
    if (args.out / args.model / "raw.safetensors").exists():
        restore_raw(pipe, args.out / args.model / "raw.safetensors")
    world.same_weights(trained(pipe))

    encoder = ClipAutoencoder(pipe.vae, compile=cuda, channels_last=channels_last(world, args, log))
    generator = seeded(args.seed, 3, world.rank, round(1000 * recipe.begin))
    data: dict[Bucket, tuple[Tensor, Tensor]] = {}
    buckets = [b for b, _ in recipe.buckets + recipe.late_buckets]
    weights = {b: b.clips * b.frames * b.size**2 for b in buckets}
    for bucket, weight in weights.items():
        share = args.encode_seconds * weight / sum(weights.values())
        data[bucket] = encode_clips(encoder, task, bucket, generator, device, share)
        log(stage="encode", frames=bucket.frames, size=bucket.size, clips=len(data[bucket][0]),
            mean=data[bucket][0][:256].float().mean().item(), std=data[bucket][0][:256].float().std().item())  # fmt: skip

    matrices, others = split_parameters(pipe.transformer)
    others = others + list(pipe.text_encoder.parameters())
    muon = Muon(matrices, lr=recipe.learning_rate / 2)
    adam = torch.optim.AdamW(
        others, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=cuda
    )
    if cuda and args.compile:
        torch._dynamo.config.recompile_limit = 32
        for block in (
            getattr(pipe.transformer, "blocks", None) or pipe.transformer.transformer_blocks
        ):
            block.compile(dynamic=False)
    empty = task.tokens([""]).to(device)
    noise = torch.Generator(device).manual_seed(
        args.seed * 1000 + world.rank + round(100 * recipe.begin)
    )
    picker = seeded(
        args.seed, 4, round(1000 * recipe.begin)
    )  # the same on every rank: equal shapes, equal speed
    parameters, losses = list(trained(pipe)), []
    pipe.transformer.train()
    attention = ExitStack()
    attention.enter_context(fastest_attention(world, log))
    for fraction in (budget := Budget(world, args.seconds, args.iterations)):
        overall = recipe.begin + fraction * (recipe.end - recipe.begin)
        falling = min(1.0, (1 - overall) / (1 - recipe.flat))
        rate = (
            recipe.learning_rate * min(1, (budget.iteration + 1) / recipe.warmup) * falling + 1e-7
        )
        adam.param_groups[0]["lr"], muon.param_groups[0]["lr"] = rate, rate / 2
        late = recipe.late_buckets and overall >= recipe.late
        choices = recipe.late_buckets if late else recipe.buckets
        odds = torch.tensor([share for _, share in choices])
        bucket = choices[int(torch.multinomial(odds, 1, generator=picker))][0]

        latents, ids = data[bucket]
        pick = torch.randint(len(latents), (bucket.batch,), device=device, generator=noise)
        clean, ids = latents[pick].float(), ids[pick]
        unconditional = torch.rand(bucket.batch, 1, device=device, generator=noise) < 0.1
        ids = torch.where(unconditional, empty, ids)
        middle = torch.randn(bucket.batch, device=device, generator=noise).sigmoid()
        sigma = models.FLOW_SHIFT * middle / (1 + (models.FLOW_SHIFT - 1) * middle)
        epsilon = torch.randn(clean.shape, device=device, generator=noise)
        noisy = torch.lerp(clean, epsilon, sigma.view(-1, 1, 1, 1, 1))
        with mixed_precision(device):
            velocity = task.predict(noisy, sigma, ids)
        loss = F.mse_loss(velocity.float(), epsilon - clean)
        for optimizer in (adam, muon):
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        world.average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        muon.step()
        decay = min(args.ema, (budget.iteration + 1) / (budget.iteration + 10))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        losses.append(loss.detach())
        if budget.iteration in (0, 5, 20) or budget.iteration % 100 == 0:
            log(stage=args.model, iteration=budget.iteration, fraction=round(overall, 4), rate=rate, frames=bucket.frames,
                size=bucket.size, loss=torch.stack(losses).mean().item())  # fmt: skip
            losses.clear()
    log(
        stage=args.model,
        iteration=budget.iteration,
        fraction=recipe.end,
        loss=torch.stack(losses or [loss.detach()]).mean().item(),
    )
    attention.close()
    if world.rank == 0:
        save_chunk(pipe, average, args)
    world.leave()


def trained(pipe) -> Iterator[nn.Parameter]:
    """Parameters of the transformer, then of the text encoder."""
    yield from pipe.transformer.parameters()
    yield from pipe.text_encoder.parameters()


def _parts(pipe) -> dict[str, Tensor]:
    names = [f"transformer.{n}" for n, _ in pipe.transformer.named_parameters()]
    names += [f"text_encoder.{n}" for n, _ in pipe.text_encoder.named_parameters()]
    return dict(zip(names, trained(pipe), strict=True))


def save_chunk(pipe, average: list[Tensor], args: argparse.Namespace) -> None:
    """`raw.safetensors` and `average.safetensors` (the moving average, which is what ships), bfloat16."""
    folder = args.out / args.model
    folder.mkdir(parents=True, exist_ok=True)
    named = _parts(pipe)
    for name, values in {"raw": named.values(), "average": average}.items():
        tensors = {
            k: v.detach().to("cpu", torch.bfloat16).contiguous()
            for k, v in zip(named, values, strict=True)
        }
        save_file(tensors, folder / f"{name}.safetensors")


@torch.no_grad()
def restore_raw(pipe, path: Path) -> None:
    """Copy saved weights into the parameters."""
    stored = load_file(path)
    for name, parameter in _parts(pipe).items():
        parameter.copy_(stored[name])


def load_chunk(pipe, args: argparse.Namespace) -> None:
    """The autoencoder, and the averaged weights of the last chunk if there is one."""
    if args.resume == "shipped":
        from . import load

        shipped = load(args.model)
        for part in ("vae", "transformer", "text_encoder"):
            getattr(pipe, part).load_state_dict(getattr(shipped, part).state_dict())
        return
    load_autoencoder(pipe.vae, args.out)
    average = args.out / args.model / "average.safetensors"
    if average.exists():
        restore_raw(pipe, average)


def export(args: argparse.Namespace, world: World, log: Log) -> None:
    """Write the pipeline folder that ships, bfloat16, with the averaged weights."""
    if world.rank > 0:
        return
    pipe = models.assemble(
        args.model, models.build_autoencoder(), *models.build_denoiser(args.model)
    )
    load_chunk(pipe, args)
    folder = args.out / "weights" / args.model
    for part in ("vae", "transformer", "text_encoder"):
        getattr(pipe, part).to(torch.bfloat16)
    pipe.save_pretrained(folder)
    if args.model != "tiny-wan":  # one autoencoder serves all
        shutil.rmtree(folder / "vae")
    log(
        stage="export",
        megabytes=sum(f.stat().st_size for f in (args.out / "weights").rglob("*.safetensors"))
        / 1e6,
    )


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("autoencoder", "denoiser", "export"))
    parser.add_argument("--model", choices=sorted(TASKS), default="tiny-wan")
    parser.add_argument(
        "--recipe", choices=sorted({*RECIPES, *AUTOENCODER_RECIPES}), default="whole"
    )
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--encode-seconds", type=float, default=math.inf)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--resume", choices=("chunk", "shipped"), default="chunk")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args(argv)
    if args.stage != "export" and (args.seconds is None) == (args.iterations is None):
        parser.error("give exactly one of --seconds and --iterations")
    args.out.mkdir(parents=True, exist_ok=True)
    world = World.join()
    if world.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = args.stage == "autoencoder"
    log = Log(
        world,
        args.out
        / f"log-{args.stage}-{args.model if args.stage != 'autoencoder' else args.recipe}.jsonl",
    )
    {"autoencoder": train_autoencoder, "denoiser": train_denoiser, "export": export}[args.stage](
        args, world, log
    )


if __name__ == "__main__":
    main()
