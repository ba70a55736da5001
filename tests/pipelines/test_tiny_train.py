"""The training recipe end to end at toy size, on a CPU."""

import json

import pytest
import torch
from safetensors.torch import load_file

from sparsediff.pipelines.tiny import evaluate, load_folder, tasks, train
from sparsediff.pipelines.tiny.optim import orthogonalise

DENOISER = ["denoiser", "--recipe", "toy", "--iterations", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny")
    train.main(["autoencoder", "--recipe", "toy", "--iterations", "2", "--out", str(out)])
    return out


def test_recipe_from_nothing_to_a_pipeline_folder(run):
    train.main(["autoencoder", "--recipe", "toy-decoder", "--iterations", "1", "--out", str(run)])
    train.main([*DENOISER, "--out", str(run)])
    train.main([*DENOISER, "--out", str(run)])  # the second chunk goes on from the first
    train.main(["export", "--out", str(run)])
    pipe = load_folder(run / "weights", "tiny-wan")
    call = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}
    assert evaluate.generate(pipe, ["a red star"], **call).isfinite().all()
    records = [
        json.loads(x) for x in (run / "log-denoiser-tiny-wan.jsonl").read_text().splitlines()
    ]
    assert all(torch.tensor(r["loss"]).isfinite() for r in records if "loss" in r)
    assert sum(f.stat().st_size for f in (run / "tiny-wan").iterdir()) <= 60e6


def test_same_seed_same_weights(run, tmp_path):
    weights = []
    for name in ("a", "b"):
        out = tmp_path / name
        out.mkdir()
        (out / "autoencoder.safetensors").write_bytes(
            (run / "autoencoder.safetensors").read_bytes()
        )
        train.main([*DENOISER, "--out", str(out), "--model", "tiny-cogvideox", "--seed", "3"])
        weights.append(load_file(out / "tiny-cogvideox" / "raw.safetensors"))
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_a_chunk_can_start_from_the_shipped_weights(tmp_path):
    train.main([*DENOISER, "--out", str(tmp_path), "--resume", "shipped"])
    stored = load_file(tmp_path / "tiny-wan" / "average.safetensors")
    assert all(v.isfinite().all() for v in stored.values())


def test_a_budget_is_needed(tmp_path):
    with pytest.raises(SystemExit):
        train.main(["denoiser", "--out", str(tmp_path)])


def test_a_recipe_of_the_other_stage_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["autoencoder", "--recipe", "more", "--iterations", "1", "--out", str(tmp_path)])
    assert "autoencoder needs --recipe, one of start, longer" in capsys.readouterr().err


def test_padding_bias_hides_and_counts():
    valid = torch.tensor([[True, True, False, False]])
    bias = tasks.padding_bias(valid, total=10)[0, 0, 0]
    assert bias[:2].tolist() == [0, 0]
    assert bias[2] < -1000
    assert bias[3].exp().round() == 8


@pytest.mark.parametrize("shape", [(2, 16, 64), (2, 64, 16), (1, 32, 32)])
def test_orthogonalise_brings_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    assert values.max() < 1.3
    assert values.median() > 0.6
