"""A run measures what it says, can be interrupted anywhere, and goes on without making anything twice."""

import dataclasses
import json
import math

import pytest
import torch

import sparsediff.eval.runner as runner
from sparsediff.eval.captured import Capture
from sparsediff.eval.results import load_results
from sparsediff.eval.run_folder import configuration
from sparsediff.eval.runner import Options, evaluate
from sparsediff.eval.video import read_video
from sparsediff.testing import random_wan_pipeline

CALL = {
    "height": 96, "width": 96, "num_frames": 17, "num_inference_steps": 3, "max_sequence_length": 16,
}  # fmt: skip
PROMPTS = ["a circle", "a star"]
ARMS = ["auto:density=0.5,block=32,dense_steps=1", "lite_attention:threshold=-1,tile=(32,32)"]
QUIET = Options(metrics=("psnr", "ssim", "flicker"), progress=False)


@pytest.fixture(scope="module")
def pipe():
    return random_wan_pipeline()


@pytest.fixture(scope="module")
def done(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    options = dataclasses.replace(QUIET, random=True, attention_error=True, captures=True)
    return evaluate(
        pipe, PROMPTS, ARMS, folder=folder, call=CALL, model="random-wan", options=options
    )


@pytest.fixture(scope="module")
def small(pipe, tmp_path_factory):
    """One prompt, one method; to be read, not to be changed."""
    return run(pipe, tmp_path_factory.mktemp("small"), prompts=PROMPTS[:1], arms=ARMS[:1])


def run(pipe, folder, *, prompts=PROMPTS, arms=ARMS, options=QUIET, **changes):
    return evaluate(
        pipe,
        prompts,
        arms,
        folder=folder,
        **{"call": CALL, "model": "m", **changes},
        options=options,
    )


@pytest.fixture
def generated(monkeypatch):
    """Every clip that is generated, as (prompt, seed of the generator)."""
    made = []
    real = runner.generate

    def generate(pipe, arguments, **options):
        made.append((arguments["prompt"], arguments["generator"].initial_seed()))
        return real(pipe, arguments, **options)

    monkeypatch.setattr(runner, "generate", generate)
    return made


def test_everything_is_measured(done):
    assert [a.role for a in done.arms] == ["dense", "sparse", "sparse", "random"]
    for arm in done.arms:
        assert [c.prompt for c in arm.clips] == PROMPTS
        assert arm.environment["torch"] == torch.__version__
        assert arm.call["num_inference_steps"] == 3
        assert arm.warmup_seconds > 0
        assert arm.layout["layers"] == 2
        for clip in arm.clips:
            assert clip.timings.total.median > clip.timings.denoiser.median > 0
            assert len(clip.steps) == 3
            assert all(s.seconds > 0 for s in clip.steps)
            video, fps = read_video(done.folder / clip.video)
            assert (tuple(video.shape[:3]), fps) == (clip.shape, arm.fps)
    for arm in done.others:
        for clip, dense in done.pairs(arm):
            assert clip.latents_sha256 == dense.latents_sha256
            assert 0 < clip.metrics["psnr"] < 100
            assert len(clip.frame_curves["psnr"]) == 17
            assert (
                clip.timings.mask.median
                < clip.timings.attention.median
                < clip.timings.denoiser.median
            )
            assert clip.forecast.tokens == 5 * 6 * 6
            assert clip.density < 1
            assert [len(layer.steps) for layer in clip.layers] == [3, 3]
            assert sum(clip.dense_calls.values()) == sum(layer.dense_calls for layer in clip.layers)


def test_the_latents_part_where_the_method_starts(done):
    auto = next(a for a in done.arms if a.method == "auto")
    for clip in auto.clips:
        apart = [s.latent_divergence for s in clip.steps]
        assert apart[0] < 1e-4, (
            "the first step is dense, by the kernel that also finds the log-sum-exp"
        )
        assert apart[0] < apart[1] < apart[2]
        assert clip.metrics["latent_divergence"] == apart[2]
        assert clip.steps[0].density == 1.0


def test_the_dense_arm_is_stock_and_repeats_itself(done):
    dense = done.dense
    assert all(c.timings.attention is None and not c.layers for c in dense.clips)
    assert dense.repeat.frames_sha256 == dense.clips[0].frames_sha256
    assert math.isinf(dense.repeat.metrics["psnr"])
    assert 0 < dense.repeat.timings.attention.median < dense.repeat.timings.denoiser.median


def test_checks_are_part_of_the_results(done):
    for arm in done.arms:
        names = {c.name for c in arm.checks}
        assert "timing" in names
        assert ("deterministic" if arm.role == "dense" else "same start") in names
        assert [c.detail for c in arm.checks if c.passed is False] == []


def test_errors_of_attention_and_masks_come_from_a_run_of_their_own(done):
    for arm in done.others:
        first, second = arm.clips
        assert 0 < first.metrics["attention_error"] < 2
        assert "attention_error" not in second.metrics
        sparse = [s.attention_error for s in first.steps if s.attention_error is not None]
        assert first.metrics["attention_error"] == pytest.approx(sum(sparse) / len(sparse))
        capture = Capture.load(done.capture_path(arm))
        assert capture.about["prompt"] == PROMPTS[0]
        sparse = [call for call in capture.calls if call.dense_reason is None]
        assert sparse
        kept = torch.stack([call.kept_mass() for call in sparse])
        assert (kept > 0).all()
        assert (kept < 1.001).all()
        assert kept.min() < 0.999


def test_masks_are_captured_alone_where_their_attention_does_not_fit(pipe, tmp_path, monkeypatch):
    import sparsediff.eval.capture as capture

    real = capture._Recorder
    monkeypatch.setattr(
        capture, "_Recorder", lambda **options: real(**{**options, "max_bytes": 500})
    )
    options = dataclasses.replace(QUIET, captures=True)
    results = run(pipe, tmp_path, prompts=PROMPTS[:1], arms=ARMS[:1], options=options)
    (arm,) = results.others
    captured = Capture.load(results.capture_path(arm))
    assert captured.calls
    assert all(call.mass is None for call in captured.calls)
    assert any("attention mass was not captured" in note for note in arm.notes)


def test_all_random_blocks_are_at_the_density_of_their_method(done):
    auto, rand = (next(a for a in done.arms if a.method == m) for m in ("auto", "random"))
    for a, b in zip(auto.clips, rand.clips, strict=True):
        assert a.density == pytest.approx(b.density, abs=0.02)
        assert a.metrics["psnr"] > b.metrics["psnr"]


def test_the_pipeline_is_stock_afterwards(pipe, done):
    assert type(pipe.transformer.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"
    assert not pipe.transformer._forward_hooks
    assert not hasattr(pipe, "_progress_bar_config")


def test_the_same_again_makes_nothing_again(pipe, done, generated):
    before = {p: p.read_bytes() for p in done.folder.rglob("*.json")}
    options = dataclasses.replace(QUIET, random=True, attention_error=True, captures=True)
    again = run(pipe, done.folder, model="random-wan", options=options)
    assert generated == []
    assert again == done
    assert {p: p.read_bytes() for p in done.folder.rglob("*.json")} == before


def test_arms_take_turns(pipe, tmp_path, generated):
    run(pipe, tmp_path, prompts=PROMPTS)
    prompts = [prompt for prompt, _ in generated]
    # Dense, its repeat and two methods for the first prompt, then the second.
    assert prompts == [PROMPTS[0]] * 4 + [PROMPTS[1]] * 3
    assert not (tmp_path / "reference").exists()


def test_an_interrupt_before_the_repeat_does_not_lose_it(pipe, tmp_path, monkeypatch):
    """The dense clip is written, its repeat is not: of one prompt there is no later chance."""
    with monkeypatch.context() as patched:
        patched.setattr(runner._Run, "_repeat", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(pipe, tmp_path, prompts=PROMPTS[:1], arms=ARMS[:1])
    waiting = list((tmp_path / "reference").iterdir())
    waiting[0].write_bytes(b"damaged")  # and it is made again
    results = run(pipe, tmp_path, prompts=PROMPTS[:1], arms=ARMS[:1])
    assert results.dense.repeat.frames_sha256 == results.dense.clips[0].frames_sha256
    assert {c.name: c.passed for c in results.dense.checks}["deterministic"] is True


@pytest.mark.parametrize("after", [1, 5])
def test_an_interrupt_anywhere_costs_only_the_clip_it_hit(
    pipe, tmp_path, after, generated, monkeypatch
):
    """The figures are those of a run that was never interrupted; no clip is made twice but the one that was hit."""
    counted = runner.generate

    def interrupted(*args, **options):
        if len(generated) == after:
            raise KeyboardInterrupt
        return counted(*args, **options)

    monkeypatch.setattr(runner, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, tmp_path)
    monkeypatch.setattr(runner, "generate", counted)
    results = run(pipe, tmp_path)
    assert len(generated) == 7, "as many as without an interrupt"
    assert type(pipe.transformer.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"
    for arm in results.others:
        for clip, _ in results.pairs(arm):
            assert clip.metrics["psnr"] < 100
            assert clip.steps[-1].latent_divergence > 0


def test_an_interrupted_run_has_the_figures_of_a_whole_one(pipe, tmp_path, generated, monkeypatch):
    whole = run(pipe, tmp_path / "whole")
    generated.clear()
    counted = runner.generate

    def interrupted(*args, **options):
        if len(generated) == 2:  # the dense twin is made, its clips are not
            raise KeyboardInterrupt
        return counted(*args, **options)

    monkeypatch.setattr(runner, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, tmp_path / "other")
    assert list((tmp_path / "other/reference").iterdir()), "the dense twin waits"
    monkeypatch.setattr(runner, "generate", counted)
    other = run(pipe, tmp_path / "other")
    for a, b in zip(whole.arms, other.arms, strict=True):
        assert [c.metrics for c in a.clips] == [c.metrics for c in b.clips]
        assert [c.frames_sha256 for c in a.clips] == [c.frames_sha256 for c in b.clips]


def test_arms_and_prompts_can_be_added(pipe, tmp_path, generated):
    run(pipe, tmp_path, prompts=PROMPTS[:1], arms=ARMS[:1])
    generated.clear()
    results = run(pipe, tmp_path, prompts=[PROMPTS[1], PROMPTS[0]], arms=ARMS)
    # The new prompt: dense and both methods; the old one: the dense twin again (checked, not counted) and the new arm.
    assert len(generated) == 3 + 2
    assert [len(a.clips) for a in results.arms] == [2, 2, 2]
    assert {c.prompt: c.index for c in results.dense.clips} == {PROMPTS[0]: 0, PROMPTS[1]: 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"call": {**CALL, "num_inference_steps": 4}}, r"num_inference_steps \(was 3, is 4\)"),
        ({"options": dataclasses.replace(QUIET, metrics=("psnr",))}, r"metrics \(was 'psnr, ssim, flicker', is 'psnr'\)"),
        ({"options": dataclasses.replace(QUIET, repeats=2)}, "repeats"),
        ({"model": "other"}, "model"),
        ({"fps": 8}, "fps"),
    ],
)  # fmt: skip
def test_a_changed_configuration_is_refused_by_name(pipe, small, change, message, generated):
    with pytest.raises(ValueError, match=message) as error:
        run(pipe, small.folder, prompts=PROMPTS[:1], arms=ARMS[:1], **change)
    assert "choose another --out" in str(error.value)
    assert generated == []
    assert load_results(small.folder) == small


def test_changed_weights_and_scheduler_are_noticed(tmp_path):
    pipe = random_wan_pipeline()
    run(pipe, tmp_path, prompts=PROMPTS[:1], arms=ARMS[:1])
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=5.0)
    with pytest.raises(ValueError, match="scheduler"):
        run(pipe, tmp_path, prompts=PROMPTS[:1], arms=ARMS[:1])
    other = random_wan_pipeline(seed=1)
    with pytest.raises(ValueError, match="weights"):
        run(other, tmp_path, prompts=PROMPTS[:1], arms=ARMS[:1])


