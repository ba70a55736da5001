"""`sparsediff.calibrate` on a real Wan pipeline at a tiny random size."""

import dataclasses
import gc
import weakref

import pytest
import torch

import sparsediff
from sparsediff import (
    Calibration,
    LiteAttention,
    PAROAttention,
    Schedule,
    SparseVDiT,
    block_attention,
)
from sparsediff.calibration import FILE
from sparsediff.calibrator import PARTIAL, _content
from sparsediff.testing import random_wan_pipeline

PROMPTS = ["a small red circle moves left", "two yellow stars"]
CALL = {
    "height": 128,
    "width": 128,
    "num_frames": 17,
    "num_inference_steps": 3,
    "guidance_scale": 1.0,
    "max_sequence_length": 16,
}
COSTS = (1.0, 0.0, 0.3, 0.35, 0.4)
METHODS = [
    PAROAttention(density=0.4, bins=2),
    SparseVDiT(costs=COSTS, epsilon=1.0, lambda_=0.5, bins=2),
    LiteAttention(tile=(64, 64), error=0.05, error_spread=0.02, must_keep=((0, 10),)),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)


def run(pipe, method, folder=None, prompts=PROMPTS, call=CALL, **more):
    return sparsediff.calibrate(
        pipe, method, prompts, folder=folder, progress=False, call=call, **more
    )


def generate(pipe, seed=0, prompt=PROMPTS[0], **changes):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pipe(
        prompt=prompt, output_type="latent", generator=generator, **{**CALL, **changes}
    ).frames


@pytest.fixture(scope="module")
def pipe():
    return random_wan_pipeline()


@pytest.fixture(scope="module")
def measured(pipe, tmp_path_factory):
    """What each method's calibration is, and its folder."""
    made = {}
    for method in METHODS:
        folder = tmp_path_factory.mktemp(method.name)
        made[method] = run(pipe, method, folder), folder
    return made


