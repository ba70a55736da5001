"""What the report says, apart from how it looks; `test_report_browser.py` opens it."""

import dataclasses
import json
import re
import shlex

import pytest
import torch

from sparsediff.block_mask import pack_bits
from sparsediff.eval.arms import parse_arm
from sparsediff.eval.captured import Capture, CapturedCall
from sparsediff.eval.cli import build_parser
from sparsediff.eval.report import Blobs, json_for_script, write_report
from sparsediff.eval.report_masks import kept_of_rows, mass_to_bytes
from sparsediff.eval.results import Check, load_results, save_arm
from sparsediff.token_grid import TokenGrid

HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> {{data}} \u2028 \" ' \\ $& \\1"


def data_of(path):
    """The JSON that the page carries."""
    text = path.read_text(encoding="utf-8")
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1]
    )


def change(folder, arm, **fields):
    """Rewrite fields of an arm."""
    results = load_results(folder)
    save_arm(folder, dataclasses.replace(results.arm(arm), **fields))


def change_clips(folder, arm, **fields):
    clips = load_results(folder).arm(arm).clips
    change(folder, arm, clips=tuple(dataclasses.replace(clip, **fields) for clip in clips))


def captured(seed=0):
    keep = torch.rand(1, 2, 5, 5, generator=torch.Generator().manual_seed(seed)) > 0.5
    return CapturedCall(
        layer="transformer.blocks.0.attn1", step=3, num_steps=8, sigma=0.5, branch="cond",
        grid=TokenGrid.video(3, 4, 6, text=8), block_size=(16, 16), dense_reason=None, heads=(0, 1),
        windows=("HWF", (1, 2, 2)), head_windows=torch.tensor([[0, 1]], dtype=torch.uint8), bitmap=pack_bits(keep),
    )  # fmt: skip


def test_the_report_is_one_file_that_asks_for_nothing(results_folder):
    path = write_report(results_folder)
    assert path == results_folder / "report.html"
    text = path.read_text(encoding="utf-8")
    outside = re.sub(r'<script type="text/plain".*?</script>', "", text)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", outside)
    assert "{{" not in text.replace("}}", "")
    data = data_of(path)
    clips = [clip for arm in data["clips"].values() for clip in arm.values()]
    assert len(clips) == 8
    for clip in clips:
        assert f'id="{clip["video"]["inline"]}"' in text


def test_the_headline_says_how_fast_and_how_good(results_folder):
    data = data_of(write_report(results_folder))
    assert data["focus"] == "auto-density=0.3"
    assert data["headline"] == [
        "auto density=0.3 makes the denoiser 1.90 times as fast as dense attention, at 29.5 dB PSNR to the dense clips."
    ]
    assert "visible differences" in data["lede"]
    assert "Blocks drawn at random reach 14.5 dB at density 0.47" in data["lede"]
    tiles = {tile["label"]: tile for tile in data["tiles"]}
    assert (tiles["Denoiser"]["value"], tiles["Denoiser"]["unit"]) == (
        "1.90",
        "\N{MULTIPLICATION SIGN} dense",
    )
    assert tiles["PSNR to dense"]["note"] == "29.0 to 30.0 (2 prompts)"


def test_the_environment_says_everything_once(results_folder):
    change(results_folder, "dense", layout={"transformers": {"transformer": "WanTransformer3DModel"}, "layers": 6})  # fmt: skip
    results = load_results(results_folder)
    same = {**results.dense.configuration, "torch": "2.13.0"}
    for arm in results.arms:
        save_arm(results_folder, dataclasses.replace(arm, configuration=same))
    rows = data_of(write_report(results_folder))["environment"]
    assert ["layout", "transformers=WanTransformer3DModel, layers=6"] in rows
    assert ["call", "num_inference_steps=8, height=64, width=64"] in rows
    assert sum(name == "torch" for name, _ in rows) == 1


def test_time_is_taken_apart(results_folder):
    arm = data_of(write_report(results_folder))["arms"][1]
    seconds = arm["seconds"]
    whole = load_results(results_folder).arm("auto-density=0.3").clips[0].timings
    assert seconds["total"] == pytest.approx(whole.total.median)
    assert seconds["attention"] + seconds["mask"] == pytest.approx(whole.attention.median)
    assert seconds["mask"] == pytest.approx(whole.mask.median, rel=0.02)
    parts = seconds["attention"] + seconds["mask"] + seconds["denoiser"]
    assert parts == pytest.approx(whole.denoiser.median)
    assert arm["peakBytes"] == 500 << 20


@pytest.mark.parametrize(
    "text",
    [
        "auto",
        "auto:density=0.3,dense_steps=2",
        "lite_attention:threshold=-1,tile=(64,64)",
        "custom:windows=((1,8,8),'HWF')",
    ],
)
def test_what_is_to_be_typed_again_is_the_same_arm(make_results_folder, tmp_path, text):
    arm = parse_arm(text)
    folder = make_results_folder(tmp_path, arms=("dense", "auto-density=0.3"), videos=False)
    change(folder, "auto-density=0.3", label=arm.label)
    command = shlex.split(data_of(write_report(folder))["reproduce"]["command"])
    assert parse_arm(command[command.index("--arm") + 1]) == arm
    assert command[:6] == ["sparsediff", "eval", "run", "--model", "tiny-wan", "--prompt"]
    assert command[command.index("--steps") + 1] == "8"


