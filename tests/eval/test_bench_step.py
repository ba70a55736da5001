"""The benchmark of a whole step, at toy sizes on a CPU: every kind of step of every model runs, and runs what it says."""

from dataclasses import replace

import pytest
import torch

from sparsediff.eval import bench_step
from sparsediff.eval.step_models import STEP_MODELS

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
WAN = {**HEADS, "text_dim": 32, "freq_dim": 32, "ffn_dim": 32}
FLUX = {**HEADS, "joint_attention_dim": 16, "pooled_projection_dim": 8, "axes_dims_rope": (4, 6, 6)}
# Configuration, latents and grid of each model made small.
TOYS = {
    "wan-14b": (WAN, (1, 16, 5, 32, 32), "5x16x16"),
    "wan-2.2-5b": (WAN, (1, 48, 5, 32, 32), "5x16x16"),
    "hunyuan-video": (
        {
            **HEADS,
            "text_embed_dim": 16,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (4, 6, 6),
        },
        (1, 16, 4, 32, 32),
        "4x16x16 + 256 text",
    ),
    "hunyuan-video-1.5": (
        {
            **HEADS,
            "text_embed_dim": 16,
            "text_embed_2_dim": 16,
            "image_embed_dim": 16,
            "rope_axes_dim": (4, 6, 6),
        },
        (1, 65, 4, 16, 16),
        "4x16x16 + 1985 text",
    ),
    "cogvideox-1.5": (
        {**HEADS, "time_embed_dim": 8, "text_embed_dim": 16},
        (1, 10, 16, 32, 32),
        "226 text + 5x16x16",
    ),
    "ltx-2": (
        {
            **HEADS,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8,
            "cross_attention_dim": 32,
            "audio_cross_attention_dim": 16,
            "caption_channels": 16,
        },
        (5, 16, 16),
        "5x16x16",
    ),
    "flux-2k": (FLUX, (32, 40), "512 text + 1x32x40"),
    "flux-4k": (FLUX, (40, 32), "512 text + 1x40x32"),
}


def toy(name):
    case, (config, latent, _) = STEP_MODELS[name], TOYS[name]
    return replace(
        case,
        config={**case.config, **config},
        layers=dict.fromkeys(case.layers, 1),
        latent=latent,
    )


def test_every_model_is_tried():
    assert set(TOYS) == set(STEP_MODELS)


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.parametrize(("name", "backend"), [*((n, None) for n in TOYS), ("wan-14b", "eager")])
def test_every_kind_of_step(name, backend, monkeypatch):
    monkeypatch.setattr("sparsediff.block_attention.CPU_BREAK_EVEN", 2.0)
    case = toy(name)
    model = case.build("cpu")
    *records, report = bench_step.measure(case, model, backend=backend)
    assert [(r["what"], r.get("density")) for r in records] == [
        ("dense", None),
        ("no self-attention", None),
        *(
            (kind, density)
            for density in (0.5, 0.3, 0.2, 0.1)
            for kind in ("sparse", "sparse, choosing blocks")
        ),
    ]
    assert report["grid"] == TOYS[name][2]
    assert report["backends"] == {"cpu": "CPU tensors: gathered blocks in plain torch"}
    assert report["dense_calls"] == {}
    assert case.of_layers(model) == STEP_MODELS[name].of_layers(model)
    if "text" not in report["grid"]:
        # 1280 tokens are 20 blocks of 64; every density is held for four timesteps.
        want = [d for d in (0.5, 0.3, 0.2, 0.1) for _ in range(bench_step.CALLS)]
        assert report["densities"] == pytest.approx(want, abs=0.002)
    else:
        rungs = report["densities"][:: bench_step.CALLS]
        assert rungs == sorted(rungs, reverse=True)
        assert len(set(rungs)) == 4


def test_a_step_without_attention_is_another_step():
    case = toy("flux-2k")
    model = case.build("cpu")
    arguments = case.arguments(model, case.latent, lambda *sizes: torch.ones(sizes).bfloat16())
    timestep = torch.tensor([0.5])

    def run():
        return model(**arguments, timestep=timestep, return_dict=False)[0]

    seen = []
    with torch.no_grad():
        dense = run()
        with bench_step.watch(
            model,
            lambda c: seen.append(c) or bench_step._no_attention(c),
            method=bench_step.Ladder(),
            schedule=bench_step.Schedule(),
        ):
            assert not torch.equal(run(), dense)
    assert len(seen) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs there")
def test_a_machine_without_a_gpu_is_told():
    with pytest.raises(ValueError, match="needs a CUDA device"):
        bench_step.main()


def test_an_unknown_model_is_told_what_there_is():
    with pytest.raises(ValueError, match=r"known: wan-14b, .*flux-4k"):
        bench_step.main(name="wan")
