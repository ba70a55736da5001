"""Writing what people look at: clips, clips side by side, and a sheet of frames."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN = 8
INK, PAPER = (24, 24, 27), (250, 250, 249)


def check_writable(path: Path, flag: str = "--out") -> None:
    """Create the folder of `path` and prove that a file can be written there.

    Raises:
        OSError: if not; the message says which path.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror}); choose another {flag}") from None
    if not existed:
        path.unlink()


def to_video_tensor(frames) -> Tensor:
    """Frames, or an image, as a pipeline returns them (`output_type="np"` or `"pt"`), as `float32 [F, H, W, 3]` in [0, 1].

    Raises:
        ValueError: not pictures of three colours.
    """
    x = torch.as_tensor(frames).detach().to("cpu", torch.float32)
    if x.ndim == 5:
        x = x[0]
    if x.ndim == 4 and x.shape[-1] != 3 and x.shape[1] == 3:
        x = x.movedim(1, -1)
    if x.ndim != 4 or x.shape[-1] != 3:
        raise ValueError(f"pictures [F, H, W, 3] are needed, got {list(x.shape)}")
    return x.clamp(0.0, 1.0)


def to_pixels(video: Tensor) -> np.ndarray:
    """Pictures in [0, 1] as files hold them: `uint8`, of the same shape."""
    return (video.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def require_same_shape(video: Tensor, reference: Tensor) -> None:
    """Refuse two videos that cannot be compared frame by frame.

    Raises:
        ValueError: not both `[F, H, W, 3]`, or of different length or size; the message says which.
    """
    if video.shape == reference.shape and video.ndim == 4 and video.shape[-1] == 3:
        return
    text = f"two videos [F, H, W, 3] of one shape are needed, got {list(video.shape)} and {list(reference.shape)}"
    if video.ndim == reference.ndim == 4 and video.shape[1:] == reference.shape[1:]:
        text += f": they have {len(video)} and {len(reference)} frames"
    raise ValueError(text)


def read_video(path: str | Path) -> tuple[Tensor, float]:
    """Frames `float32 [F, H, W, 3]` in [0, 1] of a file that ffmpeg reads, and frames a second.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no video in it.
    """
    import imageio.v3 as iio

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with warnings.catch_warnings():
        # imageio-ffmpeg leaves its pipes to the garbage collector where ffmpeg ends first.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            pixels = iio.imread(path, plugin="FFMPEG")
            fps = float(iio.immeta(path, plugin="FFMPEG")["fps"])
        except (OSError, RuntimeError, IndexError, KeyError) as error:
            said = str(error).strip().splitlines()
            problem = said[-1] if said else type(error).__name__
        else:
            problem = None
        if problem is not None:
            gc.collect()  # while nobody is warned of the pipes
            raise ValueError(
                f"cannot read a video from {path}: {problem}; give a file that ffmpeg reads, such as an .mp4"
            )
    return torch.from_numpy(pixels).float() / 255, fps


def write_mp4(path: str | Path, video: Tensor, fps: int) -> None:
    """Write `[F, H, W, 3]` in [0, 1] as H.264, which browsers play."""
    import imageio.v3 as iio

    path = Path(path)
    pixels = to_pixels(video)
    # H.264 with 4:2:0 colour needs even sizes.
    pixels = np.pad(
        pixels, ((0, 0), (0, pixels.shape[1] % 2), (0, pixels.shape[2] % 2), (0, 0)), mode="edge"
    )
    iio.imwrite(
        path, pixels, plugin="FFMPEG", fps=fps, codec="libx264", macro_block_size=1, quality=9
    )


def side_by_side(videos: dict[str, Tensor], *, scale: int = 1) -> Tensor:
    """Captioned videos next to one another: `[F, H', W', 3]`."""
    shapes = {tuple(v.shape) for v in videos.values()}
    if len(shapes) != 1:
        raise ValueError(f"videos side by side must have one shape, got {sorted(shapes)}")
    frames, height, width, _ = next(iter(shapes))
    width, height = width * scale, height * scale
    caption = 22
    canvas = Image.new(
        "RGB", (MARGIN + (width + MARGIN) * len(videos), height + caption + MARGIN), PAPER
    )
    draw = ImageDraw.Draw(canvas)
    for i, name in enumerate(videos):
        draw.text((MARGIN + i * (width + MARGIN), 5), name, fill=INK, font=font(13))
    blank = torch.from_numpy(np.array(canvas)).float() / 255
    out = blank.repeat(frames, 1, 1, 1)
    for i, video in enumerate(videos.values()):
        left = MARGIN + i * (width + MARGIN)
        big = video.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        out[:, caption : caption + height, left : left + width] = big
    return out


def contact_sheet(
    videos: dict[str, Tensor], *, title: str = "", columns: int = 6, scale: int = 1
) -> Image.Image:
    """A row of evenly spaced frames for every video, with its name above."""
    rows = []
    for name, video in videos.items():
        picks = torch.linspace(0, len(video) - 1, min(columns, len(video))).round().long()
        rows.append((name, to_pixels(video[picks])))
    height, width = rows[0][1].shape[1] * scale, rows[0][1].shape[2] * scale
    caption, head = 20, 30 if title else 0
    sheet = Image.new(
        "RGB",
        (
            MARGIN + max(len(r) for _, r in rows) * (width + MARGIN),
            head + len(rows) * (height + caption + MARGIN) + MARGIN,
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((MARGIN, 9), title, fill=INK, font=font(14))
    for i, (name, row) in enumerate(rows):
        top = head + i * (height + caption + MARGIN)
        draw.text((MARGIN, top + 3), name, fill=INK, font=font(12))
        for j, frame in enumerate(row):
            picture = Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (MARGIN + j * (width + MARGIN), top + caption))
    return sheet


def font(size: int) -> ImageFont.FreeTypeFont:
    """The font that Pillow carries."""
    return ImageFont.load_default(size)
