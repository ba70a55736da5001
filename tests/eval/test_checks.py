"""Bugs that have spoilt comparisons are planted in a run of the harness, and its own checks find them."""

import contextlib
import dataclasses
import re

import pytest
import torch

import sparsediff.eval.runner as runner
from sparsediff.eval import checks
from sparsediff.eval.checks import check_density, check_picture, check_timing, failed
from sparsediff.eval.results import Spread, Timings, load_results
from sparsediff.eval.runner import Options, evaluate
from sparsediff.pipelines import tiny
from sparsediff.testing import random_wan_pipeline

CALL = {
    "height": 96, "width": 96, "num_frames": 9, "num_inference_steps": 2, "max_sequence_length": 16,
}  # fmt: skip
ARM = "auto:density=0.5,block=32,dense_steps=1"
OPTIONS = Options(metrics=("psnr",), progress=False)


def run(pipe, folder, arm=ARM):
    return evaluate(pipe, ["a circle"], [arm], folder=folder, call=CALL, model="m", options=OPTIONS)


def names(results):
    return {(arm.role, check.name) for arm, check in failed(results)}


@pytest.fixture
def pipe():
    return random_wan_pipeline()


def test_a_sound_run_passes(pipe, tmp_path):
    results = run(pipe, tmp_path)
    assert names(results) == set()
    assert {c.passed for c in results.dense.checks} == {True}


def test_another_seed_in_one_arm(pipe, tmp_path, monkeypatch):
    real = runner.generate

    def other_seed(pipe, arguments, **options):
        sparse = type(pipe.transformer.blocks[0].attn1.processor).__name__.startswith("Sparse")
        if sparse and not any("dense_steps=1.0" in str(b) for b in _schedules(pipe)):
            arguments = {**arguments, "generator": torch.Generator().manual_seed(99)}
        return real(pipe, arguments, **options)

    monkeypatch.setattr(runner, "generate", other_seed)
    results = run(pipe, tmp_path)
    assert ("sparse", "same start") in names(results)
    assert ("dense", "deterministic") not in names(results)
    (detail,) = (c.detail for _, c in failed(results) if c.name == "same start")
    assert "other noise" in detail
    assert "'a circle', seed 0" in detail


def test_a_method_that_returns_noise(tmp_path, monkeypatch):
    """On a trained model: what a random one shows is noise either way."""
    from sparsediff import block_attention

    real, draw = block_attention.run_backend, torch.Generator().manual_seed(0)

    def noise(*args, **options):
        result = real(*args, **options)
        result.out.copy_(10 * torch.randn(result.out.shape, generator=draw))
        return result

    monkeypatch.setattr(block_attention, "run_backend", noise)
    call = {**CALL, "height": 128, "width": 128, "num_inference_steps": 4, "guidance_scale": 1.0}
    results = evaluate(
        tiny.load("tiny-wan"),
        ["a large red star spinning on a navy background"],
        # Every step is the method's, so that its noise has the picture to itself.
        ["lite_attention:threshold=-1,tile=(64,64)"],
        folder=tmp_path,
        call=call,
        model="tiny-wan",
        options=OPTIONS,
    )
    assert ("sparse", "picture") in names(results)
    assert ("sparse", "same start") not in names(results)


def test_times_of_launches(pipe, tmp_path, monkeypatch):
    """A clock that is read before the device has finished tells next to nothing for the transformer."""
    real = runner.generate

    def unsynchronised(pipe, arguments, **options):
        made = real(pipe, arguments, **options)
        return dataclasses.replace(made, denoiser_seconds=made.denoiser_seconds / 50)

    monkeypatch.setattr(runner, "generate", unsynchronised)
    results = run(pipe, tmp_path)
    assert ("sparse", "timing") in names(results)


def test_a_total_that_nobody_waited_for(pipe, tmp_path, monkeypatch):
    real = runner.generate

    def unsynchronised(pipe, arguments, **options):
        made = real(pipe, arguments, **options)
        return dataclasses.replace(made, total_seconds=made.denoiser_seconds / 2)

    monkeypatch.setattr(runner, "generate", unsynchronised)
    assert ("sparse", "timing") in names(run(pipe, tmp_path))


