"""Does the picture show what was asked?  100 held-out captions, read back by `measure.py`.

    python -m sparsediff.pipelines.tiny.evaluate tool --out docs/tiny
    python -m sparsediff.pipelines.tiny.evaluate score --model tiny-wan --out docs/tiny

`tool` examines the measuring itself, on rendered clips of the same captions, as they are and after the autoencoder.
`generate` only makes the latents, for a machine with a GPU; `score --latents FILE` does the rest anywhere.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import CALL, MODELS, WEIGHTS, load_folder, measure, render
from .autoencoder import ClipAutoencoder

EXAM = 100  # captions


def exam(count: int) -> tuple[render.Scenes, list[str]]:
    """The first `count` held-out scenes and their complete captions; the same for every model."""
    if not 1 <= count <= EXAM:
        raise ValueError(f"the exam has {EXAM} captions, not {count}")
    generator = torch.Generator().manual_seed(2026)
    scenes = render.sample_scenes(EXAM, generator, held_out=True)
    captions = render.captions(scenes, generator, complete=True)
    return scenes[:count], captions[:count]


def generate(
    pipe, prompts: list[str], *, seed: int = 0, batch: int = 25, output_type: str = "pt", **call
) -> Tensor:
    """Clips `[B, 3, F, H, W]` in [-1, 1], or latents `[B, 16, f, h, w]`, on the CPU.

    Prompt i has seed `seed + i`, whatever the batch.
    """
    options = {**CALL, **call}
    pipe.set_progress_bar_config(disable=True)
    parts = []
    for i in range(0, len(prompts), batch):
        part = prompts[i : i + batch]
        generators = [torch.Generator().manual_seed(seed + i + j) for j in range(len(part))]
        out = pipe(prompt=part, generator=generators, output_type=output_type, **options).frames
        out = out.float().cpu()
        if output_type == "pt":
            out = out.transpose(1, 2) * 2 - 1
        elif "CogVideoX" in type(pipe).__name__:
            out = out.transpose(1, 2)  # this family keeps frames before channels
        parts.append(out)
    return torch.cat(parts)


def make_latents(args: argparse.Namespace) -> tuple[Tensor, dict[str, str]]:
    """Latents of the exam, and how they were made."""
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = load_folder(args.weights, args.model, torch_dtype=dtype, device=device)
    call = {
        "height": args.size,
        "width": args.size,
        "num_frames": args.frames,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
    }
    if args.max_sequence_length:
        call["max_sequence_length"] = args.max_sequence_length
    started = time.monotonic()
    _, prompts = exam(args.prompts)
    latents = generate(pipe, prompts, batch=args.batch, output_type="latent", **call)
    made = {
        "model": args.model,
        **call,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "seconds_per_clip": round((time.monotonic() - started) / args.prompts, 3),
    }
    return latents, {k: json.dumps(v) for k, v in made.items()}


def write_latents(args: argparse.Namespace) -> None:
    """Save the exam's latents as bfloat16, conditions in the header."""
    latents, made = make_latents(args)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.model}{args.tag}-latents.safetensors"
    save_file({"latents": latents.to(torch.bfloat16)}, path, made)


def read_latents(path: Path) -> tuple[Tensor, dict[str, str]]:
    """What `write_latents` saved."""
    with safe_open(path, "pt") as file:
        return file.get_tensor("latents").float(), file.metadata()


@torch.no_grad()
def decode(vae, latents: Tensor) -> Tensor:
    """Clips `[B, 3, F, H, W]` in [-1, 1], one at a time and each in one pass."""
    clips = ClipAutoencoder(vae)
    parts = [clips.decode(z.to(vae.device, vae.dtype)) for z in latents.split(1)]
    return torch.cat(parts).float().cpu().clamp(-1, 1)


def score(args: argparse.Namespace) -> None:
    """Read the exam's clips, write JSON, a sample sheet and an animation."""
    from .sheets import animation, sheet

    latents, made = read_latents(args.latents) if args.latents else make_latents(args)
    latents = latents[: args.prompts]
    scenes, prompts = exam(len(latents))
    vae = load_folder(args.weights, "tiny-wan", device=args.device).vae
    video = decode(vae, latents)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = f"{args.model}{args.tag}"
    chosen = slice(0, args.sheet)
    sheet(video[chosen], prompts[chosen], args.out / f"{stem}.png")
    animation(video[:12], prompts[:12], args.out / f"{stem}.gif")
    right = measure.verdicts(video, scenes)
    result = {"prompts": len(prompts), **{k: json.loads(v) for k, v in made.items()}}
    result["accuracy"] = measure.accuracy(right)
    result["missed"] = {
        k: [prompts[i] for i in (~v).nonzero().flatten().tolist()] for k, v in right.items()
    }
    (args.out / f"{stem}-score.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["accuracy"]))


def examine_tool(args: argparse.Namespace) -> None:
    """Accuracy of the measuring on rendered clips of the exam, and PSNR of the autoencoder on them."""
    vae = load_folder(args.weights, "tiny-wan", device=args.device).vae
    scenes, prompts = exam(args.prompts)
    rendered, reconstructed, decibels, missed = [], [], [], []
    for i in range(args.prompts):
        one = scenes[i : i + 1]
        video = render.render(one, args.frames, args.size, args.size)
        with torch.no_grad():
            again = decode(vae, ClipAutoencoder(vae).encode(video.to(args.device)))
        decibels.append(10 * torch.log10(4 / (again - video).square().mean()).item())
        rendered.append(measure.verdicts(video, one))
        reconstructed.append(measure.verdicts(again, one))
        missed += [prompts[i]] if not all(v.item() for v in reconstructed[-1].values()) else []
    result = {
        "prompts": args.prompts,
        "rendered": _share(rendered),
        "reconstructed": _share(reconstructed),
        "missed_reconstructed": missed,
        "autoencoder_psnr": {
            "mean": sum(decibels) / len(decibels),
            "worst": min(decibels),
            "frames": args.frames,
            "size": args.size,
        },
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"measuring-tool{args.tag}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def _share(parts: list[dict[str, Tensor]]) -> dict[str, float]:
    return measure.accuracy({k: torch.cat([p[k] for p in parts]) for k in parts[0]})


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("tool", "generate", "score"))
    parser.add_argument("--model", choices=MODELS, default="tiny-wan")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=EXAM)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--steps", type=int, default=CALL["num_inference_steps"])
    parser.add_argument("--guidance", type=float, default=CALL["guidance_scale"])
    parser.add_argument("--frames", type=int, default=CALL["num_frames"])
    parser.add_argument("--size", type=int, default=CALL["width"])
    parser.add_argument(
        "--max-sequence-length", type=int, help="text tokens; the pipeline's own unless given"
    )
    parser.add_argument("--latents", type=Path, help="what `generate` wrote")
    parser.add_argument("--sheet", type=int, default=16, help="clips on the sample sheet")
    parser.add_argument("--tag", default="", help="appended to the file names")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    {"tool": examine_tool, "generate": write_latents, "score": score}[args.what](args)


if __name__ == "__main__":
    main()
