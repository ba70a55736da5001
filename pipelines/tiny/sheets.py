"""Pictures of clips for people: contact sheets and animations, captions below the frames."""

from __future__ import annotations

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

CAPTION_HEIGHT = 26


def _pixels(video: Tensor) -> Tensor:
    return ((video.clamp(-1, 1) + 1) * 127.5).round().byte()


def sheet(
    video: Tensor, captions: list[str], path: Path, *, frames: int = 5, columns: int = 2
) -> None:
    """A PNG with `frames` frames of each clip of `[B, 3, F, H, W]` side by side and its caption below."""
    clips, _, length, height, width = video.shape
    index = [round(i * (length - 1) / (frames - 1)) for i in range(frames)]
    rows = -(-clips // columns)
    cell = (frames * (width + 2) + 8, height + CAPTION_HEIGHT)
    picture = Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
    draw = ImageDraw.Draw(picture)
    for i, (clip, caption) in enumerate(zip(_pixels(video), captions, strict=True)):
        left, top = (i % columns) * cell[0], (i // columns) * cell[1]
        for j, frame in enumerate(index):
            tile = Image.fromarray(clip[:, frame].permute(1, 2, 0).numpy())
            picture.paste(tile, (left + j * (width + 2), top))
        text = "\n".join(textwrap.wrap(caption, width=frames * width // 6)[:2])
        draw.multiline_text((left + 2, top + height + 1), text, fill="black", spacing=0)
    picture.save(path, optimize=True)


def animation(
    video: Tensor, captions: list[str], path: Path, *, columns: int = 4, fps: int = 12
) -> None:
    """A GIF of all clips running together, captions below."""
    clips, _, length, height, width = video.shape
    rows, cell_height = -(-clips // columns), height + 3 * 12
    base = Image.new("RGB", (columns * (width + 4), rows * cell_height), "white")
    draw = ImageDraw.Draw(base)
    for i, caption in enumerate(captions):
        text = "\n".join(textwrap.wrap(caption, width=width // 6)[:3])
        draw.multiline_text(
            ((i % columns) * (width + 4) + 1, (i // columns) * cell_height + height),
            text,
            "black",
            spacing=0,
        )
    pages = []
    for frame in range(length):
        page = base.copy()
        for i, clip in enumerate(_pixels(video)):
            tile = Image.fromarray(clip[:, frame].permute(1, 2, 0).numpy())
            page.paste(tile, ((i % columns) * (width + 4), (i // columns) * cell_height))
        pages.append(page)
    palette = pages[0].quantize(255, method=Image.Quantize.MEDIANCUT)
    pages = [p.quantize(palette=palette, dither=Image.Dither.NONE) for p in pages]
    pages[0].save(
        path, save_all=True, append_images=pages[1:], duration=1000 // fps, loop=0, optimize=True
    )
