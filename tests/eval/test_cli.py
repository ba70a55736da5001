"""The command line, as people meet it."""

import json
import subprocess
import sys

import pytest

from sparsediff.eval.cli import build_parser, main

FAST = ["--model", "random-wan", "--steps", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """The commands silence other libraries for the process they run in; tests share one."""
    monkeypatch.setattr("sparsediff.eval.cli_flags.quiet_libraries", lambda: None)


def test_compare_writes_everything_and_says_what_it_cost(tmp_path, capsys):
    assert (
        main(
            [
                "compare",
                *FAST,
                "--set",
                "block=64",
                "--dense-steps",
                "0",
                "--out",
                str(tmp_path / "new"),
            ]
        )
        == 0
    )
    out = capsys.readouterr()
    for word in (
        "density",
        "PSNR",
        "SSIM",
        "denoiser",
        "whole call",
        "side_by_side.mp4",
        "random weights",
    ):
        assert word in out.out
    assert "density 0.3" in out.err, "the progress bar shows the density"
    names = {p.name for p in (tmp_path / "new").iterdir()}
    assert names == {"dense.mp4", "sparse.mp4", "side_by_side.mp4", "frames.png", "comparison.json"}
    data = json.loads((tmp_path / "new/comparison.json").read_text())
    assert data["report"]["density"] == pytest.approx(0.32, abs=0.02)
    assert data["speedup"] == pytest.approx(data["dense_seconds"] / data["sparse_seconds"])
    assert data["request"]["steps"] == 2
    assert data["environment"]["torch"]


def test_the_bundled_model_is_the_default_and_brings_its_own_prompt(tmp_path, capsys):
    short = ["--steps", "4", "--frames", "9", "--device", "cpu"]
    assert main(["compare", *short, "--out", str(tmp_path)]) == 0
    assert "random weights" not in capsys.readouterr().out
    data = json.loads((tmp_path / "comparison.json").read_text())
    assert data["model"] == "tiny-wan"
    assert "star" in data["request"]["prompt"]
    assert data["report"]["density"] < 0.6
    assert data["fidelity"]["psnr"] > 20, "a trained model stays close to its dense twin"


def test_a_dense_comparison_is_identical(tmp_path, capsys):
    assert main(["compare", *FAST, "--dense-steps", "1.0", "--out", str(tmp_path)]) == 0
    assert "identical" in capsys.readouterr().out
    assert json.loads((tmp_path / "comparison.json").read_text())["fidelity"]["psnr"] is None


def test_generate_writes_a_clip_and_a_report(tmp_path, capsys):
    clip, report = tmp_path / "clip.mp4", tmp_path / "report.json"
    assert (
        main(
            [
                "generate",
                *FAST,
                "--method",
                "lite_attention",
                "--set",
                "tile=(64, 64)",
                "--out",
                str(clip),
                "--report",
                str(report),
            ]
        )
        == 0
    )
    assert clip.stat().st_size > 1000
    assert (
        "lite_attention(threshold=-10.0, tile=(64, 64)" in json.loads(report.read_text())["method"]
    )
    assert "17 frames" in capsys.readouterr().out


def test_methods_and_doctor(capsys):
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    for word in (
        "lite_attention",
        "arXiv:2511.11062",
        "--set threshold=-10.0",
        "draft_attention",
        "dense_above_sigma=0.925",
    ):
        assert word in text
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("torch", "self-test", "WanTransformer3DModel", "cpu"):
        assert word in text
    for block in (64, 128):  # each has a kernel of its own on Hopper
        assert f"bfloat16, {block}x{block}" in text
        assert f"sparse attention on cpu, blocks of {block}" in text
    assert "FAILED" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--model", "tiny-wam"], "unknown model 'tiny-wam': bundled are"),
        (["compare", "--model", "."], "needs a --prompt"),
        (["compare", *FAST, "--method", "lite"], "did you mean 'lite_attention'"),
        (["compare", *FAST, "--set", "densty=0.3"], "did you mean 'density'"),
        (["compare", *FAST, "--set", "density"], "--set takes NAME=VALUE"),
        (["compare", *FAST, "--set", "density=7"], "density must be a share in"),
        (["compare", *FAST, "--dense-steps", "1.5"], "use an int for a count"),
        (["generate", *FAST, "--out", "clip.gif"], "--out must end in .mp4"),
        (["generate", *FAST, "--steps", "0"], "--steps must be at least 1"),
        (["generate", *FAST, "--device", "cuda"], "there is no CUDA device here"),
        (["generate", *FAST, "--dtype", "int8"], "dtype must be one of"),
    ],
)
def test_mistakes_are_one_line_that_names_the_fix(
    arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_an_unwritable_output_is_said_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "sparsediff.eval.models.load_pipeline", lambda *a, **k: pytest.fail("loaded a model first")
    )
    (tmp_path / "file").write_text("x")
    assert main(["generate", *FAST, "--out", str(tmp_path / "file/clip.mp4")]) == 2
    assert main(["compare", *FAST, "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.count("cannot write") == 2


def test_help_answers_at_once_and_says_something():
    code = "import sys; from sparsediff.eval.cli import main; main(['--help'])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "compare" in out.stdout
    heavy = "import sys; from sparsediff.eval.cli import build_parser; build_parser(); print('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", heavy], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "False"
    )
    for name in ("generate", "compare"):
        text = build_parser().parse_args([name]).__dict__
        assert text["method"] is None, "auto, unless a calibration brings its own"


def test_no_command_prints_the_help(capsys):
    assert main([]) == 0
    assert "usage: sparsediff" in capsys.readouterr().out