def test_the_command_is_one_that_the_command_line_takes(make_results_folder, tmp_path):
    folder = make_results_folder(tmp_path, prompts=[f"prompt {i}" for i in range(5)], seeds=(0, 3), videos=False)  # fmt: skip
    words = data_of(write_report(folder))["reproduce"]["command"].splitlines()
    arguments = build_parser().parse_args(shlex.split(words[0])[1:])
    assert arguments.prompts.name == "prompts.txt"
    assert "5 prompts of this report" in words[1]
    assert (arguments.seeds, arguments.random, arguments.height) == ((0, 3), True, 64)
    for arm in load_results(folder).arms:
        save_arm(folder, dataclasses.replace(arm, suite="smoke"))
    again = data_of(write_report(folder))["reproduce"]
    arguments = build_parser().parse_args(shlex.split(again["command"])[1:])
    assert (arguments.suite, arguments.limit, arguments.prompts) == ("smoke", 5, None)
    assert "load_suite('smoke')" in again["python"]
    compile(again["python"], "again", "exec")


def test_a_slower_method_is_not_called_faster(make_results_folder, tmp_path):
    folder = make_results_folder(tmp_path, arms=("dense", "auto-density=0.3"), videos=False)
    dense = load_results(folder).dense.clips[0]
    slow = dataclasses.replace(
        dense.timings,
        denoiser=dataclasses.replace(dense.timings.denoiser, samples=(4.0,)),
    )
    change_clips(folder, "auto-density=0.3", timings=slow)
    assert data_of(write_report(folder))["headline"] == [
        "auto density=0.3 is not reliably faster than dense attention here: 0.51 times its speed, at 29.5 dB PSNR to the "
        "dense clips."
    ]


def test_failed_checks_come_first_and_are_said_at_the_top(results_folder):
    data = data_of(write_report(results_folder))
    assert [check["passed"] for check in data["checks"]] == [False, True, True]
    assert data["checks"][0]["arms"] == ["random density=0.3"]
    assert data["badges"][0]["text"].startswith("1 self-check failed")
    change(results_folder, "random-density=0.3", checks=(Check(name="x", passed=True, detail="y"),))
    assert data_of(write_report(results_folder))["badges"][0]["kind"] == "good"


def test_text_from_outside_is_never_markup(make_results_folder, tmp_path):
    folder = make_results_folder(tmp_path, prompts=(HOSTILE,), arms=("dense", "auto-density=0.3"))
    change(folder, "auto-density=0.3", label=HOSTILE, notes=(HOSTILE,), model="tiny-wan")
    path = write_report(folder)
    text = path.read_text(encoding="utf-8")
    assert "alert(1)</script>" not in text
    assert "<img" not in text
    data = data_of(path)
    assert data["prompts"][0]["prompt"] == HOSTILE, "and nothing is lost"
    assert data["arms"][1]["label"] == HOSTILE
    assert HOSTILE in data["caveats"]


@pytest.mark.parametrize("text", [HOSTILE, "<!--<script>", "]]>", "a\u2029b"])
def test_json_inside_a_script_element(text):
    inside = json_for_script({"text": text})
    assert not re.search("[<>&\u2028\u2029]", inside)
    assert json.loads(inside) == {"text": text}


def test_identical_and_missing_numbers(make_results_folder, tmp_path):
    folder = make_results_folder(tmp_path, arms=("dense", "auto-density=0.3"), videos=False)
    change_clips(
        folder,
        "auto-density=0.3",
        metrics={"psnr": float("inf")},
        frame_curves={"psnr": (float("inf"), float("nan"))},
    )
    data = data_of(write_report(folder))
    assert data["arms"][1]["identical"] == 2
    assert "at identical clips" in data["headline"][0]
    tile = next(tile for tile in data["tiles"] if tile["label"] == "PSNR to dense")
    assert tile["value"] == "identical"
    clip = data["clips"]["auto-density=0.3"]["0"]
    assert clip["curves"]["psnr"] == ["inf", "nan"]
    assert clip["video"] is None
    assert any("counts as 100 dB" in text for text in data["caveats"])


def test_a_clip_without_a_number_does_not_hide_the_others(make_results_folder, tmp_path):
    folder = make_results_folder(tmp_path, arms=("dense", "auto-density=0.3"), videos=False)
    arm = load_results(folder).arm("auto-density=0.3")
    broken = dataclasses.replace(arm.clips[0], metrics={"psnr": float("nan"), "ssim": float("nan")})
    other = dataclasses.replace(arm.clips[1], metrics={"psnr": 30.0, "ssim": float("nan")})
    change(folder, "auto-density=0.3", clips=(broken, other))
    data = data_of(write_report(folder))
    assert data["arms"][1]["metrics"] == {"psnr": [30.0, None, None]}


