"""Pipelines that make images are measured as clips of one frame."""

import pytest
import torch
from families import flux
from whole_pipelines import whole_flux

from sparsediff.eval.compare import Request, compare
from sparsediff.eval.measure import generate, makes_video
from sparsediff.eval.report import write_report
from sparsediff.eval.runner import Options, evaluate
from sparsediff.eval.video import read_video, to_video_tensor
from sparsediff.testing import random_wan_pipeline

CALL = {
    "height": 32,
    "width": 32,
    "num_inference_steps": 3,
    "max_sequence_length": flux.TEXT,
    "guidance_scale": 3.0,
}
METHOD = "auto:density=0.5,block=32,dense_steps=1"


@pytest.fixture(scope="module")
def pipe():
    return whole_flux()


def test_an_image_is_one_frame(pipe):
    call = {"prompt": "a circle", "output_type": "np", **CALL}
    stock = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    made = generate(pipe, {**call, "generator": torch.Generator().manual_seed(0)})
    assert made.video.shape == (1, 32, 32, 3)
    assert torch.equal(made.video, torch.from_numpy(stock).float())
    assert len(made.step_seconds) == 3


def test_an_evaluation_leaves_out_what_needs_motion(pipe, tmp_path):
    results = evaluate(
        pipe,
        ["a circle", "a star"],
        [METHOD],
        folder=tmp_path,
        call=CALL,
        options=Options(progress=False),
    )
    dense, arm = results.arms
    for clip in arm.clips:
        assert clip.metrics["psnr"] > 5
        assert not {"flicker", "warping_error"} & clip.metrics.keys()
        assert 0.4 < clip.density < 0.9
        assert len(read_video(tmp_path / clip.video)[0]) == 1
    assert {c.prompt for c in dense.clips} == {"a circle", "a star"}
    assert any("one frame" in note for note in arm.notes)
    assert "a circle" in write_report(tmp_path).read_text()


def test_one_comparison(pipe, tmp_path):
    request = Request(prompt="a circle", steps=3, height=32, width=32, text_tokens=flux.TEXT)
    comparison, dense, sparse = compare(pipe, request, density=0.5, block=32)
    assert dense.shape == sparse.shape == (1, 32, 32, 3)
    assert comparison.report.density < 1


def test_who_makes_videos(pipe):
    assert makes_video(random_wan_pipeline())
    assert not makes_video(pipe)


def test_layers_with_transparency_are_refused():
    with pytest.raises(ValueError, match=r"pictures \[F, H, W, 3\] are needed, got \[1, 8, 8, 4\]"):
        to_video_tensor(torch.zeros(1, 8, 8, 4))
