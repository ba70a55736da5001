"""The artefact: files, what it refuses, how methods take it."""

import dataclasses
import json
import math

import pytest
import torch

import sparsediff
from sparsediff import Calibration, LiteAttention, PAROAttention, SparseVDiT, TokenGrid
from sparsediff.api import with_calibration
from sparsediff.calibration import FILE, SCHEMA, ModelLayout, nearest_seen, step_bin
from sparsediff.testing import random_wan_pipeline

LAYOUT = ModelLayout(
    transformers={"transformer": "WanTransformer3DModel"},
    layers=("transformer.blocks.0.attn1", "transformer.blocks.1.attn1"),
    heads=2,
    head_dim=12,
)


PARO = {
    "method": "paro_attention",
    "tensors": {"orders": torch.zeros(2, 2), "masks": torch.zeros(1, 2, 2)},
}


def make(**changes):
    values = {
        "method": "lite_attention",
        "parameters": LiteAttention(must_keep=((0, 10), (20, 30))).parameters(),
        "model": LAYOUT,
        "grid": "5x8x8",
        "tensors": {
            "thresholds": torch.tensor([[-3.1, float("-inf")], [1e-42, math.pi]]),
            "bits": torch.arange(256, dtype=torch.uint8).view(2, 128).mT,
            "sums": torch.rand(3, dtype=torch.float64),
        },
        "density": 0.1 + 0.2,
        "error": 1 / 3,
        "provenance": {"prompts": 2, "call": {"num_frames": 17}},
    }
    return Calibration(**{**values, **changes})


def assert_same(one, other):
    for name in ("method", "parameters", "model", "grid", "density", "error", "provenance"):
        assert getattr(one, name) == getattr(other, name)
    assert one.tensors.keys() == other.tensors.keys()
    for name, x in one.tensors.items():
        y = other.tensors[name]
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert x.contiguous().numpy().tobytes() == y.contiguous().numpy().tobytes()


