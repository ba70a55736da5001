"""Train the tiny models from nothing on rendered clips.

    python -m sparsediff.pipelines.tiny.train autoencoder --recipe start --seconds 270 --out runs/tiny
    python -m sparsediff.pipelines.tiny.train denoiser --model tiny-wan --recipe start --seconds 200 --out runs/tiny
    python -m sparsediff.pipelines.tiny.train denoiser --model tiny-wan --recipe main --seconds 450 --out runs/tiny

Every call is one chunk: it reads what earlier chunks left in `--out` and writes its own.  `--iterations` in place of
`--seconds` makes a chunk deterministic for a seed.  Under `torchrun` gradients are averaged over the GPUs.
`--resume shipped` starts from the weights in the package, and so does the autoencoder of an `--out` that has none.
`train_autoencoder.py` holds the autoencoder's part, `chunks.py` what both need.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import models, render
from .autoencoder import ClipAutoencoder
from .chunks import Budget, Log, channels_last, mixed_precision, seeded
from .optim import Muon, split_parameters
from .tasks import TASKS
from .train_autoencoder import AUTOENCODER_RECIPES, load_autoencoder, train_autoencoder
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
JOINT = Bucket(frames=33, size=128, batch=48, clips=24_000)  # text makes the sequence longer
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
    late: float = 1.0
    learning_rate: float = 1e-3  # AdamW; Muon's update has half that root mean square
    warmup: int = 100  # iterations
    flat: float = 0.35  # fraction of the schedule after which the rate falls to zero


# tiny-wan: `start`, `main`, then `more` with `--resume shipped --seed 1`; tiny-cogvideox: `whole`
RECIPES = {
    "start": Recipe(begin=0.0, end=0.3, buckets=((SMALL, 1.0),)),
    "main": Recipe(begin=0.3, end=1.0, buckets=((DEFAULT, 1.0),), late_buckets=((DEFAULT, 0.8), (LONG, 0.1), (WIDE, 0.1)), late=0.65),
    "more": Recipe(begin=0.0, end=1.0, buckets=((DEFAULT, 0.76), (LONG, 0.12), (WIDE, 0.12)), learning_rate=5e-4, flat=0.15),
    "whole": Recipe(begin=0.0, end=1.0, buckets=((SMALL, 1.0),), late_buckets=((JOINT, 1.0),), late=0.22),
    "toy": Recipe(begin=0.0, end=1.0, buckets=((TOY, 1.0),), warmup=2),
}  # fmt: skip


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
        ms={b.name: 200 * s for b, s in seconds.items()},
    )
    with sdpa_kernel([*order, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True):
        yield


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
    known = {"autoencoder": AUTOENCODER_RECIPES, "denoiser": RECIPES}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("autoencoder", "denoiser", "export"))
    parser.add_argument("--model", choices=sorted(TASKS), default="tiny-wan")
    parser.add_argument(
        "--recipe", help="; ".join(f"{k}: {', '.join(v)}" for k, v in known.items())
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
    if args.stage in known and args.recipe not in known[args.stage]:
        parser.error(f"{args.stage} needs --recipe, one of {', '.join(known[args.stage])}")
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