def test_a_run_goes_on_in_another_process():
    """diffusers lists what nobody set in an order that is another in every process."""
    pipe = random_wan_pipeline()
    before = configuration(pipe, ("psnr",), 1)
    left = pipe.scheduler.config["_use_default_values"]
    assert len(left) > 1
    pipe.scheduler.register_to_config(_use_default_values=left[::-1])
    assert configuration(pipe, ("psnr",), 1) == before


def test_repeats_are_all_kept(pipe, tmp_path):
    options = dataclasses.replace(QUIET, repeats=3)
    results = run(pipe, tmp_path, prompts=PROMPTS[:1], arms=ARMS[:1], options=options)
    for arm in results.arms:
        times = arm.clips[0].timings
        assert len(times.total.samples) == len(times.denoiser.samples) == 3
        assert times.total.low <= times.total.median <= times.total.high
    assert len(results.others[0].clips[0].timings.attention.samples) == 3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompts": "a circle"}, ValueError, "list of texts"),
        ({"prompts": []}, ValueError, "no prompts"),
        ({"prompts": ["a", "a"]}, ValueError, "a prompt twice"),
        ({"call": {"generator": None}}, ValueError, "call must not hold generator"),
        ({"arms": ["auto", "auto"]}, ValueError, "two arms are alike"),
        ({"options": dataclasses.replace(QUIET, metrics=("ms_ssim",))}, ValueError, "at least 176"),
        ({"options": dataclasses.replace(QUIET, metrics=("beauty",))}, ValueError, "unknown metric"),
    ],
)  # fmt: skip
def test_what_can_be_refused_is_refused_before_the_first_clip(
    pipe, tmp_path, change, error, message, generated
):
    with pytest.raises(error, match=message):
        run(pipe, tmp_path, **change)
    assert generated == []
    assert not list(tmp_path.rglob("*.json"))


def test_an_enabled_pipeline_is_refused(tmp_path):
    import sparsediff

    pipe = random_wan_pipeline()
    with sparsediff.enable(pipe), pytest.raises(ValueError, match=r"sparsediff\.disable"):
        run(pipe, tmp_path)


def test_a_nondeterministic_pipeline_does_not_get_later_arms(pipe, tmp_path):
    run(pipe, tmp_path, prompts=PROMPTS[:1], arms=ARMS[:1])
    path = tmp_path / "arms/dense.json"
    data = json.loads(path.read_text())
    data["clips"][0]["frames_sha256"] = "0" * 64
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="does not come out as it did before"):
        run(pipe, tmp_path, prompts=PROMPTS[:1], arms=ARMS)
