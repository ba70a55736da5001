"""What is measured of one call, on real pipelines."""

import contextlib
import inspect

import pytest
import torch
from families import hunyuan_video15

import sparsediff
from sparsediff.eval import resources
from sparsediff.eval.measure import _steps_of_bar, divergence, generate, warm_up
from sparsediff.testing import random_wan_pipeline

CALL = {
    "prompt": "a circle", "height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 3,
    "max_sequence_length": 16, "output_type": "np",
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    made = random_wan_pipeline()
    made.set_progress_bar_config(disable=True)
    return made


def run(pipe, *, seed=0, trajectory=True, **changes):
    generator = torch.Generator().manual_seed(seed)
    return generate(pipe, {**CALL, "generator": generator, **changes}, trajectory=trajectory)


@pytest.mark.parametrize("decode", [False, True])
def test_warming_up_decodes_where_it_is_asked_to(pipe, decode):
    decoded = []
    hook = pipe.vae.decoder.register_forward_hook(lambda *_: decoded.append(True))
    try:
        warm_up(pipe, {**CALL, "generator": torch.Generator().manual_seed(0)}, decode=decode)
    finally:
        hook.remove()
    assert bool(decoded) == decode


def test_measuring_changes_nothing(pipe):
    stock = pipe(**CALL, generator=torch.Generator().manual_seed(0)).frames[0]
    made = run(pipe)
    assert torch.equal(made.video, torch.from_numpy(stock).float())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (pipe.transformer, pipe.vae))


def test_the_parts_make_the_whole(pipe):
    made = run(pipe)
    parts = (made.text_seconds, made.denoiser_seconds, made.decode_seconds)
    assert all(p > 0 for p in parts)
    assert sum(parts) <= made.total_seconds
    assert sum(parts) > 0.5 * made.total_seconds
    assert len(made.step_seconds) == 3
    assert sum(made.step_seconds) == pytest.approx(made.denoiser_seconds)


def test_latents_after_every_step(pipe):
    made = run(pipe)
    final = pipe(
        **{**CALL, "output_type": "latent"}, generator=torch.Generator().manual_seed(0)
    ).frames
    assert made.latents.shape == (3, *final.shape)
    assert torch.equal(made.latents[-1], final.half())
    assert run(pipe, trajectory=False).latents is None


def test_start_and_clip_have_marks_of_their_own(pipe):
    one, same, other = run(pipe), run(pipe), run(pipe, seed=1)
    assert (one.latents_sha256, one.frames_sha256) == (same.latents_sha256, same.frames_sha256)
    assert one.latents_sha256 != other.latents_sha256
    assert one.frames_sha256 != other.frames_sha256
    with sparsediff.enable(pipe, schedule=sparsediff.Schedule()):
        sparse = run(pipe, height=128, width=128, num_frames=17)
    dense = run(pipe, height=128, width=128, num_frames=17)
    assert sparse.latents_sha256 == dense.latents_sha256, "the start does not depend on the method"
    assert sparse.frames_sha256 != dense.frames_sha256
    steps = divergence(sparse.latents, dense.latents)
    assert len(steps) == 3
    assert 0 < steps[0] < steps[-1] < 2


def test_divergence_is_a_relative_distance():
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert divergence(x, x) == (0.0, 0.0)
    assert divergence(1.5 * x, x) == pytest.approx((0.5, 0.5))
    with pytest.raises(ValueError, match="one shape"):
        divergence(x, x[:1])


def test_both_experts_are_timed():
    pipe = random_wan_pipeline("t2v-2.2")
    pipe.set_progress_bar_config(disable=True)
    seen = []
    for model in (pipe.transformer, pipe.transformer_2):
        model.register_forward_hook(lambda m, *_: seen.append(m))
    made = run(pipe, num_inference_steps=4)
    assert len({id(m) for m in seen}) == 2, "the boundary lies between the steps"
    assert all(s > 0 for s in made.step_seconds)


def test_nan_is_refused(pipe):
    broken = random_wan_pipeline()
    broken.set_progress_bar_config(disable=True)
    next(broken.transformer.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite values: try another dtype"):
        run(broken)
    assert not broken.transformer._forward_hooks


def test_warming_up_is_quick_and_leaves_the_bar_as_it_was(pipe):
    steps = []
    pipe.transformer.register_forward_hook(lambda *_: steps.append(1))
    config = dict(pipe._progress_bar_config)
    assert warm_up(pipe, {**CALL, "num_inference_steps": 50}) > 0
    assert len(steps) == 4, "two steps of two guidance branches"
    assert pipe._progress_bar_config == config
    pipe.transformer._forward_hooks.clear()


class Kernel:
    """What Linux tells of a process, where resetting its peak works, is forbidden, or is accepted in vain."""

    def __init__(self, folder, monkeypatch, resets):
        self.resets, self.held, self.peak = resets, 0, 0
        self.status, self.clear = folder / "status", folder / "clear_refs"
        monkeypatch.setattr(resources, "_STATUS", self.status)
        monkeypatch.setattr(resources, "_CLEAR", self)

    def write_text(self, text):
        if self.resets == "forbidden":
            raise PermissionError
        if self.resets == "works":
            self.peak = self.held
        self.tell()

    def hold(self, mebibytes):
        self.held = mebibytes
        self.peak = max(self.peak, mebibytes)
        self.tell()

    def tell(self):
        self.status.write_text(
            f"Name: x\nVmHWM:\t{self.peak << 10} kB\nVmRSS:\t{self.held << 10} kB\n"
        )


@pytest.mark.parametrize("resets", ["works", "forbidden", "in vain"])
def test_peak_memory_is_of_the_run_or_not_told(resets, tmp_path, monkeypatch):
    kernel = Kernel(tmp_path, monkeypatch, resets)
    memory = resources.PeakMemory(torch.device("cpu"))
    kernel.hold(900)
    kernel.hold(500)
    memory.start()
    kernel.hold(700)
    kernel.hold(600)
    assert memory.stop() == (700 << 20 if resets == "works" else None), "900 was before"
    memory.start()
    kernel.hold(1000)
    assert memory.stop() == 1000 << 20, "a new peak is this run's wherever"
    kernel.status.unlink()
    assert memory.stop() is None


def test_peak_memory_of_this_process():
    memory = resources.PeakMemory(torch.device("cpu"))
    held = resources._kibibytes("VmRSS")
    memory.start()
    x = torch.ones(64 << 18)  # 64 MiB
    peak = memory.stop()
    if peak is None:
        pytest.skip("this system does not tell a peak, or forgets none")
    assert peak - (held << 10) > 48 << 20
    del x


def test_steps_of_a_pipeline_without_a_callback_are_read_off_its_bar():
    (family,) = hunyuan_video15.FAMILIES
    pipe = family.pipeline()
    assert "callback_on_step_end" not in inspect.signature(pipe.__call__).parameters
    seen = []
    for enabled in (False, True):
        with (
            sparsediff.enable(pipe, density=0.2, block=32) if enabled else contextlib.nullcontext()
        ):
            before = vars(pipe).get("progress_bar")
            with _steps_of_bar(pipe, lambda *told: seen.append(told)):
                family.run(pipe, steps=3)
            assert vars(pipe).get("progress_bar") is before
    assert len(seen) == 6
