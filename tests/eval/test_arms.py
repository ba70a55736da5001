"""Arms are read as people type them, and leave the pipeline as it was."""

import pytest
import torch

import sparsediff
from sparsediff.eval.arms import asked_density, check_arms, parse_arm, random_twin, sparse_arm
from sparsediff.eval.dense_backends import (
    EXACT,
    attention_backend,
    backend_seconds,
    best_backend,
    own_backend,
)
from sparsediff.eval.literals import parse_value, split_outside_brackets
from sparsediff.methods import METHODS, Auto
from sparsediff.testing import random_wan_pipeline

CALL = {
    "prompt": "a circle", "height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2,
    "max_sequence_length": 16, "output_type": "latent",
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    made = random_wan_pipeline()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize(
    ("text", "label", "name"),
    [
        ("auto", "auto", "auto"),
        ("auto:density=0.3", "auto density=0.3", "auto-density=0.3"),
        ("auto:density=0.25,dense_steps=3", "auto density=0.25, dense_steps=3", "auto-density=0.25-dense_steps=3"),
        (
            "lite_attention:threshold=-1,tile=(64, 64)",
            "lite_attention threshold=-1, tile=(64, 64)",
            "lite_attention-threshold=-1-tile=-64-64",
        ),
        ("random:density=0.2", "random density=0.2", "random-density=0.2"),
    ],
)  # fmt: skip
def test_arms_are_named_after_what_was_set(text, label, name):
    arm = parse_arm(text)
    assert (arm.label, arm.name) == (label, name)
    assert arm.role == ("random" if text.startswith("random") else "sparse")


def test_settings_reach_method_and_schedule():
    arm = parse_arm("draft_attention:sparsity=0.5,dense_layers=2")
    assert arm.method.sparsity == 0.5
    assert arm.schedule.dense_layers == 2
    assert arm.schedule.dense_above_sigma == arm.method.default_schedule().dense_above_sigma
    assert sparse_arm(Auto(density=0.2)).label == "auto density=0.2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("autoo", "did you mean 'auto'"),
        ("auto:densty=0.3", "did you mean 'density'"),
        ("auto:density", "--arm auto: takes NAME=VALUE"),
        ("random:denstiy=1", "random has no parameter 'denstiy'"),
        ("paro_attention", "has to be measured first"),
        ("auto:dense_steps=1.5", "use an int for a count"),
    ],
)
def test_mistakes_name_the_fix(text, message):
    with pytest.raises(ValueError, match=message):
        parse_arm(text)


def test_two_arms_alike_are_refused(pipe):
    with pytest.raises(ValueError, match=r"two arms are alike: auto-density=0.3"):
        check_arms(pipe, [parse_arm("auto:density=0.3"), parse_arm("auto:density=0.3")])


def test_what_cannot_run_is_refused_and_nothing_stays_enabled(pipe):
    other = random_wan_pipeline(head_dim=12)
    other.transformer.blocks[0].attn1.processor = object()
    with pytest.raises(ValueError, match="restore the stock attention processor"):
        check_arms(other, [parse_arm("auto")])
    check_arms(pipe, [parse_arm("auto")])
    assert sparsediff.disable(pipe) is None
    assert type(pipe.transformer.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"


def test_every_method_says_the_density_it_asks_for_or_that_it_asks_for_none():
    told = {name: asked_density(name, cls().parameters()) for name, cls in METHODS.items()}
    assert told["lite_attention"] is None
    assert told["auto"] == Auto().density
    assert told["adaspa"] == pytest.approx(0.2)
    assert all(d is None or 0 < d < 1 for d in told.values())
    assert asked_density("custom", {"budget": "row_top_p", "density": 0.9}) is None


def test_the_floor_of_a_method_is_random_blocks_at_its_density():
    arm = parse_arm("adaspa:sparsity=0.6,dense_steps=2")
    twin = random_twin(arm)
    assert twin.method.density == pytest.approx(0.4)
    assert twin.schedule == arm.schedule
    assert twin.role == "random"
    assert twin.label == "random as adaspa sparsity=0.6, dense_steps=2"
    assert random_twin(parse_arm("lite_attention")) is None
    assert random_twin(twin) is None


def test_a_backend_is_lent_and_given_back(pipe):
    def run():
        return pipe(**CALL, generator=torch.Generator().manual_seed(0)).frames

    stock, before = run(), own_backend(pipe)
    with attention_backend(pipe, "_native_math"):
        assert own_backend(pipe) == "_native_math"
        other = run()
    assert own_backend(pipe) == before
    assert torch.equal(run(), stock)
    torch.testing.assert_close(other, stock, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="knows no attention backend 'fast'; known: flash"), attention_backend(pipe, "fast"):  # fmt: skip
        pass


def test_exact_backends_are_known_to_diffusers():
    from diffusers.models.attention_dispatch import AttentionBackendName

    assert set(EXACT) <= {member.value for member in AttentionBackendName}


def test_a_cpu_has_one_dense_backend_and_says_so(pipe):
    backend, note = best_backend(pipe, CALL)
    assert backend is None
    assert "CPU" in note


def test_every_exact_backend_that_runs_here_is_timed(pipe):
    """On a CPU too, where the choice itself is never made; nothing is decoded, and whatever cannot run is left out."""
    seconds = backend_seconds(pipe, CALL)
    assert {None, "native"} <= seconds.keys() <= {None, *EXACT}
    assert "_flash_3" not in seconds
    assert min(seconds.values()) > 0


def test_values_and_lists_as_people_type_them():
    assert [parse_value(t) for t in ("3", "0.5", "true", "None", "(64, 64)", "row_top_k")] == [
        3, 0.5, True, None, (64, 64), "row_top_k",
    ]  # fmt: skip
    assert split_outside_brackets("a=(1, 2),b=[3,4], c=x") == ["a=(1, 2)", "b=[3,4]", "c=x"]
    assert split_outside_brackets("") == []