def assert_stock(pipe):
    assert not pipe.transformer._forward_pre_hooks
    assert type(pipe.transformer.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"
    assert "progress_bar" not in vars(pipe)


def assert_same_tensors(one, other):
    assert one.tensors.keys() == other.tensors.keys()
    for name, x in one.tensors.items():
        assert torch.equal(x, other.tensors[name]), name


@each_method
def test_the_artefact_is_in_the_folder_and_nothing_else(measured, method, pipe):
    calibration, folder = measured[method]
    assert [p.name for p in folder.iterdir()] == [FILE]
    back = Calibration.from_pretrained(folder)
    assert_same_tensors(calibration, back)
    assert (back.density, back.error) == (calibration.density, calibration.error)
    assert back.parameters == calibration.parameters == method.parameters()
    assert (back.grid is None) == (method.name == "lite_attention")
    assert back.provenance["prompts"] == 2
    assert back.provenance["call"] == CALL
    assert_stock(pipe)


@each_method
def test_it_is_deterministic(measured, method, tmp_path):
    """The same file, byte for byte, but for the day it was made."""
    calibration, folder = measured[method]
    again = run(random_wan_pipeline(), method)
    provenance = {**again.provenance, "date": calibration.provenance["date"]}
    dataclasses.replace(again, provenance=provenance).save_pretrained(tmp_path)
    assert (tmp_path / FILE).read_bytes() == (folder / FILE).read_bytes()


@each_method
def test_stated_density_and_error_are_what_runs_measure(pipe, measured, method):
    from sparsediff.api import watch

    calibration, folder = measured[method]
    densities, errors = [], []
    for seed, prompt in enumerate(PROMPTS):
        with sparsediff.enable(pipe, method.name, calibration=folder) as handle:
            generate(pipe, seed, prompt)
            densities.append(handle.report().density)

        def look(call):
            dense, (sparse, _) = call.dense(), call.sparse()
            errors.append(((sparse - dense).norm() / dense.norm()).item())
            return sparse

        with watch(pipe, look, method=method.calibrated(calibration)):
            generate(pipe, seed, prompt)
    assert calibration.density == pytest.approx(sum(densities) / 2, abs=1e-9)
    assert calibration.error == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert 0 < calibration.error < 1
    assert calibration.density < 1


@pytest.mark.parametrize("late", [False, True])
@each_method
def test_interrupted_and_resumed_equals_uninterrupted(
    measured, method, late, tmp_path, monkeypatch
):
    """Ctrl-C in the last watched generation, or in the first that measures the error: what was finished is kept."""
    passes = 2 if method.name == "paro_attention" else 1
    interrupted_at = passes * 2 - 1 + late
    pipe = random_wan_pipeline()
    starts, real = [], type(pipe).__call__

    def counted(self, *args, **kwargs):
        starts.append(kwargs["prompt"])
        if len(starts) == interrupted_at + 1:
            kwargs["callback_on_step_end"] = interrupt
        return real(self, *args, **kwargs)

    def interrupt(pipe, step, timestep, kwargs):
        if step == 1:
            raise KeyboardInterrupt
        return kwargs

    monkeypatch.setattr(type(pipe), "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, method, tmp_path)
    assert_stock(pipe)
    assert [p.name for p in tmp_path.iterdir()] == [PARTIAL]
    resumed = run(pipe, method, tmp_path)
    again = (passes + 1) * 2 - interrupted_at
    assert len(starts) == interrupted_at + 1 + again, "finished generations are not repeated"
    calibration, _ = measured[method]
    assert_same_tensors(resumed, calibration)
    assert (resumed.density, resumed.error) == (calibration.density, calibration.error)
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


def test_unfinished_work_for_something_else_is_not_picked_up(pipe, measured, tmp_path, monkeypatch):
    method = METHODS[0]
    with monkeypatch.context() as patch:
        patch.setattr("sparsediff.calibrator._measure", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(pipe, method, tmp_path, seed=5)
    assert (tmp_path / PARTIAL).exists()
    assert_same_tensors(run(pipe, method, tmp_path), measured[method][0])


def leave_unfinished(pipe, folder, **changes):
    """What two generations leave behind when the run stops before the error is measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsediff.calibrator._measure", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(pipe, METHODS[1], folder, **changes)


def starts_over(folder, capsys, pipe, **changes):
    """What a run says of the work it finds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsediff.calibrator._measure", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sparsediff.calibrate(
                pipe, METHODS[1], **{"prompts": PROMPTS, "call": CALL, **changes}, folder=folder
            )
    return capsys.readouterr().err


def test_unfinished_work_says_for_what_it_was(pipe, tmp_path, capsys, monkeypatch):
    leave_unfinished(pipe, tmp_path)
    assert f"resuming: {tmp_path / PARTIAL} ends after generation 2" in starts_over(
        tmp_path, capsys, pipe
    )
    tuned = random_wan_pipeline()
    with torch.no_grad():
        tuned.transformer.blocks[1].ffn.net[0].proj.bias[3] += 1e-3
    named = random_wan_pipeline()
    named.register_to_config(_name_or_path="somebody/else")
    for other, changes, words in (
        (tuned, {}, "weights or dtype"),
        (named, {}, "model"),
        (random_wan_pipeline(), {"prompts": PROMPTS[::-1], "seed": 1}, "prompts, seed"),
        (random_wan_pipeline().to(torch.bfloat16), {}, "weights or dtype"),
    ):
        leave_unfinished(pipe, tmp_path)
        said = starts_over(tmp_path, capsys, other, **changes)
        assert f"starting over: {tmp_path / PARTIAL} was made with another {words}\n" in said
    leave_unfinished(pipe, tmp_path)
    monkeypatch.setattr("sparsediff.__version__", "99")
    assert "with another version of sparsediff\n" in starts_over(tmp_path, capsys, pipe)


def test_pictures_and_tensors_of_a_call_count_by_what_they_hold():
    """Their representations tell an address, or leave most of them out."""
    from PIL import Image

    def mark(value):
        return _content({"image": value, "num_frames": 17})

    grey, other = (Image.new("RGB", (8, 8), (x, x, x)) for x in (7, 8))
    assert mark(grey) == mark(grey.copy()) != mark(other)
    x = torch.zeros(100, 100)
    y = x.clone()
    y[50, 50] = 1
    assert repr(x) == repr(y)
    assert mark(x) == mark(x.clone()) != mark(y)
    assert mark(x) != mark(x.view(50, 200))
    assert mark([x.half()]) != mark([x.bfloat16()])
    assert mark(x.numpy()) == mark(x.numpy().copy()) != mark(y.numpy())
    assert mark(test_nothing_is_said_without_progress) == mark(
        test_nothing_is_said_without_progress
    )
    assert mark(object()) == mark(object())
    assert mark(1.0) != mark("1.0")


@pytest.mark.parametrize("damage", ["empty", "torn", "text", "bare"])
def test_damaged_unfinished_work_is_done_again(pipe, tmp_path, capsys, damage):
    leave_unfinished(pipe, tmp_path)
    partial = tmp_path / PARTIAL
    whole = partial.read_bytes()
    if damage == "bare":
        torch.save({"fingerprint": "of an earlier version"}, partial)
    else:
        partial.write_bytes(
            {"empty": b"", "torn": whole[: len(whole) // 2], "text": b"hello"}[damage]
        )
    said = starts_over(tmp_path, capsys, pipe)
    assert f"starting over: {partial} is damaged" in said


def test_nothing_is_said_without_progress(pipe, tmp_path, capsys):
    leave_unfinished(pipe, tmp_path)
    leave_unfinished(pipe, tmp_path, seed=4)
    assert capsys.readouterr() == ("", "")


def test_steps_have_a_bar_below_that_of_the_generations(pipe, tmp_path, capsys):
    said = starts_over(tmp_path, capsys, pipe)
    assert "calibrate sparse_vdit:" in said
    assert "  steps:   0%|          | 0/3 [" in said


def test_ctrl_c_before_anything_is_finished_says_so(tmp_path, capsys, monkeypatch):
    pipe = random_wan_pipeline()

    def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(pipe), "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sparsediff.calibrate(pipe, METHODS[1], PROMPTS, call=CALL, folder=tmp_path)
    assert "stopped: no generation was finished, so nothing is kept" in capsys.readouterr().err


def test_the_pipeline_is_stock_after_an_exception_inside(pipe):
    stock = generate(pipe)
    config = dict(pipe._progress_bar_config)
    broken = pipe.transformer.blocks[1].ffn.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(pipe, METHODS[0])
    broken.remove()
    assert_stock(pipe)
    assert pipe._progress_bar_config == config
    assert torch.equal(generate(pipe), stock)


def test_more_steps_than_were_measured_take_the_nearest_stretch(pipe):
    """Two steps meet the first and the third of four stretches; four steps need all of them."""
    for method in (PAROAttention(density=0.4), SparseVDiT(costs=COSTS, epsilon=9.0)):
        call = {**CALL, "num_inference_steps": 2}
        calibration = run(pipe, method, prompts=PROMPTS[:1], call=call)
        with sparsediff.enable(pipe, method, calibration=calibration) as handle:
            generate(pipe, num_inference_steps=4)
            density = [step.density for step in handle.report().steps]
        assert density[0] == density[1] > 0.05
        assert density[2] == density[3] > 0.05


def test_keeping_everything_in_six_orders_changes_nothing(pipe, monkeypatch):
    """PAROAttention is neutral without a mask."""
    monkeypatch.setattr("sparsediff.block_attention.CPU_BREAK_EVEN", 2.0)
    stock = generate(pipe)
    method = PAROAttention(density=1.0, bins=1)
    calibration = run(pipe, method, prompts=PROMPTS[:1])
    for orders in ([[0, 1], [2, 3]], [[4, 5], [3, 0]]):
        tensors = {**calibration.tensors, "orders": torch.tensor(orders, dtype=torch.uint8)}
        changed = dataclasses.replace(calibration, tensors=tensors)
        with sparsediff.enable(pipe, method, calibration=changed) as handle:
            out = generate(pipe)
            assert handle.report().dense_calls == {}
        assert torch.allclose(out, stock, rtol=0, atol=2e-5 * stock.abs().max().item())


@each_method
def test_a_calibration_goes_with_the_pipeline_that_used_it(measured, method):
    _, folder = measured[method]
    calibration, pipe = Calibration.from_pretrained(folder), random_wan_pipeline()
    block_attention._forced.cache_clear()  # which may know an equal method by another calibration
    gone = weakref.ref(calibration)
    with sparsediff.enable(pipe, method.name, calibration=calibration) as handle:
        generate(pipe)
        assert handle.method.calibration is calibration
    del calibration, handle
    gc.collect()
    assert gone() is None


# -- what is refused --------------------------------------------------------------------------------------------------


def test_another_method_or_model_is_refused_and_nothing_is_patched(measured):
    calibration, folder = measured[METHODS[0]]
    pipe = random_wan_pipeline()
    with pytest.raises(ValueError, match="is for paro_attention, not for sparse_vdit"):
        sparsediff.enable(pipe, "sparse_vdit", calibration=folder)
    with pytest.raises(ValueError, match="auto takes no calibration"):
        sparsediff.enable(pipe, "auto", calibration=calibration)
    with pytest.raises(TypeError, match="a Calibration, a folder or a repository, got dict"):
        sparsediff.enable(pipe, "paro_attention", calibration={})
    assert_stock(pipe)
    deeper, wider = random_wan_pipeline(layers=3), random_wan_pipeline(head_dim=16)
    for other, message in (
        (deeper, "layers: measured 2 layers, here 3 layers"),
        (wider, "head_dim: measured 12, here 16"),
        (random_wan_pipeline("vace"), "transformers: measured .*here .*WanVACETransformer3DModel"),
        (random_wan_pipeline("t2v-2.2"), "transformers: measured"),
    ):
        with pytest.raises(ValueError, match=message):
            sparsediff.enable(other, "paro_attention", calibration=calibration)
        assert_stock(other)
    enabled = sparsediff.enable(wider, "lite_attention")
    with pytest.raises(ValueError, match="head_dim"):
        sparsediff.enable(wider, "paro_attention", calibration=calibration)
    assert enabled.enabled, "what was enabled before stays so"


@pytest.mark.parametrize("method", METHODS[:2], ids=lambda m: m.name)
def test_another_size_is_refused_in_the_run_and_the_pipeline_goes_on(pipe, measured, method):
    calibration, _ = measured[method]
    stock = generate(pipe)
    with sparsediff.enable(pipe, method, calibration=calibration) as handle:
        expected = generate(pipe)
        with pytest.raises(ValueError, match="measured on 5x8x8 latent tokens and this run has"):
            generate(pipe, height=144)
        assert torch.equal(generate(pipe), expected)
        assert handle.report().density < 1
    assert_stock(pipe)
    assert torch.equal(generate(pipe), stock)


def test_a_calibration_for_any_size_serves_any(pipe, measured):
    calibration, _ = measured[METHODS[2]]
    with sparsediff.enable(pipe, METHODS[2], calibration=calibration) as handle:
        generate(pipe, height=144, num_inference_steps=7)
        assert handle.report().density < 1


def test_a_fine_tune_and_a_lora_of_the_same_layout_pass(measured):
    calibration, _ = measured[METHODS[0]]
    other = random_wan_pipeline(seed=7)
    with sparsediff.enable(other, "paro_attention", calibration=calibration) as handle:
        generate(other)
        assert handle.report().density < 1
    peft = pytest.importorskip("peft")
    other.transformer.add_adapter(
        peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    )
    with sparsediff.enable(other, "paro_attention", calibration=calibration) as handle:
        generate(other)
        assert handle.report().density < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("auto", PROMPTS), "auto measures nothing beforehand; enable it as it is"),
        (("paro_attention", []), "prompts must be a list of at least one prompt"),
        (("paro_attention", "a circle"), "prompts must be a list of at least one prompt"),
        (("paro", PROMPTS), "did you mean 'paro_attention'"),
    ],
)
def test_impossible_requests_are_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(pipe, *arguments[:1], prompts=arguments[1])
    assert_stock(pipe)


def test_what_is_in_use_or_no_pipeline_is_refused_at_the_door(measured):
    pipe = random_wan_pipeline()
    for target in (pipe, pipe.transformer):
        with sparsediff.enable(target, "lite_attention") as handle:
            with pytest.raises(
                ValueError, match=r"pipeline is enabled.* sparsediff\.disable\(pipe\)"
            ):
                run(pipe, METHODS[0])
            assert handle.enabled
    with pytest.raises(TypeError, match="give it the pipeline, not a bare WanTransformer3DModel"):
        run(pipe.transformer, METHODS[0])
    with pytest.raises(ValueError, match=r"call must not hold prompt, output_type: calibrate\(\)"):
        run(pipe, METHODS[0], call={**CALL, "output_type": "np", "prompt": "x"})


def test_a_pipeline_without_anything_supported_stays_dense_if_asked_to(measured):
    calibration, _ = measured[METHODS[0]]
    pipe = random_wan_pipeline()
    pipe.transformer.double()
    with sparsediff.enable(
        pipe, "paro_attention", calibration=calibration, on_unsupported="dense"
    ) as handle:
        assert "float64" in handle.unsupported["transformer"]


def test_a_run_in_which_nothing_can_be_sparse_is_refused(pipe):
    with (
        pytest.warns(RuntimeWarning, match="too few"),
        pytest.raises(ValueError, match="no attention call of this run can be sparse: 80 tokens"),
    ):
        run(pipe, METHODS[0], call={**CALL, "height": 64, "width": 64})
    assert_stock(pipe)


def test_prompts_of_two_sizes_are_refused(monkeypatch):
    pipe = random_wan_pipeline()
    real = type(pipe).__call__

    def grows(self, *args, **kwargs):
        kwargs["height"] = 144 if kwargs["prompt"] == PROMPTS[1] else 128
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe), "__call__", grows)
    with pytest.raises(ValueError, match="the prompts ran at several: 5x8x8, 5x9x8"):
        run(pipe, METHODS[1])


