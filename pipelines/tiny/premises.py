"""Does the attention of a tiny model behave as sparse-attention papers say?  Measured, not assumed.

    python -m sparsediff.pipelines.tiny.premises --model tiny-wan --out docs/tiny

Masks are the heaviest 20 % of 64x64 blocks by exact softmax mass, tokens in the model's own order (frame, row,
column).  Everything is of the self-attention of the conditional branch unless named otherwise.

Where text joins the sequence (CogVideoX: in front of the video) it is always kept: every video token attends to all
text, text attends to everything, and blocks are counted from the first video token on.  Masks, overlaps and masses are
then of the video-to-video part, whose mass is made to sum to one; how much of a video token's attention goes to text
is a figure of its own.  The log-sum-exp is of the whole row, for video tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import CALL, MODELS, WEIGHTS, load_folder
from .autoencoder import psnr
from .evaluate import decode, exam, generate
from .models import TEXT_TOKENS

BLOCK = 64
KEEP = 0.2
MASSES = (0.5, 0.8, 0.95)
DENSITIES = (0.5, 0.3, 0.2, 0.1)
DENSE_FRACTION = 0.2


@dataclass(frozen=True, kw_only=True)
class Attention:
    """What the probe must know of a family's self-attention."""

    text_tokens: int  # in front of the video tokens
    branches_in_batch: (
        bool  # one call for (unconditional, conditional), else two calls, conditional first
    )


ATTENTION = {
    "tiny-wan": Attention(text_tokens=0, branches_in_batch=False),
    "tiny-cogvideox": Attention(text_tokens=TEXT_TOKENS["tiny-cogvideox"], branches_in_batch=True),
}


