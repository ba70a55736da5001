"""`sparsediff.calibrate` on two experts, in half precision, and where text is in the sequence."""

import pytest
import torch

import sparsediff
from sparsediff import LiteAttention, PAROAttention, Schedule, SparseVDiT
from sparsediff.block_mask import unpack_bits
from sparsediff.pipelines import tiny
from sparsediff.testing import random_wan_pipeline

PROMPT = "a small red circle moves left"
CALL = {
    "height": 128,
    "width": 128,
    "num_frames": 17,
    "num_inference_steps": 4,
    "guidance_scale": 1.0,
    "max_sequence_length": 16,
}
METHODS = [
    PAROAttention(density=0.4, bins=2),
    SparseVDiT(costs=(1.0, 0.0, 0.3, 0.35, 0.4), density=0.4, bins=2),
    LiteAttention(tile=(64, 64), error=0.05, error_spread=0.02),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)


@pytest.fixture(autouse=True)
def always_sparse(monkeypatch):
    """On a CPU calls above break-even run dense."""
    monkeypatch.setattr("sparsediff.block_attention.CPU_BREAK_EVEN", 2.0)


def calibrate(pipe, method, **changes):
    return sparsediff.calibrate(pipe, method, [PROMPT], progress=False, call={**CALL, **changes})


def generate(pipe, **changes):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(PROMPT, output_type="latent", generator=generator, **{**CALL, **changes}).frames


@each_method
def test_each_expert_gets_what_was_measured_on_it(method):
    pipe = random_wan_pipeline("t2v-2.2")
    calibration = calibrate(pipe, method)
    names = calibration.model.layers
    assert [n.split(".")[0] for n in names] == ["transformer"] * 2 + ["transformer_2"] * 2
    for name, tensor in calibration.tensors.items():
        if name != "costs":
            assert 4 in tensor.shape[:2], f"{name}: a row for every layer of both"
    with sparsediff.enable(pipe, method, calibration=calibration) as handle:
        assert generate(pipe).isfinite().all()
        report = handle.report()
    assert {layer.name for layer in report.layers} == {*names}
    assert report.density == pytest.approx(calibration.density, abs=0.05)
    assert 0 < calibration.error < 1
    one = random_wan_pipeline()
    with pytest.raises(ValueError, match="transformers: measured"):
        sparsediff.enable(one, method, calibration=calibration)


@pytest.mark.parametrize("method", METHODS[:2], ids=lambda m: m.name)
def test_an_expert_that_never_had_its_turn_is_refused_by_name(method):
    with pytest.raises(
        ValueError, match=r"2 layers were never called .*\(transformer_2\.blocks\.0\.attn1, "
    ):
        calibrate(random_wan_pipeline("t2v-2.2"), method, num_inference_steps=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_method
def test_half_precision_measures_what_float32_does(method, dtype):
    exact = calibrate(random_wan_pipeline(), method)
    pipe = random_wan_pipeline()
    pipe.transformer.to(dtype)
    half = calibrate(pipe, method)
    assert half.provenance["dtype"] == str(dtype).removeprefix("torch.")
    assert half.density == pytest.approx(exact.density, abs=0.05)
    assert half.error == pytest.approx(exact.error, abs=0.05)
    for name, tensor in half.tensors.items():
        other = exact.tensors[name]
        assert tensor.dtype == other.dtype
        if tensor.is_floating_point():
            assert tensor.isfinite().all()
    with sparsediff.enable(pipe, method, calibration=half) as handle:
        assert generate(pipe).isfinite().all()
        assert handle.report().dense_calls == {}


@pytest.fixture(scope="module")
def joint():
    return tiny.load("tiny-cogvideox")


@each_method
def test_text_in_the_sequence_stays_and_the_video_is_measured(joint, method):
    size = {"height": 64, "width": 64, "num_inference_steps": 3, "max_sequence_length": 40}
    calibration = calibrate(joint, method, **size)
    layers, heads = len(calibration.model.layers), calibration.model.heads
    schedule = Schedule(dense_layers=2)  # measuring does not depend on it
    with sparsediff.enable(joint, method, calibration=calibration, schedule=schedule) as handle:
        assert generate(joint, **size).isfinite().all()
        report = handle.report()
        slot = next(iter(handle.states[0]._slots.values()))[3]
        keep = slot.mask((64, 64), 360).to_dense()
    assert report.grid == "40 text + 5x8x8"
    assert [x.density == 1 for x in report.layers][:3] == [True, True, False]
    if method.name == "lite_attention":
        # text comes first: its block and the one that it shares with the video stay
        assert keep[..., 0, :].all()
        assert keep[..., :, 0].all()
        assert calibration.grid is None
        return
    # 320 video tokens come first after the reordering: the sixth block is text alone
    assert calibration.grid == "40 text + 5x8x8"
    assert keep[..., 5, :].all()
    assert keep[..., :, 5].all()
    assert not keep[..., :5, :5].all()
    if method.name == "paro_attention":
        stored = unpack_bits(calibration.tensors["masks"], 6)
        assert stored.shape == (2, layers, heads, 6, 6)
        share = stored[..., :5, :5].float().mean((-1, -2))
        assert (share >= 0.4 - 1e-6).all()
        assert (share <= 0.4 + 5 / 25 + 1e-6).all(), "ties, and one block a row"