def test_a_bare_transformer_cannot_know_its_steps(measured):
    calibration, _ = measured[METHODS[0]]
    model = random_wan_pipeline().transformer
    for method in METHODS:
        measured_, _ = measured[method]
        with pytest.raises(ValueError, match=rf"{method.name} acts at shares .*num_steps=50"):
            sparsediff.enable(model, method, calibration=measured_)
        assert not model._forward_pre_hooks
    sparsediff.enable(model, "lite_attention").disable()  # without a calibration it counts nothing
    x = torch.randn(1, 16, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    with sparsediff.enable(model, METHODS[0], calibration=calibration, num_steps=3) as handle:
        with torch.no_grad():
            model(x, torch.tensor([500.0]), torch.zeros(1, 16, 32))
        assert handle.report().density < 1
        assert handle.report().num_steps == 3


def test_a_loop_of_ones_own_over_an_enabled_pipeline_says_its_steps(measured):
    calibration, _ = measured[METHODS[0]]
    pipe = random_wan_pipeline()
    call = torch.randn(1, 16, 5, 16, 16), torch.tensor([500.0]), torch.zeros(1, 16, 32)
    with sparsediff.enable(pipe, METHODS[0], calibration=calibration) as handle:
        with torch.no_grad(), pytest.raises(ValueError, match=r"handle\.begin_generation"):
            pipe.transformer(*call)
        handle.begin_generation(3)
        with torch.no_grad():
            pipe.transformer(*call)
        assert handle.report().density < 1


def test_a_schedule_goes_beside_a_calibration(pipe, measured):
    calibration, _ = measured[METHODS[0]]
    schedule = Schedule(dense_steps=1)
    with sparsediff.enable(pipe, METHODS[0], calibration=calibration, schedule=schedule) as handle:
        generate(pipe)
        assert [s.dense_share for s in handle.report().steps] == [1, 0, 0]
