"""`python -m sparsediff.eval.study`, end to end on a CPU at the smallest size at which blocks can be chosen."""

import json
import re

import pytest

import sparsediff
from sparsediff.eval import study
from sparsediff.eval.environment import git_commit
from sparsediff.pipelines.tiny.evaluate import exam

SMALL = [
    "--frames",
    "17",
    "--size",
    "64",
    "--steps",
    "2",
    "--prompts",
    "1",
    "--seeds",
    "1",
    "--device",
    "cpu",
]


@pytest.mark.slow
def test_run_writes_figures_and_what_they_were_made_of(tmp_path, capsys):
    out = tmp_path / "new" / "wan.json"
    # The third of three shards is the arm of density 0.5.
    shard = ["--arms", "paro_attention", "--shard", "2", "--shards", "3"]
    study.main(["run", *SMALL, *shard, "--skip", "2", "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["commit"] == git_commit()
    assert result["sparsediff"] == sparsediff.__version__
    assert {"torch", "diffusers", "device", "date"} <= result.keys()
    assert (result["seed"], result["seeds"], result["calibration"]["seed"]) == (0, 1, 10_000)
    assert (result["prompts"], result["skipped"]) == (1, 2)
    assert [*result["captions"], *result["calibration"]["captions"]] == exam(5)[1][2:]
    assert not {*result["captions"]} & {*result["calibration"]["captions"]}
    assert result["arguments"]["arms"] == ["paro_attention"]
    assert result["arguments"]["out"] == out.name
    assert result["grid"] == "5x8x8"
    (arm,) = result["arms"]
    assert (arm["label"], arm["target"]) == ("paro_attention 0.5", 0.5)
    assert arm["parameters"]["density"] == 0.5
    assert 0.5 <= arm["density"] < 1
    assert len(arm["clips"]) == 1
    assert arm["clips"][0].keys() == {"psnr", "ssim"}
    assert 0 < arm["attention_error"] < 1
    assert "paro_attention 0.5" in capsys.readouterr().out
    study.main(["report", str(out), "--out", str(tmp_path / "docs")])
    assert "| paro_attention 0.5 |" in (tmp_path / "docs" / "methods-figures.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arms", "paro"], "no arm is called paro; there are auto, adaspa"),
        (["--prompts", "99"], r"--prompts must be 1 to 98"),
        (["--prompts", "0"], r"--prompts must be 1 to 98"),
        (["--prompts", "16", "--skip", "90"], r"--prompts must be 1 to 8: .* 90 are skipped"),
        (["--skip", "-1"], r"--skip must be 0 to 97, got -1"),
        (["--shard", "2", "--shards", "2"], r"--shard counts from 0 to --shards - 1 = 1, got 2"),
        (["--out", "/proc/none/x.json"], "cannot write /proc/none/x.json"),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_loaded(
    flags, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(study.tiny, "load_folder", None)
    with pytest.raises(SystemExit) as stopped:
        study.main(["run", *SMALL, "--out", str(tmp_path / "x.json"), *flags])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_shards_share_the_arms_between_them():
    parts = [
        [arm.label for arm in list(study.arms())[shard::3]] for shard in range(3)
    ]  # as the command takes them
    labels = [label for part in parts for label in part]
    assert sorted(labels) == sorted(arm.label for arm in study.arms())
    assert len({*labels}) == len(labels), "a label names one arm"
    assert {"sparse_vdit 0.3", "sparse_vdit 0.05", "lite_attention -0.5"} < {*labels}
    names = {arm.method.name for arm in study.arms()}
    assert names == {*sparsediff.list_methods(), "random"} - {"custom"}


def test_candidates_are_held_against_the_default_as_it_is():
    candidates = list(study.candidates())
    assert len({a.label for a in candidates}) == len(candidates)
    plain = [a for a in candidates if a.series == "auto"]
    assert [a.method for a in plain] == [a.method for a in study.arms() if a.series == "auto"]
    assert len({a.method for a in candidates}) == len(candidates), "each is another method"


@pytest.mark.parametrize("steps", [5, 20, 50])
def test_every_arm_has_a_fifth_of_its_steps_dense(steps):
    for arm in study.arms():
        method, dense = arm.method, arm.schedule(steps).dense_steps
        searching = method.name in ("sparse_d", "adaspa")
        assert dense + searching == round(steps / 5), arm.label
