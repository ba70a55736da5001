"""The Wan adapter on a CUDA device: `make gpu`."""

import pytest
import torch

import sparsediff
from sparsediff import Auto, DraftAttention, LiteAttention, Schedule
from sparsediff.testing import random_wan_pipeline

pytestmark = [
    pytest.mark.gpu,
    # These clips are far too short for a GPU, and the library says so.
    pytest.mark.filterwarnings("ignore:sparsediff. .*too little work:RuntimeWarning"),
]

SPARSE = Schedule()


@pytest.fixture
def pipe():
    return random_wan_pipeline(head_dim=64).to("cuda", torch.bfloat16)


def generate(pipe, **changes):
    pipe.set_progress_bar_config(disable=True)
    arguments = {
        "prompt": "a small red circle moves left",
        "height": 256,
        "width": 256,
        "num_frames": 17,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "max_sequence_length": 16,
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
    assert set(report.backends) <= {"triton", "gluon"}
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
    assert set(report.backends) <= {"triton", "gluon"}
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


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_no_host_synchronisation_while_denoising(pipe):
    """After the first step of a run, attention calls must not wait for the device."""
    from sparsediff.kernels.attention import attend_blocks

    with sparsediff.enable(pipe, Auto(block=64), schedule=SPARSE) as handle:
        generate(pipe)
        state = handle.states[0]
        slot = next(iter(state._slots.values()))[0]
        q, k, v = (
            torch.randn(1, 1280, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)
        )
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            keep = handle.method.keep_blocks(q, k, _site(state, handle))
            mask = slot.store(keep, torch.zeros_like(keep[0, 0]), (64, 64), 1280)
            vote = attend_blocks(q, k, v, mask, vote_threshold=-2.0).vote
            slot.store(vote, torch.zeros_like(keep[0, 0]), (64, 64), 1280, want_mask=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _site(state, handle):
    return sparsediff.AttentionSite(
        layer=0,
        num_layers=2,
        step=1,
        num_steps=4,
        sigma=0.5,
        branch="cond",
        grid=sparsediff.TokenGrid.video(5, 16, 16),
    )
