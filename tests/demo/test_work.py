"""Comparisons on a real pipeline: what they tell, what they leave, and that nothing is left behind."""

import dataclasses
import json
import math

import pytest
import torch

import sparsediff
from sparsediff.demo.jobs import Cancelled, Job
from sparsediff.demo.meters import Phase, StepPoint, meter, notice
from sparsediff.demo.sessions import MAX_VISITORS, Sessions
from sparsediff.demo.studio import DenseCache, Studio
from sparsediff.demo.work import Result, all_methods, comparison, shared
from sparsediff.eval.captured import Capture
from sparsediff.eval.compare import Request
from sparsediff.eval.measure import generate
from sparsediff.eval.results import load_results
from sparsediff.testing import random_wan_pipeline


def run(work):
    """Everything a job tells: phases, results."""
    events = list(Job(work).events())
    return [e for e in events if isinstance(e, Phase)], [e for e in events if isinstance(e, Result)]


def processors(studio):
    return {n: type(p).__name__ for n, p in studio.pipe.transformer.attn_processors.items()}


def test_a_comparison_tells_every_step_and_leaves_results(studio, settings):
    phases, (result,) = run(comparison(studio, settings(seed=11, density=0.4)))
    steps = {
        kind: [p.points[-1].step for p in phases if p.id == kind and p.points]
        for kind in ("dense", "sparse")
    }
    assert steps["dense"] == [1, 2, 3]
    assert [s for i, s in enumerate(steps["sparse"]) if s not in steps["sparse"][:i]] == [1, 2, 3]
    shares = [p.share for p in phases]
    assert shares == sorted(shares)
    assert shares[-1] <= 1

    results = load_results(result.folder)
    dense, (arm,) = results.dense.clips[0], results.others
    clip = arm.clips[0]
    assert clip.density < 1
    assert math.isfinite(clip.metrics["psnr"])
    assert clip.latents_sha256 == dense.latents_sha256
    assert clip.steps[0].density == 1.0  # the schedule keeps the first step dense
    assert result.dense.stat().st_size > 0
    assert result.sparse.stat().st_size > 0
    assert Capture.load(results.capture_path(arm)).calls
    assert result.settings.request.guidance is not None or studio.limits.defaults.guidance is None
    # What the meters said is what the run did.
    last = [p for p in phases if p.id == "sparse" and p.points][-1].points
    assert [p.density for p in last] == pytest.approx([s.density for s in clip.steps], abs=1e-6)
    assert [p.divergence for p in last] == pytest.approx(
        [s.latent_divergence for s in clip.steps], rel=1e-3, abs=1e-6
    )
    assert last[-1].speedup == pytest.approx(clip.forecast.speedup)


def test_the_dense_clip_is_made_once_for_each_request(studio, settings):
    phases, _ = run(comparison(studio, settings(seed=12)))
    assert [p for p in phases if p.id == "dense"]
    phases, (result,) = run(comparison(studio, settings("lite_attention", seed=12, threshold=-3.0)))
    assert not [p for p in phases if p.id == "dense"]
    (arm,) = load_results(result.folder).others
    assert arm.method == "lite_attention"
    assert studio.limits.check(settings(seed=13).request) not in studio.dense


def test_a_cancelled_run_leaves_the_pipeline_stock_and_the_next_one_right(studio, settings):
    before = processors(studio)
    _, (expected,) = run(comparison(studio, settings(seed=14, density=0.4)))
    folders = set(expected.folder.parent.iterdir())
    long = settings(seed=14, steps=40, density=0.4)
    for kind in ("dense", "sparse"):
        job = Job(comparison(studio, long))
        seen = []
        with pytest.raises(Cancelled):  # noqa: PT012
            for event in job.events():
                seen.append(event)
                if event.id == kind and event.points:
                    job.cancel()
        assert job.wait(30)
        assert seen[-1].points[-1].step < 40
        if kind == "dense":
            assert studio.limits.check(long.request) not in studio.dense
            studio.dense.put(studio.limits.check(long.request), _dense(studio, long))
        assert set(expected.folder.parent.iterdir()) == folders  # nothing half-done is left
        assert processors(studio) == before
        assert not studio.pipe.transformer._forward_pre_hooks
        assert not studio.pipe.vae.decoder._forward_pre_hooks
    _, (again,) = run(comparison(studio, settings(seed=14, density=0.4)))
    one, two = (load_results(r.folder).others[0].clips[0] for r in (expected, again))
    assert one.frames_sha256 == two.frames_sha256
    assert one.density == two.density


