"""`sparsediff demo --model FOLDER`: pipelines of other families, saved and loaded, served whole."""

import dataclasses
import re

import pytest
import torch
from PIL import Image
from whole_pipelines import whole_flux, whole_hunyuan_video

from sparsediff.demo.jobs import Job
from sparsediff.demo.meters import Phase
from sparsediff.demo.settings import Settings
from sparsediff.demo.studio import Studio
from sparsediff.demo.work import Result, comparison, shared
from sparsediff.eval.captured import Capture
from sparsediff.eval.compare import Request
from sparsediff.eval.measure import generate, sha256
from sparsediff.eval.results import load_results

# Few words: they stay exact, and above a density of 0.65 a CPU runs dense.
SIZES = {
    "video": {"steps": 3, "height": 128, "width": 128, "frames": 9, "text_tokens": 64},
    "picture": {"steps": 3, "height": 64, "width": 64, "text_tokens": 20},
}


@pytest.fixture(scope="module", params=list(SIZES))
def studio(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    pipe = whole_flux() if request.param == "picture" else whole_hunyuan_video()
    pipe.save_pretrained(folder)
    studio = Studio(str(folder), device="cpu", defaults=SIZES[request.param])
    studio.start_loading()
    studio.wait_until_loaded()
    yield studio
    studio.close()


@pytest.fixture(scope="module")
def made(studio):
    """What one comparison tells: phases, and its result."""
    settings = Settings(
        request=Request(prompt="a red circle"), parameters={"density": 0.25, "block": 32}
    )
    events = list(Job(comparison(studio, settings)).events())
    return [e for e in events if isinstance(e, Phase)], next(e for e in events if isinstance(e, Result))  # fmt: skip


def test_the_meters_move_and_the_results_are_whole(studio, made):
    phases, result = made
    for kind in ("dense", "sparse"):
        steps = [p.points[-1].step for p in phases if p.id == kind and p.points]
        assert sorted(set(steps)) == [1, 2, 3]
    results = load_results(result.folder)
    (arm,) = results.others
    frames = SIZES["video"]["frames"] if studio.served.video else 1
    assert arm.clips[0].shape[0] == frames
    assert arm.clips[0].metrics["psnr"] > 5
    assert Capture.load(results.capture_path(arm)).calls
    assert '"masks":[{' in result.report.read_text()


def test_what_is_handed_out_is_what_was_made(studio, made):
    result = made[1]
    if studio.served.video:
        assert result.dense.read_bytes()[4:8] == result.sparse.read_bytes()[4:8] == b"ftyp"
        return
    stock = generate(studio.pipe, result.settings.request.arguments())
    picture = torch.frombuffer(bytearray(Image.open(result.dense).tobytes()), dtype=torch.uint8)
    assert torch.equal(picture.view(64, 64, 3), (stock.video[0] * 255).round().to(torch.uint8))


def test_the_python_lines_make_the_same(studio, made):
    result, names = made[1], {}
    exec(shared(studio, result.settings).python, names)
    found = torch.as_tensor(names["video"][0] if studio.served.video else names["images"])
    (arm,) = load_results(result.folder).others
    assert sha256(found) == arm.clips[0].frames_sha256


def test_what_its_call_does_not_take_is_refused(studio):
    request = studio.limits.check(Request(prompt="a star"))
    with pytest.raises(ValueError, match=re.escape("This model takes no negative prompt")):
        studio.limits.check(dataclasses.replace(request, negative_prompt="a circle"))
    if not studio.served.video:
        assert request.frames is None
        with pytest.raises(ValueError, match="This model takes no frames"):
            studio.limits.check(dataclasses.replace(request, frames=5))
        with pytest.raises(ValueError, match=r"^128 x 96 pixels are too much for this page"):
            studio.limits.check(dataclasses.replace(request, width=128, height=96))
        with pytest.raises(ValueError, match="FluxPipeline takes no frames"):
            Studio(studio.model, defaults={"frames": 5})