@contextmanager
def intercepted(
    transformer: nn.Module, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """Send every self-attention of `transformer` through `attend(q, k, v)`, layout `[B, H, S, D]`."""

    class Redirect(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            del types
            named = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
            # text in cross-attention is never as long as the video here
            if (
                func is F.scaled_dot_product_attention
                and named["query"].shape == named["key"].shape
            ):
                return attend(named["query"], named["key"], named["value"])
            return func(*args, **(kwargs or {}))

    stock = transformer.forward

    def forward(*args, **kwargs):
        with Redirect():
            return stock(*args, **kwargs)

    transformer.forward = forward
    try:
        yield
    finally:
        del transformer.forward


class Probe:
    """Attention that counts where it is (layer, branch, step) and records or thins out.

    `mass` `[steps * layers, B, H, N, N]` float16: share of each query block's softmax mass per key block;
    `lse` `[steps * layers, B, H, S]`: natural-log sum of exponentials; `to_text` `[steps * layers, H]`: share of the
    mass that goes to text.  All of video tokens, conditional branch.
    """

    def __init__(
        self,
        layers: int,
        attention: Attention,
        *,
        dense_steps: int = 0,
        density: float | None = None,
        record: bool = False,
    ) -> None:
        self.layers, self.attention = layers, attention
        self.dense_steps, self.density, self.record = dense_steps, density, record
        self.calls = 0
        self.mass: list[Tensor] = []
        self.lse: list[Tensor] = []
        self.to_text: list[Tensor] = []
        self.unconditional_overlap: list[float] = []

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Self-attention, `[B, H, S, D]`."""
        text, batched = self.attention.text_tokens, self.attention.branches_in_batch
        step, position = divmod(self.calls, self.layers if batched else 2 * self.layers)
        self.calls += 1
        sparse = self.density is not None and step >= self.dense_steps
        if not (sparse or self.record):
            return F.scaled_dot_product_attention(query, key, value)
        scores = (query.float() @ key.float().mT) * query.shape[-1] ** -0.5
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp_()
        del scores
        mass = block_mass(weights[..., text:, text:])
        if self.record and batched:
            conditional = slice(len(mass) // 2, None)
            to_text = weights[conditional, :, text:, :text].sum(-1).mean((0, 2))
            self._record(mass[conditional], lse[conditional, :, text:], to_text)
            self._compare(mass[: len(mass) // 2], self.mass[-1])
        elif self.record and position < self.layers:
            self._record(mass, lse, torch.zeros(mass.shape[1]))
        elif self.record:
            self._compare(mass, self.mass[step * self.layers + position - self.layers])
        if sparse:
            kept = top_blocks(mass, self.density)
            mask = kept.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
            tokens = weights.shape[-1] - text
            weights[..., text:, text:] *= mask[..., :tokens, :tokens]
            weights /= weights.sum(-1, keepdim=True)
        return weights.to(value.dtype) @ value

    def _record(self, mass: Tensor, lse: Tensor, to_text: Tensor) -> None:
        self.mass.append(mass.half())
        self.lse.append(lse)
        self.to_text.append(to_text.cpu())

    def _compare(self, unconditional: Tensor, conditional: Tensor) -> None:
        shared = overlap(top_blocks(unconditional, KEEP), top_blocks(conditional, KEEP))
        self.unconditional_overlap.append(shared.mean().item())


def block_mass(weights: Tensor) -> Tensor:
    """`[B, H, S, S]` softmax weights to `[B, H, N, N]`; rows sum to one (ragged last block included)."""
    pad = -weights.shape[-1] % BLOCK
    w = F.pad(weights, (0, pad, 0, pad)) if pad else weights
    b, h, s, _ = w.shape
    mass = w.view(b, h, s // BLOCK, BLOCK, s // BLOCK, BLOCK).sum((3, 5))
    return mass / mass.sum(-1, keepdim=True)


def top_blocks(mass: Tensor, density: float) -> Tensor:
    """Bool mask of the heaviest `density` of each row, at least one block."""
    n = mass.shape[-1]
    index = mass.topk(max(1, round(density * n)), dim=-1).indices
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, index, True)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Share of the blocks of `a` that are in `b`, over the last two dimensions."""
    return (a & b).float().sum((-1, -2)) / a.float().sum((-1, -2))


def density_for(mass: Tensor, share: float) -> Tensor:
    """Smallest part of each row's blocks that carries `share` of its mass, averaged over rows."""
    cumulative = mass.float().sort(-1, descending=True).values.cumsum(-1)
    return ((cumulative < share).sum(-1) + 1).clamp(max=mass.shape[-1]).float().mean(
        -1
    ) / mass.shape[-1]


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity per clip of `[B, 3, F, H, W]` in [-1, 1]; 11-pixel Gaussian window on luminance."""
    x, y = ((v.clamp(-1, 1) + 1).div(2).mean(1).flatten(0, 1)[:, None] for v in (a, b))
    g = torch.exp(-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = (g[:, None] * g / g.sum() ** 2)[None, None].to(x)

    def blur(v: Tensor) -> Tensor:
        return F.conv2d(v, window)

    mx, my = blur(x), blur(y)
    vx, vy, c = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    value = ((2 * mx * my + 1e-4) * (2 * c + 9e-4)) / (
        (mx * mx + my * my + 1e-4) * (vx + vy + 9e-4)
    )
    return value.mean((1, 2, 3)).view(len(a), -1).mean(1)


def patterns(probe: Probe, steps: int) -> dict:
    """Everything that follows from the recorded block masses and LSEs."""
    mass = torch.stack(probe.mass).unflatten(0, (steps, probe.layers))  # [T, L, B, H, N, N]
    lse = torch.stack(probe.lse).unflatten(0, (steps, probe.layers))
    kept = top_blocks(mass, KEEP)
    text = torch.stack(probe.to_text).unflatten(0, (steps, probe.layers))  # [T, L, H]
    result: dict = {
        "blocks": mass.shape[-1],
        "layers": probe.layers,
        "heads": mass.shape[3],
        "keep": KEEP,
        "text_tokens": probe.attention.text_tokens,
        "mass_on_text": {
            "mean": text.mean().item(),
            "least_head": text.mean(0).min().item(),
            "most_head": text.mean(0).max().item(),
        },
    }
    lags = range(1, steps // 2 + 1)
    by_lag = {d: overlap(kept[:-d], kept[d:]) for d in lags}
    result["overlap_by_step_distance"] = {
        d: {"mean": v.mean().item(), "worst_head": v.mean((0, 2)).min().item()}
        for d, v in by_lag.items()
    }
    result["overlap_from_dense_prefix_to_end"] = (
        overlap(kept[int(DENSE_FRACTION * steps)], kept[-1]).mean().item()
    )
    result["overlap_conditional_unconditional"] = sum(probe.unconditional_overlap) / len(
        probe.unconditional_overlap
    )
    result["density_for_mass"] = {}
    for share in MASSES:
        per_head = density_for(mass, share).mean(2)  # [T, L, H]
        result["density_for_mass"][f"{share:g}"] = {
            "mean": per_head.mean().item(),
            "sparsest_head": per_head.mean(0).min().item(),
            "densest_head": per_head.mean(0).max().item(),
            "by_step": per_head.mean((1, 2)).tolist(),
            "by_layer_and_head": per_head.mean(0).tolist(),
        }
    drift = {d: (lse[d:] - lse[:-d]).abs() for d in lags if d <= 5}
    result["lse_drift_nats"] = {
        d: {
            "mean": v.mean().item(),
            "p99": v.flatten()[:: max(1, v.numel() // 1_000_000)].quantile(0.99).item(),
        }
        for d, v in drift.items()
    }
    result["lse_drift_by_step"] = (lse[1:] - lse[:-1]).abs().mean((1, 2, 3, 4)).tolist()
    return result


def similarity(probe: Probe, prompts: int, seeds: int) -> dict[str, float]:
    """Overlap of masks at the same layer, head and step: other seed, other prompt.  Batch is prompts x seeds."""
    kept = top_blocks(torch.stack(probe.mass), KEEP).unflatten(
        1, (prompts, seeds)
    )  # [TL, P, S, H, N, N]
    return {
        "other_seed": overlap(kept[:, :, 0], kept[:, :, 1]).mean().item(),
        "other_prompt": overlap(kept[:, :-1, 0], kept[:, 1:, 0]).mean().item(),
        "by_chance": KEEP,
    }


def measure(args: argparse.Namespace) -> Iterator[dict]:
    """Run the model dense, recording, and then sparse at every density; yield what is known so far."""
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = load_folder(args.weights, args.model, torch_dtype=dtype, device=device)
    pipe.vae.to(torch.float32)
    blocks = getattr(pipe.transformer, "blocks", None) or pipe.transformer.transformer_blocks
    attention, layers, steps = ATTENTION[args.model], len(blocks), args.steps
    call = {
        "height": args.size,
        "width": args.size,
        "num_frames": args.frames,
        "num_inference_steps": steps,
    }
    _, prompts = exam(args.prompts)
    twice = [p for p in prompts for _ in range(2)]  # each prompt with two seeds

    def run(probe: Probe) -> Tensor:
        with intercepted(pipe.transformer, probe):
            latents = generate(pipe, twice, batch=len(twice), output_type="latent", **call)
        return decode(pipe.vae, latents)

    recorder = Probe(layers, attention, record=True)
    dense = run(recorder)
    result = {
        "model": args.model,
        "call": {**CALL, **call},
        "prompts": prompts,
        "seeds_per_prompt": 2,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "dtype": str(dtype),
        "block": BLOCK,
        **patterns(recorder, steps),
        "similarity": similarity(recorder, args.prompts, 2),
        "oracle": {},
    }
    del recorder
    yield result
    dense_steps = round(DENSE_FRACTION * steps)
    for density in args.densities:
        video = run(Probe(layers, attention, dense_steps=dense_steps, density=density))
        p, s = psnr(video, dense), ssim(video, dense)
        result["oracle"][f"{density:g}"] = {
            "dense_steps": dense_steps, "clips": len(p),
            "psnr": p.mean().item(), "psnr_min": p.min().item(), "psnr_std": p.std().item(),
            "ssim": s.mean().item(), "ssim_min": s.min().item(),
        }  # fmt: skip
        print(
            f"density {density:g}: PSNR {p.mean():.1f} dB ({p.min():.1f} to {p.max():.1f}), SSIM {s.mean():.3f}",
            flush=True,
        )
        yield result


def plot(result: dict, path: Path) -> None:
    """Six panels, one picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(15, 8))
    (a, b, c), (d, e, f) = axes
    lag = result["overlap_by_step_distance"]
    x = [int(k) for k in lag]
    a.plot(x, [v["mean"] for v in lag.values()], "o-", label="mean")
    a.plot(x, [v["worst_head"] for v in lag.values()], "o--", label="worst head")
    for name, value in result["similarity"].items():
        a.axhline(
            value,
            ls=":",
            label=name.replace("_", " "),
            color={"other_seed": "C2", "other_prompt": "C3"}.get(name, "grey"),
        )
    a.set(
        title=f"Mask overlap (top {result['keep']:.0%} of blocks)",
        xlabel="denoising steps apart",
        ylim=(0, 1),
    )
    a.legend()
    for share, v in result["density_for_mass"].items():
        b.plot(v["by_step"], label=f"{float(share):.0%} of the mass")
        c.plot(
            sorted(x for row in v["by_layer_and_head"] for x in row),
            label=f"{float(share):.0%} of the mass",
        )
    b.set(title="Density needed over steps", xlabel="step", ylim=(0, 1))
    c.set(title="Density needed, heads sorted", xlabel="head", ylim=(0, 1))
    b.legend()
    c.legend()
    table = result["density_for_mass"]["0.95"]["by_layer_and_head"]
    image = d.imshow(torch.tensor(table), vmin=0, vmax=1, aspect="auto")
    d.set(title="Density for 95 % of the mass", xlabel="head", ylabel="layer")
    figure.colorbar(image, ax=d)
    e.plot(range(1, 1 + len(result["lse_drift_by_step"])), result["lse_drift_by_step"], "o-")
    e.set(title="Mean change of the LSE from the step before", xlabel="step", ylabel="nats")
    oracle = result["oracle"]
    f.plot([float(k) for k in oracle], [v["psnr"] for v in oracle.values()], "o-", label="mean")
    f.plot(
        [float(k) for k in oracle],
        [v["psnr_min"] for v in oracle.values()],
        "o--",
        label="worst clip",
    )
    f.set(
        title="Oracle top-k, first 20 % of steps dense",
        xlabel="density of the other steps",
        ylabel="PSNR to dense, dB",
    )
    if oracle:
        f.legend()
    else:
        f.set(title="Oracle top-k: not measured")
        f.set_axis_off()
    figure.suptitle(
        f"{result['model']}: {result['call']['num_frames']} frames of {result['call']['width']} px, {result['block']}-token blocks"
        + (f", {result['text_tokens']} text tokens kept" if result["text_tokens"] else "")
    )
    figure.tight_layout()
    figure.savefig(path, dpi=70)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="tiny-wan")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=CALL["num_inference_steps"])
    parser.add_argument("--frames", type=int, default=CALL["num_frames"])
    parser.add_argument("--size", type=int, default=CALL["width"])
    parser.add_argument("--densities", type=float, nargs="*", default=DENSITIES)
    parser.add_argument("--tag", default="", help="appended to the file names")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = f"{args.model}-premises{args.tag}"
    for result in measure(args):
        (args.out / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, args.out / f"{stem}.png")


if __name__ == "__main__":
    main()
