"""What `enable` refuses, and what a refusal leaves behind: nothing."""

import inspect
import json
import subprocess
import sys

import pytest
import torch

import sparsediff
from sparsediff import Auto, LiteAttention, Schedule
from sparsediff.testing import random_wan_pipeline


@pytest.fixture(scope="module")
def pipe():
    return random_wan_pipeline()


def processors(pipe):
    return [m.processor for m in pipe.transformer.modules() if hasattr(m, "processor")]


def test_the_signature_is_the_promised_one():
    parameters = inspect.signature(sparsediff.enable).parameters
    assert list(parameters) == [
        "pipe_or_transformer", "method", "schedule", "calibration", "on_unsupported", "num_steps",
        "method_params",
    ]  # fmt: skip
    assert parameters["method"].default == "auto"
    assert parameters["on_unsupported"].default == "raise"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "atuo"}, "did you mean 'auto'"),
        ({"method": "auto", "densty": 0.3}, "did you mean 'density'"),
        ({"method": "auto", "density": 2.0}, r"density must be a share in \(0, 1\]"),
        ({"schedule": 0.2}, "must be a sparsediff.Schedule"),
        ({"calibration": {}}, "takes no calibration"),
        ({"on_unsupported": "warn"}, "'raise' or 'dense'"),
    ],
)
def test_bad_arguments_patch_nothing(pipe, arguments, message):
    before = processors(pipe)
    with pytest.raises((ValueError, TypeError), match=message):
        sparsediff.enable(pipe, **arguments)
    assert processors(pipe) == before
    assert not pipe.transformer._forward_pre_hooks


def test_unknown_models_are_refused_with_the_list():
    from diffusers import DiTTransformer2DModel

    other = DiTTransformer2DModel(
        num_layers=1, attention_head_dim=8, num_attention_heads=1, norm_num_groups=1, sample_size=4, in_channels=4
    )  # fmt: skip
    with pytest.raises(
        ValueError,
        match=r"no adapter for DiTTransformer2DModel; supported: .*WanTransformer3DModel",
    ):
        sparsediff.enable(other)
    handle = sparsediff.enable(other, on_unsupported="dense")
    assert "no adapter for DiTTransformer2DModel" in handle.summary()
    with pytest.raises(ValueError, match="has no transformer"):
        sparsediff.enable(object())


def test_one_unsupported_expert_leaves_both_alone():
    pipe = random_wan_pipeline("t2v-2.2")

    class CustomProcessor:
        def __call__(self, attn, hidden_states):
            return hidden_states

    pipe.transformer_2.blocks[1].attn1.processor = CustomProcessor()
    with pytest.raises(
        ValueError, match=r"transformer_2.blocks.1.attn1 uses CustomProcessor.*stock"
    ):
        sparsediff.enable(pipe)
    assert type(pipe.transformer.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"
    handle = sparsediff.enable(pipe, on_unsupported="dense")
    assert list(handle.unsupported) == ["transformer_2"]
    assert type(pipe.transformer.blocks[0].attn1.processor).__name__ == "SparseWanAttnProcessor"
    handle.disable()


def test_a_refused_change_keeps_the_running_settings(pipe):
    with sparsediff.enable(pipe, "lite_attention") as handle:
        with pytest.raises(ValueError, match="density"):
            sparsediff.enable(pipe, density=-1.0)
        assert handle.enabled
        assert handle.method == LiteAttention()


def test_a_fraction_of_steps_needs_a_pipeline(pipe):
    with pytest.raises(
        ValueError, match=r"enable the pipeline, .*num_steps=50.* dense_above_sigma"
    ):
        sparsediff.enable(pipe.transformer, schedule=Schedule(dense_steps=0.2))
    sparsediff.enable(pipe.transformer, schedule=Schedule(dense_steps=2)).disable()
    sparsediff.enable(pipe.transformer, schedule=Schedule(dense_steps=0.2), num_steps=5).disable()


@pytest.mark.parametrize(
    "method", [sparsediff.AdaSpa(), sparsediff.Custom(refresh=(0.2, 0.6))], ids=lambda m: m.name
)
def test_acting_at_shares_of_the_steps_needs_a_pipeline_or_their_number(pipe, method):
    model, schedule = pipe.transformer, Schedule(dense_steps=1)
    with pytest.raises(ValueError, match=rf"{method.name} acts at shares .*num_steps=50"):
        sparsediff.enable(model, method, schedule=schedule)
    assert not model._forward_pre_hooks
    sparsediff.enable(pipe, method, schedule=schedule).disable()
    sparsediff.enable(model, sparsediff.AdaSpa(search=(0.2,)), schedule=schedule).disable()
    sparsediff.enable(model, sparsediff.Custom(refresh=3), schedule=schedule).disable()
    call = torch.randn(1, 16, 5, 16, 16), torch.zeros(1, 16, 32)
    with sparsediff.enable(model, method, schedule=schedule, num_steps=5) as handle:
        for _ in range(2):
            for t in (900.0, 700.0, 500.0, 300.0, 100.0):
                with torch.no_grad():
                    model(call[0], torch.tensor([t]), call[1])
            report = handle.report()
            assert report.num_steps == 5, "every generation, not the first alone"
            assert [s.step for s in report.steps] == [0, 1, 2, 3, 4]
        searched = handle.states[0]._slots.popitem()[1][0].refreshed_at
    assert searched == 3, "the second search, at 0.6 of the steps"


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "9"])
def test_what_is_no_number_of_steps_is_refused(pipe, steps):
    with pytest.raises(ValueError, match=rf"num_steps must be a whole number >= 1, got {steps!r}"):
        sparsediff.enable(pipe.transformer, num_steps=steps)
    with (
        sparsediff.enable(pipe.transformer) as handle,
        pytest.raises(ValueError, match="num_steps"),
    ):
        handle.begin_generation(steps)


