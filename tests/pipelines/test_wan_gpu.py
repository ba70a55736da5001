"""The Wan adapter on a CUDA device: `make gpu`."""

import contextlib
import json
import subprocess
import sys

import pytest
import torch

import sparsediff
from sparsediff import Auto, DraftAttention, LiteAttention, Schedule
from sparsediff.methods import METHODS, build_method
from sparsediff.state import RunState
from sparsediff.testing import random_wan_pipeline

pytestmark = [
    pytest.mark.gpu,
    # These clips are far too short for a GPU, and the library says so.
    pytest.mark.filterwarnings("ignore:sparsediff. .*too little work:RuntimeWarning"),
]

SPARSE = Schedule()
CALL = {
    "height": 256,
    "width": 256,
    "num_frames": 17,
    "num_inference_steps": 4,
    "guidance_scale": 3.0,
    "max_sequence_length": 16,
}
CLIP = {"prompt": "a small red circle moves left", **CALL}


@pytest.fixture
def pipe():
    return random_wan_pipeline(head_dim=64).to("cuda", torch.bfloat16)


def generate(pipe, **changes):
    pipe.set_progress_bar_config(disable=True)
    arguments = {
        **CLIP,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }
    return pipe(**{**arguments, **changes}).frames.float()


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_dense_is_bit_identical_and_disable_restores(pipe):
    stock = generate(pipe)
    with sparsediff.enable(pipe, schedule=Schedule(dense_steps=1.0)):
        assert torch.equal(generate(pipe), stock)
    assert torch.equal(generate(pipe), stock)


def test_every_block_through_the_kernel_is_within_rounding(pipe):
    stock = generate(pipe)
    with sparsediff.enable(pipe, LiteAttention(threshold=-1e9)) as handle:
        out = generate(pipe)
        report = handle.report()
    assert report.dense_calls == {}
    assert set(report.backends) <= {"triton", "triton_tma", "gluon", "gluon_pairs"}
    assert relative(out, stock) < 0.02


@pytest.mark.parametrize(
    "method",
    [
        Auto(density=0.3, block=64),
        Auto(density=0.3, block=128),
        LiteAttention(threshold=-2.0),
        DraftAttention(),
    ],
    ids=["auto64", "auto128", "lite", "draft"],
)
def test_sparse_runs_are_finite_and_repeatable(pipe, method):
    with sparsediff.enable(pipe, method, schedule=SPARSE) as handle:
        first = generate(pipe)
        assert torch.equal(generate(pipe), first)
        report = handle.report()
    assert first.isfinite().all()
    assert report.density < 1.0
    assert set(report.backends) <= {"triton", "triton_tma", "gluon", "gluon_pairs"}
    assert all(step.seconds > 0 for step in report.steps)


def test_runs_too_short_for_a_gpu_are_said_to_be(pipe):
    with sparsediff.enable(pipe, Auto(block=64), schedule=SPARSE) as handle:
        with pytest.warns(RuntimeWarning, match="too little work"):
            generate(pipe)
        assert handle.report().estimated_speedup is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_with_inductor(pipe):
    with sparsediff.enable(pipe, Auto(block=64), schedule=SPARSE):
        expected = generate(pipe)
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
        assert relative(generate(pipe), expected) < 0.05
    torch._dynamo.reset()


def test_model_offload(pipe):
    with sparsediff.enable(pipe, Auto(block=64), schedule=SPARSE) as handle:
        expected = generate(pipe)
        pipe.enable_model_cpu_offload()
        for _ in range(2):
            assert torch.equal(generate(pipe), expected)
            assert handle.report().density < 0.5


def test_group_offload(pipe):
    with sparsediff.enable(pipe, Auto(block=64), schedule=SPARSE) as handle:
        expected = generate(pipe)
        pipe.transformer.enable_group_offload(
            onload_device=torch.device("cuda"),
            offload_device=torch.device("cpu"),
            offload_type="leaf_level",
        )
        assert torch.equal(generate(pipe), expected)
        assert handle.report().density < 0.5


# What makes each method skip something in a clip this small; who is not named runs as it comes.
PARAMETERS = {
    "lite_attention": {"threshold": -2.0},
    "custom": {"windows": ((1, 8, 8), "HWF"), "refresh": 1, "vote_threshold_log2": -4.0},
    "sparse_vdit": {"costs": (1.0, 0.0, 0.3, 0.35, 0.4), "epsilon": 1.0, "bins": 2},
    "paro_attention": {"bins": 2},
}


def ready(pipe, name):
    """The method, calibrated on this very clip if it must be."""
    params = PARAMETERS.get(name, {})
    if not getattr(METHODS[name], "needs_calibration", False):
        return build_method(name, **params)
    calibration = sparsediff.calibrate(
        pipe, name, [CLIP["prompt"]], call=CALL, progress=False, **params
    )
    return build_method(name).calibrated(calibration)


@contextlib.contextmanager
def waiting_raises():
    """Whatever makes the host wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.filterwarnings("ignore:sparse_vdit reached a density")
@pytest.mark.parametrize("name", METHODS)
def test_no_attention_call_waits_for_the_device(pipe, monkeypatch, name):
    """Not one of a whole generation, but for the first, which moves orders and tables to the device for good."""
    method, real, calls = ready(pipe, name), RunState.attend, []

    def guarded(self, *arguments):
        calls.append(arguments[0])
        with waiting_raises():
            return real(self, *arguments)

    with sparsediff.enable(pipe, method, schedule=Schedule(dense_steps=1)) as handle:
        generate(pipe)
        monkeypatch.setattr(RunState, "attend", guarded)
        generate(pipe)
        report = handle.report()
    assert len(calls) == 4 * 2 * 2, "steps, guidance branches, layers"
    assert report.density < 1


# A process of its own: what another test has compiled would hide what this one's warming up forgets.
COMPILED_LATER = """
import json, sys, warnings
import torch, triton
from sparsediff.eval.arms import sparse_arm
from sparsediff.testing import random_wan_pipeline

warnings.simplefilter("ignore", RuntimeWarning)
call = json.loads(sys.argv[2]) | {"num_inference_steps": 20, "output_type": "latent"}
pipe = random_wan_pipeline(head_dim=64).to("cuda", torch.bfloat16)
arm = sparse_arm(sys.argv[1])
arm.warm_up(pipe, call)
compiled = []
triton.knobs.runtime.jit_post_compile_hook = lambda **said: compiled.append(said["repr"])
with arm.entered(pipe) as handle:
    pipe(**call)
    print(json.dumps([compiled, handle.report().density]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["auto", "adaspa", "draft_attention", "lite_attention"])
def test_nothing_compiles_after_warming_up(method):
    run = subprocess.run(
        [sys.executable, "-c", COMPILED_LATER, method, json.dumps(CLIP)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    compiled, density = json.loads(run.stdout.splitlines()[-1])
    assert density < 1
    assert compiled == []
