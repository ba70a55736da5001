"""`sparsediff calibrate`, and `--calibration` for the commands that generate."""

import json
import re

import pytest

import sparsediff
from sparsediff import Calibration
from sparsediff.calibration import FILE
from sparsediff.calibrator import PARTIAL
from sparsediff.eval.cli import main
from sparsediff.eval.literals import parse_settings
from sparsediff.testing import random_wan_pipeline

FAST = ["--model", "random-wan", "--steps", "2", "--guidance", "1.0", "--device", "cpu"]
VDIT = ["--method", "sparse_vdit", "--set", "costs=(1.0,0.0,0.3,0.3,0.3)", "--set", "epsilon=1.0"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """The commands silence other libraries for the process they run in; tests share one."""
    monkeypatch.setattr("sparsediff.eval.cli_flags.quiet_libraries", lambda: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A calibration of two prompts."""
    folder = tmp_path_factory.mktemp("vdit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsediff.eval.cli_flags.quiet_libraries", lambda: None)
        prompts = ["--prompt", "a small red circle", "--prompt", "two yellow stars"]
        command = ["calibrate", *FAST, *VDIT, *prompts, "--seed", "3", "--frames", "17"]
        assert main([*command, "--out", str(folder)]) == 0
    return folder


def test_calibrate_writes_the_artefact_and_says_how_to_use_it(tmp_path, capsys):
    out = tmp_path / "new"
    assert main(["calibrate", *FAST, *VDIT, "--height", "128", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert [p.name for p in out.iterdir()] == [FILE]
    calibration = Calibration.from_pretrained(out)
    for words in (
        f"density {calibration.density:.3f}, attention error {calibration.error:.2%}",
        "5x8x8",
        str(out / FILE),
        f'sparsediff.enable(pipe, "sparse_vdit", calibration="{out}")',
        "pipe(prompt, num_inference_steps=2, height=128, width=128, num_frames=17)",
        f"sparsediff generate --model random-wan --calibration {out} --steps 2 --height 128",
    ):
        assert words in said.out
    assert "calibrate sparse_vdit: 100%" in said.err, "a progress bar"
    line = re.search(r"enable\(pipe, \"(\w+)\", calibration=\"(.*)\"\)", said.out)
    sparsediff.enable(random_wan_pipeline(), line[1], calibration=line[2])


def test_the_flags_are_those_of_the_call(folder):
    calibration = Calibration.from_pretrained(folder)
    assert calibration.method == "sparse_vdit"
    assert calibration.parameters["epsilon"] == 1.0
    assert calibration.provenance["prompts"] == 2
    assert calibration.provenance["seed"] == 3
    call = calibration.provenance["call"]
    assert call["num_inference_steps"] == 2
    assert call["guidance_scale"] == 1.0
    assert call["num_frames"] == 17


def test_prompts_from_a_file_count_beside_those_of_the_line(tmp_path):
    (tmp_path / "prompts.txt").write_text("a small red circle\n\n  two yellow stars  \n")
    command = ["calibrate", *FAST, *VDIT, "--prompt", "a ring", "--out", str(tmp_path / "out")]
    assert main([*command, "--prompts", str(tmp_path / "prompts.txt")]) == 0
    by_hand = sparsediff.calibrate(
        random_wan_pipeline(),
        "sparse_vdit",
        ["a ring", "a small red circle", "two yellow stars"],
        costs=(1.0, 0.0, 0.3, 0.3, 0.3),
        epsilon=1.0,
        progress=False,
        call={
            "num_inference_steps": 2,
            "guidance_scale": 1.0,
            "height": 128,
            "width": 128,
            "num_frames": 17,
        },
    )
    made = Calibration.from_pretrained(tmp_path / "out")
    assert made.tensors["errors"].equal(by_hand.tensors["errors"])
    assert (made.density, made.error) == (by_hand.density, by_hand.error)


def test_ctrl_c_and_the_same_command_again(tmp_path, capsys, monkeypatch, folder):
    command = ["calibrate", *FAST, *VDIT, "--seed", "3", "--frames", "17", "--out", str(tmp_path)]
    command += ["--prompt", "a small red circle", "--prompt", "two yellow stars"]
    ran, real = [], type(random_wan_pipeline()).__call__

    def interrupted(self, *args, **kwargs):
        ran.append(kwargs["prompt"])
        if len(ran) == 2:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr("diffusers.WanPipeline.__call__", interrupted)
    assert main(command) == 130
    error = capsys.readouterr().err
    assert f"stopped: 1 of 4 generations are kept in {tmp_path}; the same again goes on" in error
    assert [p.name for p in tmp_path.iterdir()] == [PARTIAL]
    assert main(command) == 0
    assert ran[2:] == ["two yellow stars", "a small red circle", "two yellow stars"]
    error = capsys.readouterr().err
    assert "25%" in error, "the bar starts where it was"
    assert f"resuming: {tmp_path / PARTIAL} ends after generation 1" in error
    resumed, whole = (Calibration.from_pretrained(path) for path in (tmp_path, folder))
    assert all(x.equal(whole.tensors[name]) for name, x in resumed.tensors.items())
    assert (resumed.density, resumed.error) == (whole.density, whole.error)


def test_generate_with_a_calibration(folder, tmp_path, capsys):
    clip, report = tmp_path / "clip.mp4", tmp_path / "report.json"
    command = ["generate", *FAST, "--calibration", str(folder), "--out", str(clip)]
    assert main([*command, "--report", str(report)]) == 0
    assert "sparse_vdit(" in capsys.readouterr().out
    data = json.loads(report.read_text())
    assert "epsilon=1.0" in data["method"], "as it was measured"
    assert data["density"] < 1


def test_compare_with_a_calibration(folder, tmp_path, capsys):
    command = ["compare", *FAST, "--method", "sparse_vdit", "--calibration", str(folder)]
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert "PSNR" in capsys.readouterr().out
    assert json.loads((tmp_path / "comparison.json").read_text())["report"]["density"] < 1


def test_methods_say_which_need_a_calibration(capsys):
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    entries = {part.split()[0]: part for part in text.strip().split("\n\n")}
    for name, entry in entries.items():
        needs = name in ("paro_attention", "sparse_vdit")
        assert (f"needs a calibration: sparsediff calibrate --method {name}" in entry) == needs
        assert ("can use a calibration" in entry) == (name == "lite_attention")
        assert "--set calibration" not in entry


def test_mistakes_are_one_line_that_names_the_fix(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "sparsediff.eval.models.load_pipeline", lambda *a, **k: pytest.fail("loaded a model first")
    )
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "file").write_text("x")
    out = ["--out", str(tmp_path / "out")]
    calibrate, generate = ["calibrate", *FAST, *out], ["generate", *FAST]
    nowhere = str(tmp_path / "nowhere")
    for command, message in (
        (
            [*calibrate, "--method", "auto"],
            "methods that do: lite_attention, paro_attention, sparse",
        ),
        ([*calibrate, "--method", "paro"], "did you mean 'paro_attention'"),
        ([*calibrate, *VDIT, "--set", "windw=1"], "did you mean 'window'"),
        ([*calibrate, *VDIT, "--set", "calibration=x"], "has no parameter 'calibration'"),
        ([*calibrate, *VDIT, "--prompts", str(tmp_path / "empty.txt")], "write one a line"),
        ([*calibrate, *VDIT, "--prompts", nowhere], "nowhere"),
        ([*calibrate, *VDIT, "--steps", "0"], "--steps must be at least 1"),
        ([*calibrate[:-1], str(tmp_path / "file"), *VDIT], "cannot write"),
        (["calibrate", "--model", ".", *out, *VDIT], ". needs a --prompt"),
        ([*generate, "--method", "sparse_vdit"], "or --calibration FOLDER"),
        ([*generate, "--method", "adaspa", "--calibration", str(folder)], "takes no calibration"),
        (
            [*generate, "--method", "paro_attention", "--calibration", str(folder)],
            "this calibration is for sparse_vdit, not for paro_attention",
        ),
        ([*generate, "--calibration", nowhere], "is neither a folder nor a repository"),
        ([*generate, "--calibration", str(tmp_path)], f"holds no {FILE}; `sparsediff calibrate`"),
        (
            [*generate, "--method", "auto", "--calibration", str(folder)],
            "auto takes no calibration; leave it out, or take the method it was measured for",
        ),
        (
            [*generate, "--set", "epsilon=0.05", "--calibration", str(folder)],
            "epsilon=0.05 contradicts this sparse_vdit calibration, measured with epsilon=1.0",
        ),
        (
            [*generate, *VDIT[:2], "--set", "window=0.5", "--calibration", str(folder)],
            "window=0.5 contradicts this sparse_vdit calibration, measured with window=0.25",
        ),
    ):
        assert main(command) == 2, command
        error = capsys.readouterr().err.strip()
        assert message in error
        assert len(error.splitlines()) == 1
    for missing in (["--method", "sparse_vdit"], out):
        with pytest.raises(SystemExit):
            main(["calibrate", *missing])
        assert "the following arguments are required" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("false", False),
        ("True", True),
        ("TRUE", True),
        (" none", None),
        ("0.5", 0.5),
        ("(1, 2)", (1, 2)),
        ("falsely", "falsely"),
    ],
)
def test_set_reads_constants_in_any_case(text, value):
    assert parse_settings([f"head-adaptive={text}"], "--set") == {"head_adaptive": value}


def test_another_size_is_one_line_too(folder, tmp_path, capsys):
    command = ["generate", *FAST, "--height", "144", "--calibration", str(folder)]
    assert main([*command, "--out", str(tmp_path / "clip.mp4")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "measured on 5x8x8 latent tokens and this run has 5x9x8" in error
    assert "calibrate at this size" in error
