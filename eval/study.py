"""The methods beside each other on the bundled models: the figures of docs/methods.md.

    python -m sparsediff.eval.study run --model tiny-wan --out wan.json
    python -m sparsediff.eval.study run --model tiny-wan --size 256 --out wan-wide.json
    python -m sparsediff.eval.study run --model tiny-cogvideox --out cogvideox.json
    python -m sparsediff.eval.study cost --out cost.json
    python -m sparsediff.eval.study report wan.json wan-wide.json cogvideox.json --cost cost.json --out docs

Every arm gets the same prompts, seeds and steps, and a fifth of its steps is dense, the one that a method searches in
among them.  Clips are compared with the dense clip of the same prompt and seed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import sparsediff
from sparsediff.api import watch
from sparsediff.calibrator import AttentionError, calibrate
from sparsediff.eval.environment import environment, git_commit
from sparsediff.eval.metrics import fidelity
from sparsediff.eval.random_blocks import Random
from sparsediff.eval.st_lpips import st_lpips
from sparsediff.eval.study_report import mean
from sparsediff.eval.video import check_writable
from sparsediff.methods import (
    AdaSpa,
    Auto,
    CalibratedMethod,
    DraftAttention,
    LiteAttention,
    Method,
    PAROAttention,
    SparseD,
    SparseVDiT,
)
from sparsediff.pipelines import tiny
from sparsediff.pipelines.tiny.evaluate import EXAM, decode, exam, generate
from sparsediff.schedule import Schedule

DENSITIES = (0.3, 0.2, 0.5)
THRESHOLDS = (-4.0, -2.0, -1.0, -0.5)  # LiteAttention has no budget to set
LITE_DENSITIES = (0.9, 0.7)  # of random blocks, where LiteAttention's thresholds lead
ERRORS = (0.02, 0.05, 0.1)  # Sparse-vDiT as published has none either
DENSE_SHARE = 0.2
BLOCK = 64
CALIBRATION_PROMPTS, CALIBRATION_SEED = 2, 10_000  # captions that are not compared
ERROR_CLIPS = 4  # of which the error of every attention call is measured
SCHEMA = 1


@dataclass(frozen=True)
class Arm:
    """One setting of one method."""

    method: Method
    target: float | None  # density asked for
    changes: Mapping[str, object] = field(default_factory=dict)  # of a candidate

    @property
    def series(self) -> str:
        """What the arm is a point of: its method, and the order it visits blocks in where that is not the published one."""
        order = getattr(self.method, "visiting_order", "descending")
        words = [] if order == "descending" else [order]
        words += [f"{name}={value}" for name, value in self.changes.items()]
        return " ".join([self.method.name, *words])

    @property
    def label(self) -> str:
        """Series and density, or what it has in place of one, as the tables name it."""
        knob = self.target
        if knob is None:
            lite = isinstance(self.method, LiteAttention)
            knob = self.method.threshold if lite else self.method.epsilon
        return f"{self.series} {knob:g}"

    def schedule(self, steps: int) -> Schedule:
        """A method that searches in a dense call of its own gets one scheduled step less."""
        dense = round(DENSE_SHARE * steps)
        return Schedule(dense_steps=dense - isinstance(self.method, SparseD | AdaSpa))


def arms() -> Iterator[Arm]:
    """Everything that is compared, cheapest calibration last."""
    for d in DENSITIES:
        for method in (
            Auto(density=d),
            AdaSpa(sparsity=1 - d, block=BLOCK),
            SparseD(select=d, block=BLOCK),
            DraftAttention(sparsity=1 - d, pool_h=8, pool_w=8),
            Random(density=d),
            PAROAttention(density=d, block=BLOCK),
            SparseVDiT(density=d, window=min(0.25, d), stripes=min(0.25, d), block=BLOCK),
        ):
            yield Arm(method, d)
    for error in ERRORS:
        # The cost of a block is a block: at these sizes a GPU's time says more about launches.
        yield Arm(
            SparseVDiT(
                lambda_=error, epsilon=error, costs=(1.0, 0.0, 0.25, 0.25, 0.25), block=BLOCK
            ),
            None,
        )
    for threshold in THRESHOLDS:
        for order in ("descending", "centre-out"):
            lite = LiteAttention(threshold=threshold, tile=(BLOCK, BLOCK), visiting_order=order)
            yield Arm(lite, None)
    for density in LITE_DENSITIES:
        yield Arm(Random(density=density), density)


def candidates() -> Iterator[Arm]:
    """Why the default is what it is: forms of `auto`, beside it as it is."""
    for d in DENSITIES:
        for changes in (
            {},
            {"refresh": ()},
            {"refresh": (0.4, 0.7)},
            {"row_share": 0.0},
            {"row_share": 0.25},
            {"stride": 2},
            {"windows": ()},
            {"windows": ((1, 8, 8),)},
            {"budget": "layer_percentile"},
            {"budget": "head_adaptive"},
            {"budget": "row_top_k"},
            {"budget": "row_top_k", "refresh": ()},
        ):
            yield Arm(Auto(density=d, **changes), d, changes)


def run(args: argparse.Namespace) -> None:
    """Generate every arm, compare, write."""
    chosen = _chosen_arms(args)
    check_writable(args.out)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = tiny.load_folder(tiny.WEIGHTS, args.model, torch_dtype=dtype, device=device)
    pipe.set_progress_bar_config(disable=True)
    # Those after the compared ones calibrate.
    _, captions = exam(args.skip + args.prompts + CALIBRATION_PROMPTS)
    captions = captions[args.skip :]
    prompts = [p for p in captions[: args.prompts] for _ in range(args.seeds)]
    measured = captions[args.prompts :]
    call = {
        **tiny.CALL,
        "height": args.size,
        "width": args.size,
        "num_frames": args.frames,
        "num_inference_steps": args.steps,
    }

    def clips(count: int | None = None) -> Tensor:
        """`[N, F, H, W, 3]` in [0, 1]; the seed is the place in the list."""
        chosen = prompts[:count]
        latents = generate(pipe, chosen, batch=args.batch, output_type="latent", **call)
        return (decode(pipe.vae, latents).movedim(1, -1) + 1) / 2

    clips(1)  # kernels are compiled and tuned before the clock runs
    started = time.monotonic()
    reference = clips()
    result = {
        "schema": SCHEMA,
        "model": args.model,
        "prompts": args.prompts,
        "skipped": args.skip,
        "seeds": args.seeds,
        "call": call,
        "dense_share": DENSE_SHARE,
        "dense_seconds": round(time.monotonic() - started, 2),
        "seed": 0,  # of the first clip; clip i has this and i
        "captions": prompts,
        "calibration": {"captions": measured, "seed": CALIBRATION_SEED},
        "arguments": arguments(args),
        **provenance(device),
        "arms": [],
    }
    for arm in chosen:
        record = _run_arm(arm, pipe, clips, reference, measured, call, args)
        result["arms"].append(record)
        result["grid"] = record.pop("grid")
        print(
            f"{record['label']:22s} density {record['density']:.3f}  PSNR {mean(record, 'psnr'):.2f} dB  "
            f"SSIM {mean(record, 'ssim'):.4f}  error {record['attention_error']:.4f}  {record['seconds']:.1f} s",
            flush=True,
        )
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def _chosen_arms(args: argparse.Namespace) -> list[Arm]:
    """The arms of this shard.

    Raises:
        ValueError: an arm that there is not, or more captions than the exam has.
    """
    every = candidates if args.candidates else arms
    known = list(dict.fromkeys(a.method.name for a in every()))
    if unknown := [name for name in args.arms or () if name not in known]:
        raise ValueError(f"no arm is called {', '.join(unknown)}; there are {', '.join(known)}")
    left = EXAM - CALIBRATION_PROMPTS
    if not 0 <= args.skip < left:
        raise ValueError(f"--skip must be 0 to {left - 1}, got {args.skip}")
    if not 1 <= args.prompts <= left - args.skip:
        raise ValueError(
            f"--prompts must be 1 to {left - args.skip}: the exam has {EXAM} captions, and {CALIBRATION_PROMPTS} of "
            f"them calibrate{f', {args.skip} are skipped' if args.skip else ''}"
        )
    if not 0 <= args.shard < args.shards:
        raise ValueError(
            f"--shard counts from 0 to --shards - 1 = {args.shards - 1}, got {args.shard}"
        )
    chosen = [a for a in every() if not args.arms or a.method.name in args.arms]
    return chosen[args.shard :: args.shards]


def _run_arm(
    arm: Arm,
    pipe: object,
    clips: Callable[..., Tensor],
    reference: Tensor,
    measured: list[str],
    call: dict[str, object],
    args: argparse.Namespace,
) -> dict[str, object]:
    method, schedule = arm.method, arm.schedule(args.steps)
    if isinstance(method, CalibratedMethod) and method.needs_calibration:
        calibration = calibrate(
            pipe, method, measured, seed=CALIBRATION_SEED, progress=False, call=call
        )
        method = method.calibrated(calibration)
    started, reports = time.monotonic(), []
    with sparsediff.enable(pipe, method, schedule=schedule) as handle:
        # One report is of one batch; all batches keep alike.
        video = clips()
        reports.append(handle.report())
    seconds = time.monotonic() - started
    error = AttentionError()
    with watch(pipe, error.attend, method=method, schedule=schedule):
        clips(ERROR_CLIPS)
    scores = []
    for clip in zip(video, reference, strict=True):
        a, b = (x.to(args.device) for x in clip)
        found = fidelity(a, b)
        score = {"psnr": found.psnr, "ssim": found.ssim}
        if args.lpips_weights:
            score["st_lpips"] = st_lpips(a, b, weights=args.lpips_weights).mean().item()
        scores.append(score)
    return {
        "label": arm.label,
        "method": method.name,
        "series": arm.series,
        "target": arm.target,
        "parameters": method.parameters(),
        "schedule": str(schedule),
        "grid": reports[-1].grid,
        "density": reports[-1].density,
        "attention_error": error.mean,
        "seconds": round(seconds, 2),
        "clips": scores,
    }


def provenance(device: torch.device) -> dict[str, str]:
    """Versions, device, commit of the checkout ("" outside one) and date."""
    return {
        **environment(device),
        "commit": git_commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def arguments(args: argparse.Namespace) -> dict[str, object]:
    """The command line as JSON takes it; of files their names, since where they lay means nothing elsewhere."""
    given = {name: value for name, value in vars(args).items() if name != "command"}
    return {name: x.name if isinstance(x, Path) else x for name, x in given.items()}


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    from sparsediff.eval import study_cost, study_report

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run", help="every method on one model at one size")
    one.add_argument("--model", choices=tiny.MODELS, default="tiny-wan")
    one.add_argument("--frames", type=int, default=tiny.CALL["num_frames"])
    one.add_argument("--size", type=int, default=tiny.CALL["width"])
    one.add_argument("--steps", type=int, default=tiny.CALL["num_inference_steps"])
    one.add_argument("--prompts", type=int, default=16)
    one.add_argument("--skip", type=int, default=0, help="captions of the exam to pass over")
    one.add_argument("--seeds", type=int, default=2, help="seeds of each prompt")
    one.add_argument("--batch", type=int, default=32, help="clips at a time")
    one.add_argument("--arms", nargs="*", help="methods by name; all unless given")
    one.add_argument(
        "--candidates", action="store_true", help="forms of auto in place of the methods"
    )
    one.add_argument("--shard", type=int, default=0, help="take every ...")
    one.add_argument("--shards", type=int, default=1, help="... so many-th arm")
    one.add_argument(
        "--lpips-weights", type=Path, help="network of ST-LPIPS; left out, it is not measured"
    )
    one.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    one.add_argument("--out", type=Path, required=True)
    one.set_defaults(command=run)
    study_cost.add_command(commands)
    study_report.add_command(commands)
    args = parser.parse_args(argv)
    try:
        args.command(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