def test_a_pipeline_that_is_not_deterministic(pipe, tmp_path):
    draw = torch.Generator().manual_seed(0)

    def jitter(module, args, output):
        return (output[0] + 1e-3 * torch.randn(output[0].shape, generator=draw), *output[1:])

    with contextlib.closing(_Removing(pipe.transformer.register_forward_hook(jitter))):
        results = run(pipe, tmp_path)
    assert ("dense", "deterministic") in names(results)
    (detail,) = (c.detail for _, c in failed(results) if c.name == "deterministic")
    assert "dB away" in detail


def test_a_method_that_ran_dense(pipe, tmp_path):
    with pytest.warns(RuntimeWarning, match="too few"):
        results = run(pipe, tmp_path, "auto:density=0.5,block=128,dense_steps=0")
    assert ("sparse", "runs sparse") in names(results)
    (detail,) = (c.detail for _, c in failed(results) if c.name == "runs sparse")
    assert "tokens are too few" in detail


def test_a_density_that_was_not_asked_for(pipe, tmp_path):
    results = run(pipe, tmp_path)
    arm = results.others[0]
    assert check_density(arm).passed
    wrong = dataclasses.replace(arm, parameters={**arm.parameters, "density": 0.05})
    found = check_density(wrong)
    assert found.passed is False
    assert "0.050 were asked for" in found.detail


def test_a_density_rounded_to_whole_blocks_is_what_was_asked_for(pipe, tmp_path):
    """Runs too short for a forecast of their speed know how many tokens they had all the same."""
    arm = run(pipe, tmp_path).others[0]
    clips = tuple(
        dataclasses.replace(c, forecast=dataclasses.replace(c.forecast, speedup=None))
        for c in arm.clips
    )
    kept = sum(map(checks._sparse_density, clips)) / len(clips)
    tokens, block = clips[0].forecast.tokens, arm.parameters["block"]
    for blocks, passes in ((0.9, True), (1.1, False)):
        asked = kept - checks.DENSITY_SLACK - blocks * block / tokens
        parameters = {**arm.parameters, "density": asked}
        found = check_density(dataclasses.replace(arm, clips=clips, parameters=parameters))
        assert found.passed is passes


def test_a_black_clip(results_folder):
    results = load_results(results_folder)
    dense = dataclasses.replace(
        results.dense,
        clips=tuple(dataclasses.replace(c, contrast=0.2) for c in results.dense.clips),
    )
    black = dataclasses.replace(
        results.others[0],
        clips=tuple(dataclasses.replace(c, contrast=0.0) for c in results.others[0].clips),
    )
    planted = dataclasses.replace(results, arms=(dense, black))
    assert check_picture(planted, black).passed is False
    fine = dataclasses.replace(
        black, clips=tuple(dataclasses.replace(c, contrast=0.2) for c in black.clips)
    )
    assert check_picture(dataclasses.replace(results, arms=(dense, fine)), fine).passed


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ({"attention": 3.0}, "attention .* took longer than denoiser"),
        ({"attention": 1.0, "mask": 1.5}, "mask .* took longer than attention"),
        ({"denoiser": 6.0}, "denoiser .* took longer than total"),
        ({"text": 2.0, "decode": 2.0}, "parts .* take longer than the whole"),
        ({"denoiser": 0.1, "text": 0.1, "decode": 0.1}, "lie in no part"),
        ({"total": 0.0}, r"took 0\.000 s"),
        ({}, "account for it"),
    ],
)
def test_times_that_cannot_be(results_folder, times, words):
    arm = load_results(results_folder).dense
    base = {"total": 5.0, "denoiser": 2.0, "text": 1.0, "decode": 1.5}
    spreads = {name: Spread(samples=(s,)) for name, s in {**base, **times}.items()}
    clip = dataclasses.replace(arm.clips[0], timings=Timings(**spreads))
    found = check_timing(dataclasses.replace(arm, clips=(clip,), repeat=None))
    assert found.passed is (times == {})
    assert re.search(words, found.detail)


def test_lost_videos_are_noticed(results_folder):
    from sparsediff.eval.checks import check_results

    (results_folder / "clips/dense/0.mp4").unlink()
    found = check_results(load_results(results_folder))["dense"]
    assert [c.passed for c in found if c.name == "videos"] == [False]


class _Removing:
    def __init__(self, hook):
        self.close = hook.remove


def _schedules(pipe):
    from sparsediff.patch import handle_of

    handle = handle_of(pipe)
    return [] if handle is None else [handle.schedule]