def _dense(studio, settings):
    """The dense run of a request without the page."""
    request = dataclasses.replace(studio.limits.check(settings.request))
    return generate(studio.pipe, request.arguments(), trajectory=True)


@pytest.mark.slow
def test_all_methods_share_one_dense_clip_and_show_up_one_by_one(studio, settings):
    phases, results = run(all_methods(studio, settings(seed=15, frames=29)))
    assert len(results) == len(studio.methods) == 6
    assert len({r.folder for r in results}) == 1
    final = load_results(results[-1].folder)
    assert {a.method for a in final.others} == set(studio.methods)
    assert len({p.points[0].step for p in phases if p.id == "dense" and p.points}) == 1
    assert "tradeoff" in results[-1].report.read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": ""}, "Write a prompt"),
        ({"height": 100}, "multiple of"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_runs(studio, settings, change, said):
    good = settings()
    wrong = dataclasses.replace(good, request=dataclasses.replace(good.request, **change))
    with pytest.raises(ValueError, match=said):
        run(comparison(studio, wrong))


def test_a_wrong_parameter_is_refused_before_the_dense_run(studio, settings):
    wrong = settings("draft_attention", seed=16, pool_h=4, pool_w=8)
    job = Job(comparison(studio, wrong))
    seen = []
    with pytest.raises(ValueError, match="must be 64 or 128"):
        seen.extend(job.events())
    assert not seen


def test_a_calibration_given_at_the_start_offers_its_method(studio, settings, tmp_path):
    asked = settings("paro_attention", seed=18, frames=29)
    call = studio.limits.check(asked.request).arguments()
    for name in ("prompt", "generator", "output_type"):
        del call[name]
    sparsediff.calibrate(studio.pipe, "paro_attention", ["a star"], folder=tmp_path, call=call)
    other = Studio("random-wan", device="cpu", calibrations=(str(tmp_path),))
    assert set(other.methods) - set(studio.methods) == {"paro_attention"}
    other.start_loading()
    _, (result,) = run(comparison(other, asked))
    (arm,) = load_results(result.folder).others
    assert arm.calibration is not None
    travels = shared(other, result.settings)
    assert f"--calibration {tmp_path}" in travels.command
    assert f"calibration='{tmp_path}'" in travels.python
    other.close()


def test_a_schedule_of_ones_own_is_used(studio, settings):
    _, (result,) = run(comparison(studio, settings(seed=12, schedule={"dense_steps": 2})))
    (arm,) = load_results(result.folder).others
    assert [s.dense_share for s in arm.clips[0].steps] == [1.0, 1.0, 0.0]
    assert "dense_steps=2" in arm.label


def test_a_model_that_cannot_be_loaded_says_why(tmp_path, settings):
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))  # and no weights
    studio = Studio(str(tmp_path))
    studio.start_loading()
    with pytest.raises(RuntimeError, match="The model could not be loaded: "):
        run(comparison(studio, settings()))
    studio.close()


def test_an_unknown_model_or_calibration_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="unknown model 'nothing'"):
        Studio("nothing")
    with pytest.raises(OSError, match=str(tmp_path)):
        Studio("random-wan", calibrations=(str(tmp_path / "none"),))


def test_the_cache_forgets_the_oldest_beyond_its_bytes(studio, settings):
    made = _dense(studio, settings(seed=17))
    cache = DenseCache(limit=3 * (made.video.nbytes + made.latents.nbytes))
    requests = [Request(prompt=str(i)) for i in range(4)]
    for request in requests[:3]:
        cache.put(request, made)
    cache.get(requests[0])
    cache.put(requests[3], made)
    assert [r in cache for r in requests] == [True, False, True, True]
    small = DenseCache(limit=1)
    small.put(requests[0], made)
    assert len(small) == 1  # the latest stays, whatever its size


