"""A folder of results as an evaluation writes it, made in a moment from numbers of its own."""

import math
import shutil
import zlib

import pytest
import torch

from sparsediff.eval.results import (
    CLIPS,
    ArmResult,
    Check,
    ClipResult,
    Forecast,
    LayerResult,
    Spread,
    StepResult,
    Timings,
    save_arm,
)
from sparsediff.eval.video import write_mp4

STEPS, LAYERS, HEADS, FRAMES, SIZE = 8, 6, 4, 9, 64
PROMPTS = ("a large red circle moves left", "two yellow stars pass behind a striped ring")
SETTINGS = {
    # arm: role, method, parameters, density of sparse steps, speed, PSNR
    "dense": ("dense", "", {}, 1.0, 1.0, math.inf),
    "auto-density=0.3": ("sparse", "auto", {"density": 0.3}, 0.3, 1.9, 29.0),
    "lite_attention-threshold=-1": ("sparse", "lite_attention", {"threshold": -1}, 0.6, 1.3, 25.5),
    "random-density=0.3": ("random", "random", {"density": 0.3}, 0.3, 1.9, 14.0),
}


def make_results(folder, *, prompts=PROMPTS, seeds=(0,), arms=tuple(SETTINGS), videos=True):
    """Write arms, and clips that differ as the figures say; returns the folder."""
    for arm in arms:
        role, method, parameters, density, speed, psnr = SETTINGS[arm]
        clips = tuple(
            _clip(folder, arm, i, prompt, seed, density, speed, psnr, videos)
            for i, (prompt, seed) in enumerate((p, s) for p in prompts for s in seeds)
        )
        result = ArmResult(
            arm=arm,
            label=arm.replace("-", " ", 1),
            role=role,
            suite="prompts",
            suite_version="1",
            model="tiny-wan",
            call={"num_inference_steps": STEPS, "height": SIZE, "width": SIZE},
            fps=16,
            clips=clips,
            layout={"transformer": "WanTransformer3DModel", "layers": LAYERS, "heads": HEADS},
            method=method,
            parameters=parameters,
            schedule="" if role == "dense" else "Schedule(dense_steps=2)",
            configuration={"dtype": "float32"},
            config_hash=f"{len(arm):064x}",
            git_hash="0123456789ab",
            environment={"torch": "2.13.0", "device": "a CPU", "sparsediff": "0.1.0"},
            seeds=tuple(seeds),
            created="2026-11-22T09:00:00+00:00",
            warmup_seconds=1.5,
            repeat=clips[0] if role == "dense" else None,
            checks=(
                Check(name="deterministic", passed=True, detail="the dense clip came out again, bit by bit"),
                Check(name="timing", passed=arm != "random-density=0.3", detail="parts add up to the whole"),
            ),
            notes=("LPIPS was not measured: the package lpips is not installed",),
        )  # fmt: skip
        save_arm(folder, result)
    return folder


def _clip(folder, arm, index, prompt, seed, density, speed, psnr, videos):
    t = torch.linspace(0, 1, FRAMES)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, SIZE)] * 2, indexing="ij")
    inside = (x - (t[:, None, None] - 0.5)) ** 2 + (y - 0.3 * index) ** 2 < 0.15
    video = torch.where(
        inside[..., None], torch.tensor([0.9, 0.2, 0.1]), torch.tensor([0.1, 0.15, 0.4])
    )
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(index))
    video = (video + noise * (0 if math.isinf(psnr) else 10 ** (-psnr / 20))).clamp(0, 1)
    path = f"{CLIPS}/{arm}/{index}.mp4"
    if videos:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_mp4(folder / path, video, 16)
    dense = math.isinf(psnr)
    psnr = psnr + index
    by_step = [1.0 if i < 2 else density for i in range(STEPS)]
    mean = sum(by_step) / STEPS
    seconds = 2.0 / speed
    curves = {"flicker": tuple(3 + math.sin(i) for i in range(FRAMES - 1))}
    if not dense:
        curves |= {
            "psnr": tuple(psnr - 0.2 * i for i in range(FRAMES)),
            "ssim": tuple(0.97 - 0.005 * i for i in range(FRAMES)),
        }
    metrics = {name: sum(curve) / len(curve) for name, curve in curves.items()}
    metrics |= {"psnr": psnr} if not dense else {}
    steps = tuple(
        StepResult(
            step=i,
            sigma=1 - i / STEPS,
            density=by_step[i],
            dense_share=float(i < 2),
            seconds=seconds / STEPS,
            latent_divergence=None if dense else 0.0 if i < 2 else 0.01 * (i - 1) ** 1.5,
        )
        for i in range(STEPS)
    )
    layers = () if dense else tuple(
        LayerResult(
            name=f"transformer.blocks.{n}.attn1",
            steps=tuple(min(1.0, d * (0.8 + 0.08 * n)) for d in by_step),
            heads=tuple(min(1.0, mean * (0.7 + 0.2 * h)) for h in range(HEADS)),
            calls=STEPS * 2,
            dense_calls=4,
        )
        for n in range(LAYERS)
    )  # fmt: skip
    return ClipResult(
        index=index,
        prompt=prompt,
        seed=seed,
        timings=Timings(
            total=Spread(samples=(seconds * 1.3, seconds * 1.32)),
            denoiser=Spread(samples=(seconds, seconds * 1.02)),
            attention=Spread(samples=(seconds * 0.5, seconds * 0.51)),
            mask=None if dense else Spread(samples=(seconds * 0.02,) * 2),
            text=Spread(samples=(0.05, 0.06)),
            decode=Spread(samples=(seconds * 0.2, seconds * 0.2)),
        ),
        density=mean,
        metrics=metrics,
        frame_curves=curves,
        steps=steps,
        layers=layers,
        forecast=None if dense else Forecast(tokens=2304, attention_share=0.5, density=mean, speedup=speed * 1.1),
        dense_calls={} if dense else {"schedule: first steps": 24},
        backends={} if dense else {"cpu": "tensors on the CPU"},
        peak_memory_bytes=500 << 20,
        video=path if videos else None,
        shape=(FRAMES, SIZE, SIZE),
        latents_sha256=f"{index:064x}",
        frames_sha256=f'{zlib.crc32(f"{arm} {index}".encode()):064x}',
    )  # fmt: skip


@pytest.fixture(scope="session")
def made_results(tmp_path_factory):
    """Made once: encoding videos is what takes time."""
    return make_results(tmp_path_factory.mktemp("made") / "results")


@pytest.fixture
def results_folder(made_results, tmp_path):
    """Two prompts, four arms, with videos; a copy to change at will."""
    return shutil.copytree(made_results, tmp_path / "results")


@pytest.fixture(scope="session")
def make_results_folder():
    """`make_results`, for folders of other prompts and arms."""
    return make_results
