"""Results survive the disk, and what does not belong together is refused by name."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsediff.eval.metric_names import METRICS
from sparsediff.eval.results import (
    SCHEMA_VERSION,
    ArmResult,
    ClipResult,
    Results,
    Spread,
    Timings,
    load_arm,
    load_results,
    replace_clip,
    save_arm,
)

NUMBERS = st.floats(allow_nan=False)


def arm(**changes):
    given = {
        "arm": "auto",
        "label": "auto",
        "role": "sparse",
        "suite": "s",
        "suite_version": "1",
        "model": "m",
        "call": {},
        "fps": 8,
    }
    return ArmResult(**{**given, **changes})


def clip(prompt="p", seed=0, **changes):
    times = Timings(total=Spread(samples=(2.0,)), denoiser=Spread(samples=(1.0,)))
    return ClipResult(index=0, prompt=prompt, seed=seed, timings=times, **changes)


@given(st.dictionaries(st.sampled_from(list(METRICS)), NUMBERS), st.text(), st.lists(NUMBERS))
def test_what_is_written_is_read_again(metrics, prompt, curve):
    one = clip(prompt, metrics=metrics, frame_curves={"psnr": tuple(curve)})
    before = arm(clips=(one,), parameters={"tile": [64, 64], "x": None})
    assert ArmResult.from_json(before.to_json()) == before


def test_infinite_and_undefined_numbers_stay_what_they_are():
    text = arm(clips=(clip(metrics={"psnr": math.inf, "ssim": math.nan}),)).to_json()
    json.loads(text, parse_constant=lambda x: pytest.fail(f"{x} is no JSON"))
    found = ArmResult.from_json(text).clips[0].metrics
    assert found["psnr"] == math.inf
    assert math.isnan(found["ssim"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema_version=SCHEMA_VERSION + 1), f"this sparsediff reads {SCHEMA_VERSION}"),
        (lambda d: d.pop("model"), "lacks model"),
        (lambda d: d.update(colour="red"), "unknown fields: colour"),
        (lambda d: d.update(role="thin"), "role"),
        (lambda d: d.update(fps="fast"), "fps must be int"),
        (lambda d: d["clips"][0]["metrics"].update(psnr="good"), r"clips\[0\]: metrics.psnr must be float"),
        (lambda d: d["clips"][0]["timings"]["total"].update(samples=[]), "at least one sample"),
        (lambda d: d["clips"].append(d["clips"][0]), "two clips of one prompt and seed"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_with_the_field(change, message, tmp_path):
    path = save_arm(tmp_path, arm(clips=(clip(metrics={"psnr": 1.0}),)))
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as error:
        load_arm(path)
    assert "auto.json" in str(error.value)


def test_text_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "arms").mkdir()
    (tmp_path / "arms/a.json").write_text('{"schema_version": 1,')
    with pytest.raises(ValueError, match=r"a.json is no JSON \(line 1"):
        load_results(tmp_path)
    (tmp_path / "arms/a.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"a.json is no text: delete that file and run"):
        load_results(tmp_path)
    with pytest.raises(FileNotFoundError, match="sparsediff eval run"):
        load_results(tmp_path / "nothing")
    with pytest.raises(NotADirectoryError, match="give the folder"):
        load_results(tmp_path / "arms/a.json")


@pytest.mark.parametrize(
    "change",
    [
        {"suite": "other"},
        {"suite_version": "2"},
        {"model": "other"},
        {"revision": "main"},
        {"call": {"height": 3}},
        {"configuration": {"dtype": "bfloat16"}},
    ],
)
def test_arms_of_different_runs_are_not_compared(change, tmp_path):
    name = next(iter(change))
    word = next(iter(change[name])) if isinstance(change[name], dict) else name
    with pytest.raises(ValueError, match=f"they differ in {word}"):
        Results(tmp_path, (arm(arm="dense", role="dense"), arm(**change)))


def test_clips_are_paired_by_prompt_and_seed(tmp_path):
    dense = arm(arm="dense", role="dense", clips=(clip("a"), clip("b"), clip("b", 1)))
    sparse = arm(clips=(clip("b", 1), clip("c")))
    assert [(a.key, b.key) for a, b in Results(tmp_path, (dense, sparse)).pairs(sparse)] == [
        (("b", 1), ("b", 1))
    ]
    assert Results(tmp_path, (sparse,)).pairs(sparse) == []


def test_a_clip_made_again_replaces_itself():
    one = arm(clips=(clip("a"), clip("b")))
    again = replace_clip(one, dataclasses.replace(clip("a"), density=0.5))
    assert sorted((c.prompt, c.density) for c in again.clips) == [("a", 0.5), ("b", 1.0)]


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden"])
def test_an_arm_must_be_able_to_name_a_file(name):
    with pytest.raises(ValueError, match="names a file"):
        arm(arm=name)


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_a_spread_is_of_its_samples(samples):
    spread = Spread(samples=tuple(samples))
    assert spread.low <= spread.median <= spread.high
    assert sum(x < spread.median for x in samples) <= len(samples) / 2
    assert sum(x > spread.median for x in samples) <= len(samples) / 2


def test_the_made_up_folder_is_a_valid_one(results_folder):
    results = load_results(results_folder)
    assert results.dense.arm == "dense"
    assert len(results.others) == 3
    for one in results.arms:
        assert all(name in METRICS for c in one.clips for name in c.metrics)
        assert all(results.video_path(c) for c in one.clips)
        assert len(results.pairs(one)) == 2