def test_large_masks_are_recorded_at_fewer_steps_and_layers(studio, settings):
    with sparsediff.enable(studio.pipe) as handle:
        names = [name for state in handle.states for name in state.layers]
        few = studio._captured(handle, studio.limits.check(settings(steps=20).request))
        big = dataclasses.replace(
            studio.limits.check(settings(steps=20).request), height=4096, width=4096
        )
        layers, steps = studio._captured(handle, big)
        one_frame = dataclasses.replace(big, height=32, width=32, frames=1, steps=1)
        assert studio._captured(handle, one_frame) == (names, [0])
    assert few == (names, [0, 4, 8, 11, 15, 19])
    assert 1 <= len(steps) < 6
    assert layers


def test_visitors_are_kept_apart_and_forgotten():
    sessions = Sessions()
    one, two = sessions.of("one"), sessions.of("two")
    assert one is not two
    assert sessions.of("one") is one
    job = one.start(Job(lambda job: None))
    two.cancel()
    assert not job.cancelled
    for i in range(MAX_VISITORS):
        sessions.of(f"other {i}")
    assert job.cancelled
    assert sessions.of("one") is not one


def test_cancelling_is_said_before_the_job_ends_and_never_after():
    session = Sessions().of("one")
    job = session.start(Job(lambda job: [job.tell("running"), job._cancelled.wait(5), job.check()]))
    told = []
    with pytest.raises(Cancelled):  # noqa: PT012
        for event in job.events():
            told.append(event)
            session.cancel()
            session.cancel()
    assert told[0] == "running"
    assert [e.id for e in told[1:]] == ["cancelling"]


# -- what a run says of itself ----------------------------------------------------------------------------------------


def test_the_meter_shows_the_last_step_and_escapes_what_it_is_given():
    points = tuple(
        StepPoint(
            step=i + 1, steps=4, seconds=0.5, density=1 / (i + 1), speedup=1.25, divergence=0.01
        )
        for i in range(3)
    )
    page = meter(Phase(name="<b>x</b>", points=points, share=0.5, id="sparse"))
    assert "<b>x</b>" not in page
    assert 'data-step="3"' in page
    assert "0.33" in page
    assert "1.25\N{MULTIPLICATION SIGN}" in page
    assert "1.00%" in page
    assert "step 3 of 4" in page
    assert "about 500 ms left" in page
    assert "width:50.0%" in page


def test_a_meter_of_unknown_numbers_shows_dashes():
    page = meter(
        Phase(name="Dense", points=(StepPoint(step=1, steps=1, seconds=70.0),), id="dense")
    )
    assert page.count("\N{EN DASH}</b>") == 2
    assert "1 min" in page
    assert "nan" not in page
    assert 'role="alert"' in notice("<script>", kind="error")
    assert "<script>" not in notice("<script>", kind="error")


def test_equal_latents_are_no_distance_apart(studio, settings):
    from sparsediff.demo.studio import _apart

    made = _dense(studio, settings(seed=17))
    assert _apart(made.latents[1].float(), made, 1) == 0.0
    assert _apart(torch.zeros_like(made.latents[1]), made, 1) == pytest.approx(1.0)
    assert _apart(None, made, 1) is None
    assert _apart(made.latents[1], made, 99) is None


def test_the_python_lines_name_the_precision_that_ran(settings, tmp_path):
    """diffusers keeps some layers of such a model in float32, the first one among them."""
    random_wan_pipeline().save_pretrained(tmp_path)
    studio = Studio(str(tmp_path), device="cpu", dtype="bfloat16")
    studio.start_loading()
    studio.wait_until_loaded()
    try:
        assert next(studio.pipe.transformer.parameters()).dtype == torch.float32
        assert "=torch.bfloat16)" in shared(studio, settings()).python
    finally:
        studio.close()
