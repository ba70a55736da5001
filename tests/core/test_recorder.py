"""What a report says of time and of layers, on a real pipeline."""

import pytest
import torch

import sparsediff
from sparsediff.testing import random_wan_pipeline

CALL = {
    "prompt": "a circle", "height": 128, "width": 128, "num_frames": 17, "num_inference_steps": 4,
    "max_sequence_length": 16, "output_type": "latent",
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    made = random_wan_pipeline()
    made.set_progress_bar_config(disable=True)
    return made


def report(pipe, *, timed, **settings):
    with sparsediff.enable(pipe, **settings) as handle:
        handle.recorder.timed = timed
        pipe(**CALL, generator=torch.Generator().manual_seed(0))
        return handle.report()


def test_parts_are_nested_in_one_another(pipe):
    found = report(pipe, timed=True, method="auto", schedule=sparsediff.Schedule(dense_steps=1))
    denoiser = sum(step.seconds for step in found.steps)
    assert 0 < found.mask_seconds < found.attention_seconds < denoiser
    dense = report(pipe, timed=True, schedule=sparsediff.Schedule(dense_steps=1.0))
    assert dense.mask_seconds == 0
    assert 0 < dense.attention_seconds < sum(step.seconds for step in dense.steps)


def test_every_generation_is_timed_afresh(pipe):
    with sparsediff.enable(pipe, schedule=sparsediff.Schedule(dense_steps=1)) as handle:
        handle.recorder.timed = True
        parts = []
        for _ in range(2):
            pipe(**CALL, generator=torch.Generator().manual_seed(0))
            parts.append(len(handle.recorder._parts["attention"]))
    assert parts[0] == parts[1] > 0


def test_nobody_is_timed_unasked(pipe):
    found = report(pipe, timed=False, schedule=sparsediff.Schedule(dense_steps=1))
    assert found.attention_seconds is None
    assert found.mask_seconds is None


def test_layers_say_their_density_at_every_step(pipe):
    found = report(
        pipe, timed=False, method="auto", schedule=sparsediff.Schedule(dense_steps=1, dense_layers=1)
    )  # fmt: skip
    first, second = found.layers
    assert first.steps == (1.0,) * 4
    assert second.steps[0] == 1.0
    assert all(d < 1 for d in second.steps[1:])
    for i, step in enumerate(found.steps):
        assert step.density == pytest.approx((first.steps[i] + second.steps[i]) / 2)
    assert second.density == pytest.approx(sum(second.steps) / 4)
    assert found.tokens == 5 * 8 * 8
    assert 0 < found.attention_share < 1
