"""Does the picture show what was asked?  Measured by a judge, a small classifier trained on rendered clips.

    python -m sparsediff.pipelines.tiny.evaluate judge --seconds 40 --out runs/tiny
    python -m sparsediff.pipelines.tiny.evaluate score --model tiny-wan --out docs/tiny

The judge sees 9 of a clip's frames at 64x64 and names colour, shape and motion of the main object; where a caption has
a second object the judge is told its colour, to know which one is meant.  It is first tested itself, on rendered
clips of the held-out combinations, as they are and after the autoencoder.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import CALL, MODELS, WEIGHTS, load_folder, render

QUESTIONS = {"colour": tuple(render.COLOURS), "shape": render.SHAPES, "motion": render.MOTIONS}
JUDGE_FRAMES, JUDGE_SIZE = 9, 64


class Judge(nn.Module):
    """A residual network over the stacked frames; `[B, 3, F, H, W]` in [-1, 1] to logits per question."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        channels = (width, width, 2 * width, 3 * width)
        self.stem = nn.Conv2d(
            3 * JUDGE_FRAMES + len(render.COLOURS) + 2, width, 5, stride=2, padding=2
        )
        self.down = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(channels)
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(8, c), nn.SiLU(), nn.Conv2d(c, c, 3, padding=1),
                nn.GroupNorm(8, c), nn.SiLU(), nn.Conv2d(c, c, 3, padding=1),
            )
            for c in channels
        )  # fmt: skip
        self.heads = nn.ModuleDict(
            {k: nn.Linear(2 * channels[-1], len(v)) for k, v in QUESTIONS.items()}
        )

    def forward(self, video: Tensor, second_colour: Tensor) -> dict[str, Tensor]:
        """`second_colour` `[B]` is the colour of the object *not* meant, or -1."""
        index = (
            torch.linspace(0, video.shape[2] - 1, JUDGE_FRAMES, device=video.device).round().long()
        )
        frames = F.adaptive_avg_pool2d(video[:, :, index].flatten(1, 2), JUDGE_SIZE)
        hint = F.one_hot(second_colour + 1, len(render.COLOURS) + 1)[:, 1:].to(frames.dtype)
        ramp = torch.linspace(-1, 1, JUDGE_SIZE, device=video.device, dtype=frames.dtype)
        ramp = ramp.expand(len(frames), 1, JUDGE_SIZE, JUDGE_SIZE)
        x = self.stem(
            torch.cat(
                [frames, hint[:, :, None, None].expand(-1, -1, *frames.shape[2:]), ramp, ramp.mT], 1
            )
        )
        for i, block in enumerate(self.blocks):
            x = x + block(x)
            x = self.down[i](x) if i < len(self.down) else x
        x = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
        return {k: head(x) for k, head in self.heads.items()}


def hint_of(scenes: render.Scenes) -> Tensor:
    """Colour of the second object, or -1."""
    return torch.where(scenes.relation > 0, scenes.colour_2, -1)


def verdicts(judge: Judge, video: Tensor, scenes: render.Scenes) -> dict[str, Tensor]:
    """For each question, bool `[B]`: is the answer what the scene says?"""
    with torch.no_grad():
        answers = judge(video, hint_of(scenes).to(video.device))
    return {k: v.argmax(1).cpu() == getattr(scenes, k) for k, v in answers.items()}


def train_judge(args: argparse.Namespace) -> None:
    """Rendered clips only, with blur, noise and changes of brightness; then its own examination."""
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    judge = Judge().to(device)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(args.seed + 17)
    batch, size = (128, 128) if device.type == "cuda" else (4, 64)
    started, iteration, fraction = time.monotonic(), 0, 0.0
    while fraction < 1:
        scenes = render.sample_scenes(batch, generator)
        video = soil(render.render(scenes, 33, size, size, device))
        answers = judge(video, hint_of(scenes).to(device))
        loss = sum(F.cross_entropy(v, getattr(scenes, k).to(device)) for k, v in answers.items())
        optimizer.param_groups[0]["lr"] = (
            2e-3 * min(1, (iteration + 1) / 50) * (1 - fraction) + 1e-6
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        iteration += 1
        if iteration % 50 == 1:
            print(f"judge {iteration}: loss {loss.item():.3f}", flush=True)
        fraction = (
            (time.monotonic() - started) / args.seconds
            if args.seconds
            else iteration / args.iterations
        )
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.to("cpu", torch.bfloat16) for k, v in judge.state_dict().items()},
        args.out / "judge.safetensors",
    )


def soil(video: Tensor) -> Tensor:
    """Blur, noise and brightness, each clip its own amount."""
    amount = torch.rand(3, len(video), 1, 1, 1, 1, device=video.device)
    frames = video.flatten(1, 2)
    video = torch.lerp(
        video, F.avg_pool2d(frames, 3, stride=1, padding=1).view_as(video), amount[0]
    )
    video = video * (0.85 + 0.3 * amount[1])
    return video + 0.15 * amount[2] * torch.randn_like(video)


