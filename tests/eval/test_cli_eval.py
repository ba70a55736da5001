"""`sparsediff eval` as people meet it, and what its parts decide."""

import dataclasses
import json
import math
import sys

import pytest

from sparsediff.eval.cli import main
from sparsediff.eval.gate import gate
from sparsediff.eval.limits import Limit, directions
from sparsediff.eval.markdown import to_markdown
from sparsediff.eval.merge import merge
from sparsediff.eval.metric_names import METRICS
from sparsediff.eval.results import Check, load_results, save_arm
from sparsediff.eval.vbench import DIMENSIONS, read_scores

AUTO, LITE = "auto-density=0.3", "lite_attention-threshold=-1"


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr("sparsediff.eval.cli_flags.quiet_libraries", lambda: None)


@pytest.fixture
def sound(results_folder):
    """The made-up folder without its planted failure."""
    for arm in load_results(results_folder).arms:
        checks = tuple(check for check in arm.checks if check.passed)
        save_arm(results_folder, dataclasses.replace(arm, checks=checks))
    return results_folder


# -- the smoke suite, end to end ------------------------------------------------------------------------------------


def test_smoke_on_the_bundled_model(tmp_path, capsys):
    command = ["eval", "run", "--suite", "smoke", "--limit", "1", "--steps", "2", "--device", "cpu"]
    command += ["--arm", "auto:density=0.4,block=64,dense_steps=1", "--frames", "5"]
    command += ["--metrics", "psnr", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    said = capsys.readouterr()
    for word in (
        "auto density=0.4, block=64",
        "PSNR, dB",
        "report.html",
        "report.md",
    ):
        assert word in said.out
    assert "clips: 100%" in said.err
    results = load_results(tmp_path / "out")
    assert (results.dense.suite, results.dense.suite_version, results.dense.model) == (
        "smoke",
        "1",
        "tiny-wan",
    )
    assert results.dense.call["num_frames"] == 5
    assert results.dense.call["num_inference_steps"] == 2
    for arm in results.others:
        assert arm.clips[0].metrics["psnr"] > 10
    page = (tmp_path / "out/report.html").read_text()
    assert "auto density=0.4" in page
    assert "tiny-wan" in (tmp_path / "out/report.md").read_text()
    # The same again goes on where it was, which is the end.
    assert main(command) == 0
    assert load_results(tmp_path / "out") == results
    assert main([*command, "--steps", "4"]) == 2
    assert "num_inference_steps (was 2, is 4)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--suite", "smok", "--out", "o"], "unknown suite 'smok'; known: smoke"),
        (["run", "--suite", "penguin", "--out", "o"], "--prompts FILE"),
        (["run", "--prompt", "x", "--suite", "smoke", "--out", "o"], "not both"),
        (["run", "--methods", "atuo", "--out", "o"], "did you mean 'auto'"),
        (["run", "--arm", "auto:densty=1", "--out", "o"], "did you mean 'density'"),
        (["run", "--model", "tiny-wam", "--out", "o"], "unknown model"),
        (["run", "--steps", "0", "--out", "o"], "--steps must be at least 1"),
        (["run", "--limit", "0", "--out", "o"], "--limit must be at least 1"),
        (["run", "--repeats", "0", "--out", "o"], "repeats must be at least 1"),
        (["run", "--seeds", "a", "--out", "o"], "whole numbers are needed"),
        (["report", "nowhere"], "holds no results"),
        (["gate", "nowhere", "--min-psnr", "3"], "holds no results"),
        (["compare", "a.mp4", "b.mp4"], "there is no file a.mp4"),
        (["merge", "nowhere", "--out", "o"], "at least two folders"),
    ],
)
def test_mistakes_are_one_line_that_names_the_fix(
    arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["eval", *arguments])
    except SystemExit as left:
        status = left.code
    assert status == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


# -- two files ------------------------------------------------------------------------------------------------------