def test_arms_alone(make_results_folder, tmp_path):
    dense = make_results_folder(tmp_path / "dense", arms=("dense",), videos=False)
    data = data_of(write_report(dense))
    assert data["headline"][0].startswith("Only dense clips so far")
    assert data["tiles"] == []
    sparse = make_results_folder(tmp_path / "sparse", arms=("auto-density=0.3",), videos=False)
    data = data_of(write_report(sparse))
    assert data["headline"][0].startswith("There is no dense arm")
    assert data["arms"][0]["denoiser"] is None
    change(sparse, "auto-density=0.3", clips=())
    with pytest.raises(ValueError, match="without a single clip"):
        write_report(sparse)
    with pytest.raises(FileNotFoundError, match="holds no results"):
        write_report(tmp_path / "nowhere")


def test_the_size_is_bounded(results_folder, tmp_path):
    sizes = sum(p.stat().st_size for p in results_folder.glob("clips/*/*.mp4"))
    limit = sizes * 2 // 3
    path = write_report(results_folder, out=tmp_path / "elsewhere" / "a.html", max_bytes=limit)
    data = data_of(path)
    videos = [clip["video"] for arm in data["clips"].values() for clip in arm.values()]
    linked = [v["href"] for v in videos if "href" in v]
    assert 0 < len(linked) < 8
    blobs = re.findall(r'<script type="text/plain".*?>(.*?)</script>', path.read_text())
    assert sum(map(len, blobs)) <= limit
    for href in linked:
        from urllib.parse import unquote

        assert (path.parent / unquote(href)).resolve().is_file()
    assert any(f"{len(linked)} of 8 clips did not fit" in text for text in data["caveats"])
    first = {arm: clips["0"]["video"] for arm, clips in data["clips"].items()}
    assert all("inline" in video for video in first.values()), "first prompts come first"


def test_lost_clips_are_said(results_folder):
    (results_folder / "clips" / "dense" / "1.mp4").unlink()
    data = data_of(write_report(results_folder))
    assert data["clips"]["dense"]["1"]["video"] is None
    assert any("1 of 8 clips are no longer" in text for text in data["caveats"])
    assert any("No masks were captured" in text for text in data["caveats"])
    assert "--captures" not in data["reproduce"]["command"]


def test_masks_reach_the_page(results_folder):
    call = captured()
    again = dataclasses.replace(call, step=4)
    other = dataclasses.replace(call, step=5, grid=TokenGrid.video(1, 4, 6))
    capture = Capture(calls=[call, again, other], complete=False)
    capture.save(results_folder / "captures" / "auto-density=0.3.safetensors")
    path = write_report(results_folder)
    data, text = data_of(path), path.read_text()
    (mask,) = data["masks"]
    assert mask["arm"] == "auto-density=0.3"
    assert (mask["grid"], mask["start"], mask["outside"]) == ([3, 4, 6], 0, "8 text")
    assert len(mask["stills"]) == 3
    assert [c["step"] for c in mask["calls"]] == [3, 4]
    assert mask["calls"][0]["bits"] == mask["calls"][1]["bits"], "equal masks travel once"
    assert mask["calls"][0]["windowNames"] == ["axes HWF, slowest first", "windows of 1 x 2 x 2"]
    assert "memory was full" in mask["note"]
    assert "--captures" in data["reproduce"]["command"]
    assert not any("No masks were captured" in text for text in data["caveats"])
    assert any("2 of 3 captured attention calls" in note for note in data["caveats"])
    assert f'id="{mask["calls"][0]["names"][1]}"' in text


def test_masks_that_do_not_fit_are_left_out_and_said(results_folder):
    Capture(calls=[captured()]).save(results_folder / "captures" / "auto-density=0.3.safetensors")
    data = data_of(write_report(results_folder, max_bytes=40))
    assert data["masks"] == []
    assert any("0 of 1 captured attention calls" in note for note in data["caveats"])


def test_mass_keeps_its_magnitude_in_a_byte():
    mass = torch.tensor([0.0, 1.0, 0.5, 0.013, 2.0**-20])
    packed = mass_to_bytes(mass)
    back = torch.where(packed > 0, 2.0 ** ((packed.float() - 255) / 8), 0.0)
    assert packed[0] == 0
    assert torch.allclose(back, mass, rtol=2 ** (1 / 16) - 1 + 1e-6)


def test_the_share_of_attention_that_a_row_reads():
    call = captured()
    mass = torch.rand(1, 2, 5, 5, generator=torch.Generator().manual_seed(1)).half()
    low, high = kept_of_rows(dataclasses.replace(call, mass=mass)).int().unbind(-1)
    kept = torch.where(call.keep(), mass.float(), 0.0).sum(-1) / mass.float().sum(-1)
    assert torch.allclose((low + 256 * high) / 65535, kept, atol=1e-5)


def test_blobs_count_what_base64_makes_of_them():
    blobs = Blobs(limit=8)
    assert blobs.fits(6)
    assert not blobs.fits(7)
    name = blobs.add(b"abcd")
    assert blobs.texts[name] == "YWJjZA=="
    assert not blobs.fits(1)