def load_judge(folder: Path, device: torch.device | str) -> Judge:
    """The judge in evaluation mode."""
    judge = Judge()
    judge.load_state_dict(
        {k: v.float() for k, v in load_file(folder / "judge.safetensors").items()}
    )
    return judge.to(device).eval().requires_grad_(False)


def examine_judge(
    judge: Judge, vae: nn.Module, count: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Its accuracy on rendered held-out clips, and on the same after the autoencoder."""
    generator = torch.Generator().manual_seed(99)
    right = {"rendered": [], "reconstructed": []}
    for _ in range(0, count, 20):
        scenes = render.sample_scenes(20, generator, held_out=True)
        video = render.render(scenes, 33, 128, 128, device)
        right["rendered"].append(verdicts(judge, video, scenes))
        with torch.no_grad():
            again = vae.decode(vae.encode(video.to(vae.dtype)).latent_dist.mode()).sample.float()
        right["reconstructed"].append(verdicts(judge, again, scenes))
    return {k: accuracy(merge(v)) for k, v in right.items()}


def merge(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate verdicts."""
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def accuracy(right: dict[str, Tensor]) -> dict[str, float]:
    """Share of right answers per question, and of clips with all three right."""
    together = torch.stack(list(right.values())).all(0)
    return {
        **{k: v.float().mean().item() for k, v in right.items()},
        "all three": together.float().mean().item(),
    }


def generate(pipe, prompts: list[str], *, seed: int = 0, batch: int = 25, **call) -> Tensor:
    """Clips `[B, 3, F, H, W]` in [-1, 1] on the CPU; prompt i has seed `seed + i`, whatever the batch."""
    options = {**CALL, **call}
    pipe.set_progress_bar_config(disable=True)
    clips = []
    for i in range(0, len(prompts), batch):
        part = prompts[i : i + batch]
        generators = [torch.Generator().manual_seed(seed + i + j) for j in range(len(part))]
        frames = pipe(prompt=part, generator=generators, output_type="pt", **options).frames
        clips.append(frames.float().cpu().transpose(1, 2) * 2 - 1)
    return torch.cat(clips)


def exam(count: int) -> tuple[render.Scenes, list[str]]:
    """The held-out scenes and their complete captions; the same for every model."""
    generator = torch.Generator().manual_seed(2026)
    scenes = render.sample_scenes(count, generator, held_out=True)
    return scenes, render.captions(scenes, generator, complete=True)


def score(args: argparse.Namespace) -> None:
    """Generate the exam, judge it, write JSON and a sample sheet."""
    from .sheets import animation, sheet

    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = load_folder(args.weights, args.model, torch_dtype=dtype, device=device)
    pipe.vae.to(torch.float32)
    judge = load_judge(args.weights, device)
    scenes, prompts = exam(args.prompts)
    results = {
        "model": args.model,
        "prompts": args.prompts,
        "judge": examine_judge(judge, pipe.vae, args.prompts, device),
    }
    results["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    results["runs"] = []
    for steps in args.steps:
        for guidance in args.guidance:
            started = time.monotonic()
            video = generate(
                pipe, prompts, batch=args.batch, num_inference_steps=steps, guidance_scale=guidance
            )
            seconds = time.monotonic() - started
            right = merge(
                [
                    verdicts(judge, video[i : i + 20].to(device), scenes[i : i + 20])
                    for i in range(0, len(prompts), 20)
                ]
            )
            run = {
                "steps": steps,
                "guidance": guidance,
                "seconds_per_clip": seconds / len(prompts),
                **accuracy(right),
            }
            run["missed"] = {
                k: [prompts[i] for i in (~v).nonzero().flatten().tolist()] for k, v in right.items()
            }
            results["runs"].append(run)
            print(json.dumps({k: v for k, v in run.items() if k != "missed"}), flush=True)
            args.out.mkdir(parents=True, exist_ok=True)
            sheet(
                video[: args.sheet],
                prompts[: args.sheet],
                args.out / f"{args.model}-{steps}-{guidance:g}.png",
            )
            if len(results["runs"]) == 1:
                animation(video[:12], prompts[:12], args.out / f"{args.model}.gif")
            (args.out / f"{args.model}-score.json").write_text(json.dumps(results, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("judge", "score"))
    parser.add_argument("--model", choices=MODELS, default="tiny-wan")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--steps", type=int, nargs="+", default=[CALL["num_inference_steps"]])
    parser.add_argument("--guidance", type=float, nargs="+", default=[CALL["guidance_scale"]])
    parser.add_argument("--sheet", type=int, default=16, help="clips on the sample sheet")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--iterations", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    {"judge": train_judge, "score": score}[args.what](args)


if __name__ == "__main__":
    main()