def test_the_wrapper_has_the_signature_of_what_it_wraps(pipe):
    stock = pipe.transformer.blocks[0].attn1.processor
    expected = inspect.signature(stock.__call__)
    with sparsediff.enable(pipe):
        assert inspect.signature(pipe.transformer.blocks[0].attn1.processor.__call__) == expected
        assert type(pipe.transformer.blocks[0].attn2.processor) is type(stock), (
            "cross-attention stays stock"
        )


def test_a_processor_that_others_replaced_meanwhile_is_left_alone(pipe):
    handle = sparsediff.enable(pipe)
    module = pipe.transformer.blocks[0].attn1
    stock, theirs = module.processor.original, object()
    module.processor = theirs
    with pytest.warns(RuntimeWarning, match="replaced after"):
        handle.disable()
    assert module.processor is theirs
    module.processor = stock


def test_reports_are_typed_and_survive_json(pipe):
    pipe.set_progress_bar_config(disable=True)
    with sparsediff.enable(
        pipe, Auto(block=64, density=0.4), schedule=Schedule(dense_steps=1)
    ) as handle:
        assert "nothing has run yet" in handle.summary()
        pipe(
            "a",
            height=128,
            width=128,
            num_frames=17,
            num_inference_steps=3,
            max_sequence_length=16,
            output_type="latent",
        )
    report = handle.report()  # still there after disable
    assert report.num_steps == 3
    assert [s.dense_share for s in report.steps] == [1.0, 0.0, 0.0]
    assert all(s.seconds > 0 for s in report.steps)
    assert report.dense_calls == {"schedule: first steps": 4}
    assert report.calls == 12
    by_hand = sum(layer.density * layer.calls for layer in report.layers) / report.calls
    assert report.density == pytest.approx(by_hand)
    assert report.density == pytest.approx(sum(s.density for s in report.steps) / 3)
    assert all(len(layer.heads) == 2 for layer in report.layers)
    assert json.loads(report.to_json())["density"] == report.density
    assert report.backends
    assert report.estimated_speedup > 0
    text = handle.summary()
    assert "schedule: first steps" in text
    assert "5x8x8" in text


def test_state_stays_small(pipe):
    pipe.set_progress_bar_config(disable=True)
    with sparsediff.enable(pipe, Auto(block=64), schedule=Schedule()) as handle:
        for _ in range(3):
            pipe(
                "a",
                height=128,
                width=128,
                num_frames=17,
                num_inference_steps=2,
                max_sequence_length=16,
                output_type="latent",
            )
        blocks = 5
        bitmaps = 2 * 2 * 2 * blocks * 1  # branches, layers, heads, rows, bytes a row
        lists = 2 * 2 * 2 * blocks * blocks * 4
        assert handle.states[0].state_bytes() == bitmaps + lists


def test_list_methods_names_what_enable_takes(pipe):
    for name, line in sparsediff.list_methods().items():
        assert line
        if name in ("paro_attention", "sparse_vdit"):
            with pytest.raises(
                ValueError, match=rf"calibrate --method {name} .* calibration=FOLDER"
            ):
                sparsediff.enable(pipe, name)
        else:
            sparsediff.enable(pipe, name).disable()


def test_import_is_cheap_and_needs_no_heavy_library():
    code = (
        "import sys, sparsediff; sparsediff.__version__; "
        "print([m for m in ('torch', 'triton', 'diffusers', 'gradio', 'torchmetrics') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout.strip()
        == "[]"
    )


def test_enable_works_without_optional_libraries():
    code = """
import sys
for missing in ("triton", "gradio", "torchmetrics", "matplotlib", "skimage"):
    sys.modules[missing] = None
import sparsediff
from sparsediff.testing import random_wan_pipeline
pipe = random_wan_pipeline()
with sparsediff.enable(pipe, schedule=sparsediff.Schedule()) as handle:
    pipe("a", height=128, width=128, num_frames=17, num_inference_steps=1, max_sequence_length=16, output_type="latent")
print(round(handle.report().density, 2))
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert float(out.stdout) < 0.5


def test_every_public_name_exists_and_is_documented():
    for name in sparsediff.__all__:
        assert getattr(sparsediff, name).__doc__, name
    assert set(sparsediff.__all__) == set(sparsediff._EXPORTS)
    with pytest.raises(AttributeError, match="no attribute 'enabel'"):
        sparsediff.enabel  # noqa: B018
    assert sparsediff.kernels.block_sparse_attention.__doc__