def test_a_round_trip_is_bit_exact(tmp_path):
    made = make()
    made.save_pretrained(tmp_path / "a" / "b")
    back = Calibration.from_pretrained(tmp_path / "a" / "b")
    assert_same(made, back)
    assert_same(made, Calibration.from_pretrained(str(tmp_path / "a" / "b" / FILE)))
    back.save_pretrained(tmp_path / "c")
    files = [tmp_path / folder / FILE for folder in ("a/b", "c")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "lite_attention for WanTransformer3DModel, 5x8x8: density 0.300" in str(back)


def test_what_was_never_measured_survives_too(tmp_path):
    make(grid=None, density=math.nan, error=math.nan).save_pretrained(tmp_path)
    back = Calibration.from_pretrained(tmp_path)
    assert back.grid is None
    assert math.isnan(back.density)


def header(tmp_path, change):
    """A saved calibration whose JSON header went through `change`."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    make().save_pretrained(tmp_path)
    with safe_open(tmp_path / FILE, "pt") as file:
        values = json.loads(file.metadata()["sparsediff"])
    change(values)
    save_file({"x": torch.zeros(1)}, tmp_path / FILE, {"sparsediff": json.dumps(values)})
    return tmp_path


@pytest.mark.parametrize("schema", [SCHEMA + 1, 0, "1", None])
def test_another_schema_is_refused(tmp_path, schema):
    folder = header(tmp_path, lambda h: h.update(schema=schema))
    with pytest.raises(ValueError, match=f"schema {schema}, this version of sparsediff reads 1"):
        Calibration.from_pretrained(folder)


def test_what_is_no_calibration_is_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(OSError, match=f"holds no {FILE}; `sparsediff calibrate` writes one"):
        Calibration.from_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    (tmp_path / "garbage").write_bytes(b"\x00" * 100)
    (tmp_path / "empty").write_bytes(b"")
    for name in ("weights.safetensors", "garbage", "empty"):
        with pytest.raises(ValueError, match=f"{name} is no sparsediff calibration"):
            Calibration.from_pretrained(tmp_path / name)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.pop("model"),
        lambda h: h.pop("parameters"),
        lambda h: h.pop("grid"),
        lambda h: h.update(model=["x"]),
        lambda h: h["model"].pop("heads"),
        lambda h: h["model"].update(colour="red"),
        lambda h: h.update(colour="red"),
        lambda h: h.update(parameters=None),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, change):
    with pytest.raises(ValueError, match=r"is a damaged sparsediff calibration .*calibrate again"):
        Calibration.from_pretrained(header(tmp_path, change))


@pytest.mark.parametrize("text", ["{", "[1]", "null", "3"])
def test_a_header_that_is_none_is_refused(tmp_path, text):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / FILE, {"sparsediff": text})
    with pytest.raises(ValueError, match="is no sparsediff calibration"):
        Calibration.from_pretrained(tmp_path)


def test_what_is_nowhere_is_refused(tmp_path):
    for name in (tmp_path / "nowhere", "some/repository", "not a repository"):
        with pytest.raises(OSError, match="is neither a folder nor a repository with"):
            Calibration.from_pretrained(name)


def test_another_method_is_refused():
    with pytest.raises(ValueError, match="is for lite_attention, not for sparse_vdit"):
        SparseVDiT().calibrated(make())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("heads", 12, "heads: measured 2, here 12"),
        ("head_dim", 128, "head_dim: measured 12, here 128"),
        ("layers", LAYOUT.layers[:1], "layers: measured 2 layers, here 1 layers"),
        (
            "layers",
            (LAYOUT.layers[0], "transformer.blocks.7.attn1"),
            r"layers: measured transformer\.blocks\.1\.attn1, here transformer\.blocks\.7\.attn1\)",
        ),
        ("transformers", {"transformer": "Other"}, "transformers: measured .*here .*Other"),
    ],
)
def test_another_model_is_refused(field, value, message):
    make().check_model(LAYOUT)
    with pytest.raises(ValueError, match=message):
        make().check_model(dataclasses.replace(LAYOUT, **{field: value}))


def test_other_tokens_are_refused():
    make().check_grid(TokenGrid.video(5, 8, 8))
    make(grid=None).check_grid(TokenGrid.video(9, 9, 9))
    for grid in (TokenGrid.video(5, 8, 9), TokenGrid.video(5, 8, 8, text=3)):
        with pytest.raises(ValueError, match=r"measured on 5x8x8 latent tokens and this run has"):
            make().check_grid(grid)


def test_parameters_come_with_the_calibration():
    """Blocks measured with one block size mean nothing with another, so nobody has to repeat it."""
    measured = PAROAttention(block=128, density=0.3)
    calibration = make(**PARO, parameters=measured.parameters())
    assert PAROAttention().calibrated(calibration).parameters() == measured.parameters()
    assert PAROAttention(block=128).calibrated(calibration) == measured
    assert PAROAttention(int8=True).calibrated(calibration).int8, "int8 is for the run to choose"
    with pytest.raises(ValueError, match=r"density=0\.2 contradicts .* density=0\.3; leave"):
        PAROAttention(density=0.2).calibrated(calibration)
    lite = make()
    assert LiteAttention(must_skip=((0, 9),)).calibrated(lite).must_keep == ((0, 10), (20, 30))


def test_what_is_set_by_name_is_never_overruled():
    """Also where it equals the default, which the fields of a method cannot tell from what nobody set."""
    calibration = make(**PARO, parameters=PAROAttention(density=0.3).parameters())
    for given in ({}, {"density": 0.3}):
        method = with_calibration(PAROAttention(**given), calibration, given)
        assert method.density == 0.3
    with pytest.raises(ValueError, match=r"density=0\.5 contradicts .* density=0\.3; leave"):
        with_calibration(PAROAttention(density=0.5), calibration, {"density"})
    eight_bits = make(**PARO, parameters=PAROAttention(int8=True).parameters())
    assert not PAROAttention(int8=False).calibrated(eight_bits, given={"int8"}).int8
    assert PAROAttention().calibrated(eight_bits, given=()).int8


def test_enable_passes_on_what_is_set_by_name():
    pipe = random_wan_pipeline()
    calibration = make(**PARO, parameters=PAROAttention(density=0.3).parameters())
    with pytest.raises(ValueError, match=r"density=0\.5 contradicts"):
        sparsediff.enable(pipe, "paro_attention", density=0.5, calibration=calibration)


def test_what_measurements_replace_cannot_be_set_beside_them():
    class Replaced(LiteAttention):
        superseded = frozenset({"threshold"})

    assert Replaced().calibrated(make()).threshold == -10
    for method, given in (
        (Replaced(threshold=-5.0), None),
        (Replaced(threshold=-5.0), {"threshold"}),
        (Replaced(), {"threshold"}),
    ):
        with pytest.raises(ValueError, match=r"threshold=.* brings its own .*leave threshold out"):
            method.calibrated(make(), given)
    measured = make(parameters=Replaced(threshold=-5.0).parameters())
    assert Replaced(threshold=-5.0).calibrated(measured).threshold == -5, "as it was measured"


def test_an_incomplete_calibration_is_refused():
    class Complete(LiteAttention):
        tensor_names = ("thresholds", "bits")

    Complete().calibrated(make())
    with pytest.raises(ValueError, match=r"lite_attention calibration lacks thresholds, bits: it"):
        Complete().calibrated(make(tensors={}))


def test_yes_or_no_is_no_number():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Flagged(LiteAttention):
        flag: object = False
        count: object = 1

        def __post_init__(self):
            self._require("flag", bool)
            self._require("count", int)

    assert Flagged(flag=True).flag
    for wrong in (0, 1, None, "false"):
        with pytest.raises(ValueError, match=f"flag must be True or False, got {wrong!r}"):
            Flagged(flag=wrong)
    with pytest.raises(ValueError, match="count must be of type int, got True"):
        Flagged(count=True)


def test_bins_share_a_run_evenly():
    assert [step_bin(s, 8, 4) for s in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [step_bin(s, 2, 4) for s in range(2)] == [0, 2]
    assert step_bin(7, 4, 4) == 3
    with pytest.raises(ValueError, match=r"handle.begin_generation\(num_steps\)"):
        step_bin(0, None, 4)


def test_a_bin_that_was_not_met_takes_the_nearest():
    seen = {"0 0": 1, "2 0": 1, "3 1": 1}
    assert nearest_seen(seen, 4, {"a": 0, "b": 1}) == {
        **{"0 0": "0 0", "1 0": "0 0", "2 0": "2 0", "3 0": "2 0"},
        **{f"{b} 1": "3 1" for b in range(4)},
    }


class StubbedApi:
    """The three calls of the hub's client that are made, with their signatures."""

    def __init__(self, token=None):
        StubbedApi.calls = [("token", token)]

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        from types import SimpleNamespace

        self.calls.append(("create", repo_id, private, exist_ok))
        return SimpleNamespace(repo_id=f"somebody/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message, revision=None):
        self.calls.append(("upload", repo_id, commit_message, revision))
        self.calls.append(Calibration.from_pretrained(folder_path))
        return f"https://huggingface.co/{repo_id}/commit/1"


def test_push_to_hub_uploads_the_artefact(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", StubbedApi)
    made = make()
    url = made.push_to_hub("mine", private=True, token="t", revision="branch")
    assert url == "https://huggingface.co/somebody/mine/commit/1"
    *calls, uploaded = StubbedApi.calls
    assert calls == [
        ("token", "t"),
        ("create", "mine", True, True),
        ("upload", "somebody/mine", "sparsediff calibration for lite_attention", "branch"),
    ]
    assert_same(made, uploaded)
    made.save_pretrained(tmp_path / "folder", push_to_hub=True)
    assert StubbedApi.calls[1] == ("create", "folder", None, True)


def test_push_to_hub_without_a_network_says_so():
    with pytest.raises(OSError, match=r"cannot reach the Hugging Face hub.*save_pretrained"):
        make().push_to_hub("somebody/mine")
