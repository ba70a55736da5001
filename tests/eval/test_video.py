"""What is written can be read again, and looks as meant."""

import av
import pytest
import torch

from sparsediff.eval.video import (
    MARGIN,
    check_writable,
    contact_sheet,
    side_by_side,
    to_video_tensor,
    write_mp4,
)


@pytest.fixture
def clip():
    frames = torch.zeros(6, 34, 51, 3)
    frames[..., 0] = torch.linspace(0, 1, 6)[:, None, None]
    return frames


def test_mp4_is_h264_and_keeps_frames_and_colours(clip, tmp_path):
    write_mp4(tmp_path / "clip.mp4", clip, fps=10)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        frames = [torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    assert len(frames) == 6
    assert frames[0].shape == (34, 52, 3), "an odd width grows by one"
    reds = [f[..., 0].float().mean().item() / 255 for f in frames]
    assert reds == pytest.approx([i / 5 for i in range(6)], abs=0.04)


def test_side_by_side_puts_each_video_in_its_place(clip):
    both = side_by_side({"a": clip, "b": 1 - clip}, scale=2)
    assert both.shape[0] == 6
    left, right = both[3, 22 + 10, MARGIN + 10], both[3, 22 + 10, MARGIN * 2 + 102 + 10]
    assert torch.allclose(left, clip[3, 0, 0])
    assert torch.allclose(right, 1 - clip[3, 0, 0])
    with pytest.raises(ValueError, match="one shape"):
        side_by_side({"a": clip, "b": clip[:3]})


def test_a_contact_sheet_shows_first_and_last_frame(clip):
    sheet = contact_sheet({"a": clip}, title="t", columns=3)
    assert sheet.getpixel((MARGIN + 5, 30 + 20 + 5)) == (0, 0, 0)
    assert sheet.getpixel((MARGIN + 2 * (51 + MARGIN) + 5, 30 + 20 + 5)) == (255, 0, 0)


@pytest.mark.parametrize("shape", [(1, 6, 34, 51, 3), (6, 34, 51, 3), (1, 6, 3, 34, 51)])
def test_pipeline_outputs_become_frames_last_colours(shape):
    assert to_video_tensor(torch.full(shape, 2.0)).shape == (6, 34, 51, 3)
    assert to_video_tensor(torch.full(shape, 2.0)).max() == 1.0


def test_unwritable_places_are_named(tmp_path):
    check_writable(tmp_path / "new/clip.mp4")
    assert not (tmp_path / "new/clip.mp4").exists()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_writable(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"cannot write .*choose another"):
        check_writable(tmp_path / "file/clip.mp4")
    check_writable(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"