def test_any_two_videos_can_be_compared(results_folder, tmp_path, capsys):
    videos = [str(results_folder / f"clips/{arm}/0.mp4") for arm in (AUTO, "dense")]
    assert main(["eval", "compare", *videos, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "9 frames of 64 x 64" in out
    assert "LPIPS was not measured" in out
    data = json.loads((tmp_path / "comparison.json").read_text())
    assert 20 < data["metrics"]["psnr"] < 40
    assert len(data["frames"]["ssim"]) == 9
    assert (tmp_path / "side_by_side.mp4").stat().st_size > 1000
    assert main(["eval", "compare", videos[0], videos[0], "--metrics", "psnr"]) == 0
    assert "inf dB" in capsys.readouterr().out


def test_a_file_that_is_no_video_is_refused(tmp_path, capsys):
    (tmp_path / "a.mp4").write_text("no video")
    assert main(["eval", "compare", *[str(tmp_path / "a.mp4")] * 2]) == 2
    error = capsys.readouterr().err
    assert "cannot read a video" in error
    assert "such as an .mp4" in error


# -- the gate -------------------------------------------------------------------------------------------------------


def limit(figure, bound):
    return Limit(figure=figure, bound=bound, is_minimum=directions()[figure][0])


def test_the_gate_passes_and_fails_with_the_reason(sound, capsys):
    passing = [
        "--min-psnr",
        "25",
        "--min-ssim",
        "0.9",
        "--min-speedup",
        "1.2",
        "--max-density",
        "0.8",
    ]
    assert main(["eval", "gate", str(sound), *passing]) == 0
    assert "passed  4 limits" in capsys.readouterr().out
    assert main(["eval", "gate", str(sound), "--min-psnr", "28"]) == 1
    out = capsys.readouterr().out
    assert (
        "FAILED  lite_attention threshold=-1: psnr is 26, at least 28 was asked for (n = 2 prompts)"
        in out
    )
    assert "auto" not in out
    assert main(["eval", "gate", str(sound), "--min-psnr", "28", "--arm", AUTO]) == 0


def test_the_random_floor_is_not_held_to_limits(sound):
    assert gate(load_results(sound), [limit("psnr", 20)]) == []
    assert gate(load_results(sound), [limit("psnr", 20)], arms=["random-density=0.3"]) != []


def test_what_was_not_measured_does_not_pass(sound):
    problems = gate(load_results(sound), [limit("lpips", 0.1)])
    assert len(problems) == 2
    assert "lpips was not measured" in problems[0]


def test_confident_gates_look_at_the_worse_end(sound):
    results = load_results(sound)
    # 29 and 30 dB: the mean passes 29.5, the interval's low end does not.
    assert gate(results, [limit("psnr", 29.5)], arms=[AUTO]) == []
    (problem,) = gate(results, [limit("psnr", 29.5)], arms=[AUTO], confident=True)
    assert "interval's end is 29" in problem


def test_a_failed_check_fails_the_gate(sound, capsys):
    results = load_results(sound)
    check = Check(name="same start", passed=False, detail="another seed")
    save_arm(sound, dataclasses.replace(results.arm(AUTO), checks=(check,)))
    assert main(["eval", "gate", str(sound), "--min-psnr", "1"]) == 1
    assert "self-check 'same start' failed: another seed" in capsys.readouterr().out
    assert main(["eval", "gate", str(sound), "--min-psnr", "1", "--ignore-checks"]) == 0


def test_a_gate_without_limits_or_arms_is_refused(sound):
    results = load_results(sound)
    with pytest.raises(ValueError, match=r"a gate needs a limit: .*--min-psnr.*--max-lpips"):
        gate(results, [])
    with pytest.raises(ValueError, match="no arm 'x' with clips"):
        gate(results, [limit("psnr", 1)], arms=["x"])
    only = dataclasses.replace(results, arms=(results.dense,))
    with pytest.raises(ValueError, match="hold no method"):
        gate(only, [limit("psnr", 1)])


def test_an_unfinished_run_does_not_pass(sound, capsys):
    arm = load_results(sound).arm(AUTO)
    save_arm(sound, dataclasses.replace(arm, checks=()))
    assert main(["eval", "gate", str(sound), "--min-psnr", "1", "--arm", AUTO]) == 1
    assert "its self-checks were never made" in capsys.readouterr().out
    assert (
        main(["eval", "gate", str(sound), "--min-psnr", "1", "--arm", AUTO, "--ignore-checks"]) == 0
    )
    save_arm(sound, dataclasses.replace(arm, clips=arm.clips[:1]))
    assert gate(load_results(sound), [limit("psnr", 1)], arms=[LITE]) == []
    (problem,) = gate(load_results(sound), [limit("psnr", 1)], arms=[AUTO], heed_checks=False)
    assert "the run is unfinished, 1 of 2 clips are missing" in problem


def test_a_file_in_the_place_of_the_folder(sound, capsys):
    assert main(["eval", "gate", str(sound / f"arms/{AUTO}.json"), "--min-psnr", "1"]) == 2
    assert "is a file; give the folder" in capsys.readouterr().err


# -- merging --------------------------------------------------------------------------------------------------------


def shard(folder, *, keep_arms=None, keep=None, only=None):
    """A folder with some of the arms, or some of the clips."""
    for arm in load_results(only).arms:
        if keep_arms is None or arm.arm in keep_arms:
            clips = tuple(c for c in arm.clips if keep is None or c.index in keep)
            clips = tuple(dataclasses.replace(c, index=i) for i, c in enumerate(clips))
            save_arm(folder, dataclasses.replace(arm, clips=clips, repeat=None))
    for path in only.glob("clips/*/*.mp4"):
        target = folder / path.relative_to(only)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return folder


def test_arms_of_two_folders_are_put_together(results_folder, tmp_path, capsys):
    one = shard(tmp_path / "one", keep_arms={"dense", AUTO}, only=results_folder)
    two = shard(tmp_path / "two", keep_arms={"dense", LITE}, only=results_folder)
    assert main(["eval", "merge", str(one), str(two), "--out", str(tmp_path / "both")]) == 0
    both = load_results(tmp_path / "both")
    assert [a.arm for a in both.arms] == ["dense", AUTO, LITE]
    assert all(both.video_path(c) for a in both.arms for c in a.clips)
    assert (tmp_path / "both/report.html").exists()
    with pytest.raises(ValueError, match="holds results already"):
        merge([one, two], tmp_path / "both")


def test_shards_of_prompts_are_put_together(results_folder, tmp_path):
    whole = load_results(results_folder)
    one = shard(tmp_path / "one", keep={0}, only=results_folder)
    two = shard(tmp_path / "two", keep={1}, only=results_folder)
    both = merge([one, two], tmp_path / "both")
    for arm in both.arms:
        assert {c.prompt for c in arm.clips} == {c.prompt for c in whole.dense.clips}
        assert sorted(c.index for c in arm.clips) == [0, 1]
        by_prompt = {c.prompt: c.metrics for c in whole.arm(arm.arm).clips}
        assert all(c.metrics == by_prompt[c.prompt] for c in arm.clips)
    indices = [{c.key: c.index for c in arm.clips} for arm in both.arms]
    assert all(i == indices[0] for i in indices)


def test_what_does_not_belong_together_is_not_merged(results_folder, tmp_path):
    other = shard(tmp_path / "other", only=results_folder)
    arm = load_results(other).dense
    save_arm(
        other,
        dataclasses.replace(arm, clips=(dataclasses.replace(arm.clips[0], frames_sha256="1"),)),
    )
    with pytest.raises(ValueError, match="two different clips of"):
        merge([results_folder, other], tmp_path / "out")
    for a in load_results(other).arms:
        save_arm(other, dataclasses.replace(a, call={"height": 1}))
    with pytest.raises(ValueError, match=r"differ in .*height"):
        merge([results_folder, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- words ----------------------------------------------------------------------------------------------------------


def test_markdown_has_intervals_and_caveats(results_folder, capsys):
    assert main(["eval", "report", str(results_folder), "--markdown"]) == 0
    text = capsys.readouterr().out
    assert "| auto density=0.3 | 0.475 | 1.90x (1.90 to 1.90) |" in text
    assert "29.50 (29.00 to 30.00)" in text
    assert "2 prompts: too few to rank methods" in text
    assert "self-check 'timing'" in text
    assert "LPIPS was not measured" in text
    assert "| lite\\_attention threshold=-1 |" in text


def test_markdown_is_not_what_people_wrote_into_it(results_folder):
    for arm in load_results(results_folder).arms:
        save_arm(results_folder, dataclasses.replace(arm, model="<script>|x|", notes=("# a\n- b",)))
    text = to_markdown(load_results(results_folder))
    assert "<script>" not in text
    assert "\n# a" not in text


def test_identical_clips_are_called_so(results_folder):
    results = load_results(results_folder)
    arm = results.arm(AUTO)
    for clip in arm.clips:
        clip.metrics["psnr"] = math.inf
    assert "| identical |" in to_markdown(results)


# -- VBench -----------------------------------------------------------------------------------------------------------


def test_vbench_without_its_package_says_what_to_do(results_folder, capsys):
    assert main(["eval", "vbench", str(results_folder)]) == 2
    assert "vbench-env/bin/pip install vbench" in capsys.readouterr().err
    assert main(["eval", "vbench", str(results_folder), "--python", "/nowhere/python"]) == 2
    assert "cannot run /nowhere/python" in capsys.readouterr().err
    assert main(["eval", "vbench", str(results_folder), "--dimensions", "beauty"]) == 2
    assert "unknown dimension beauty; known: subject_consistency" in capsys.readouterr().err


def test_vbench_results_are_read_in_its_own_form():
    text = json.dumps({"dynamic_degree": [0.5, [{"video_path": "/x/0.mp4", "video_results": True}, {"video_path": "/x/1.mp4", "video_results": 0.25}]]})  # fmt: skip
    assert read_scores(text, ["dynamic_degree"]) == {
        "0.mp4": {"vbench_dynamic_degree": 1.0},
        "1.mp4": {"vbench_dynamic_degree": 0.25},
    }
    with pytest.raises(ValueError, match="unknown form"):
        read_scores("{}", ["dynamic_degree"])
    assert all(f"vbench_{d}" in METRICS for d in DIMENSIONS)


def test_a_vbench_that_fails_is_quoted(results_folder, tmp_path, capsys, monkeypatch):
    """Any package of that name will do: this one cannot do what is asked."""
    (tmp_path / "vbench.py").write_text(
        "class VBench:\n    def __init__(self, *a): raise OSError('no weights here')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert main(["eval", "vbench", str(results_folder), "--python", sys.executable]) == 2
    assert "VBench failed on dense: OSError: no weights here" in capsys.readouterr().err
