"""Pictures of captured masks and of densities, for people who would rather look.

```python
seen = Capture.load("masks.safetensors")
call = seen.find(layer="transformer.blocks.3.attn1", step=4)[0]
mask_map(call, head=0).save("mask.png")
attended_frames(call, (2, 7, 9), head=0, video=read_video("clip.mp4")[0]).save("attended.png")
density_maps(handle.report()).save("density.png")
```
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from sparsediff.eval.captured import CapturedCall
from sparsediff.eval.video import INK, MARGIN, PAPER, font, to_pixels
from sparsediff.report import RunReport

# Blue to yellow with steady lightness (cividis): as clear without colour vision as with it, and in grey.
RAMP = (
    (0, 34, 78), (18, 53, 112), (59, 73, 108), (87, 93, 109), (112, 113, 115),
    (138, 134, 120), (165, 156, 116), (195, 179, 105), (225, 204, 85), (254, 232, 56),
)  # fmt: skip
READ, SKIPPED = (0, 94, 148), (236, 233, 227)
EDGE, ASKING = (240, 228, 66), (213, 94, 0)
HATCHED = (224, 221, 214)  # a cell without a value
CAPTION = 18


def ramp(values: np.ndarray) -> np.ndarray:
    """Colours of numbers in [0, 1]: `uint8 [..., 3]`; NaN is light grey."""
    places = np.linspace(0, 1, len(RAMP))
    table = np.array(RAMP, dtype=float)
    known = np.nan_to_num(values)
    colours = np.stack([np.interp(known, places, table[:, c]) for c in range(3)], -1)
    colours[np.isnan(values)] = HATCHED
    return colours.round().astype(np.uint8)


def mask_map(
    call: CapturedCall, head: int = 0, *, clip: int = 0, mass: bool = False, pixels: int = 512
) -> Image.Image:
    """The mask of one head: rows are query blocks, columns key blocks, in the order the kernel walks them.

    Args:
        call: captured.
        head: place among `call.heads`.
        clip: row of the batch.
        mass: draw the share of the row's attention in every block instead, as its square root.
        pixels: longer side, at least; blocks are whole pixels.

    Raises:
        ValueError: no such head; or `mass` of a call captured without scores.
    """
    _check_head(call, head)
    if mass:
        if call.mass is None:
            raise ValueError(
                "this call has no scores; capture with scores=True to draw attention mass"
            )
        shares = call.mass[clip % len(call.mass), head].float()
        colours = ramp((shares / shares.max().clamp_min(1e-6)).sqrt().numpy())
    else:
        kept = call.keep()
        colours = np.where(kept[clip % len(kept), head].numpy()[..., None], READ, SKIPPED)
    picture = Image.fromarray(colours.astype(np.uint8))
    scale = max(1, math.ceil(pixels / max(picture.size)))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def attended_frames(
    call: CapturedCall,
    patch: tuple[int, int, int],
    head: int = 0,
    *,
    clip: int = 0,
    video: Tensor | None = None,
    columns: int = 6,
    width: int = 192,
) -> Image.Image:
    """The blocks that a patch attends, drawn over the frames: what is read stays lit, its own block is orange.

    Args:
        call: captured.
        patch: `(frame, row, column)` in latent tokens.
        head: place among `call.heads`.
        clip: row of the batch.
        video: `float [F, H, W, 3]` in [0, 1], the clip that was made; grey without.
        columns: frames in a row of the picture.
        width: pixels of a frame, at least one for each latent column.

    Raises:
        ValueError: no such patch or head.
    """
    _check_head(call, head)
    lit = call.attended_patch(patch, head, clip=clip)
    asking = _own_block(call, patch, head, clip)
    frames, rows, cells = lit.shape
    cell = max(1, width // cells)
    size = (cells * cell, rows * cell)
    columns = min(columns, frames)
    sheet = Image.new(
        "RGB",
        (
            MARGIN + columns * (size[0] + MARGIN),
            MARGIN + -(-frames // columns) * (size[1] + CAPTION + MARGIN),
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    for frame in range(frames):
        left = MARGIN + frame % columns * (size[0] + MARGIN)
        top = MARGIN + frame // columns * (size[1] + CAPTION + MARGIN)
        draw.text((left, top), f"latent frame {frame}", fill=INK, font=font(11))
        picture = _still(video, frame, frames, size)
        picture = _light(picture, lit[frame], asking[frame], cell)
        if frame == patch[0]:
            _outline(picture, patch[1], patch[2], cell)
        sheet.paste(picture, (left, top + CAPTION))
    return sheet


def heat_map(
    values: Sequence[Sequence[float | None]],
    *,
    title: str,
    rows: str,
    columns: str,
    cell: int | None = None,
) -> Image.Image:
    """Numbers in [0, 1] as colours, with a scale; None and NaN are grey.

    Args:
        values: `[row][column]`, all rows of one length.
        title: above.
        rows, columns: what they are.
        cell: pixels of a cell; what makes the picture about 500 wide if left out.
    """
    table = np.array([[math.nan if v is None else v for v in row] for row in values], dtype=float)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"a heat map needs rows of one length, got shape {table.shape}")
    height, width = table.shape
    cell = cell or max(4, min(28, 480 // width))
    left, top = 44, 30
    picture = Image.new(
        "RGB", (max(260, left + width * cell + MARGIN), top + height * cell + 62), PAPER
    )
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, 8), title, fill=INK, font=font(13))
    cells = Image.fromarray(ramp(table)).resize(
        (width * cell, height * cell), Image.Resampling.NEAREST
    )
    picture.paste(cells, (left, top))
    for row in range(0, height, max(1, math.ceil(13 / cell))):
        draw.text(
            (left - 6, top + (row + 0.5) * cell), str(row), fill=INK, font=font(10), anchor="rm"
        )
    for column in range(0, width, max(1, math.ceil(22 / cell))):
        draw.text(
            (left + (column + 0.5) * cell, top + height * cell + 4),
            str(column),
            fill=INK,
            font=font(10),
            anchor="ma",
        )
    draw.text((left, top + height * cell + 18), f"{columns}; rows: {rows}", fill=INK, font=font(11))
    _scale(picture, draw, left, top + height * cell + 40)
    return picture


def density_maps(report: RunReport) -> Image.Image:
    """Kept share of attention by layer and step, and by layer and head, beside each other.

    Raises:
        ValueError: nothing has run.
    """
    if not report.layers:
        raise ValueError("this report is empty: run the pipeline first")
    by_step = heat_map(
        [layer.steps for layer in report.layers],
        title="density by layer and step",
        rows="layers",
        columns="denoising step",
    )
    by_head = heat_map(
        [layer.heads for layer in report.layers],
        title="density by layer and head",
        rows="layers",
        columns="head, mean over all steps",
    )
    both = Image.new(
        "RGB", (by_step.width + by_head.width, max(by_step.height, by_head.height)), PAPER
    )
    both.paste(by_step, (0, 0))
    both.paste(by_head, (by_step.width, 0))
    return both


def stills(video: Tensor, latent_frames: int) -> np.ndarray:
    """One picture a latent frame, evenly from the first to the last of the video: `uint8 [latent_frames, H, W, 3]`."""
    picks = torch.linspace(0, len(video) - 1, latent_frames).round().long()
    return to_pixels(video[picks])


def _check_head(call: CapturedCall, head: int) -> None:
    if not 0 <= head < len(call.heads):
        raise ValueError(
            f"no head {head}: the capture holds {len(call.heads)}, numbered from 0 (in the model: {call.heads})"
        )


def _own_block(call: CapturedCall, patch: tuple[int, int, int], head: int, clip: int) -> Tensor:
    """The patches that share a query block with this one, `bool [F, H, W]`."""
    start, stop = call.grid.grid_span
    blocks = call.blocks_of_tokens(head, clip=clip)[0][start:stop].view(call.grid.shape)
    return blocks == blocks[patch]


def _still(video: Tensor | None, frame: int, frames: int, size: tuple[int, int]) -> Image.Image:
    if video is None:
        return Image.new("RGB", size, (138, 135, 128))
    return Image.fromarray(stills(video, frames)[frame]).resize(size, Image.Resampling.BILINEAR)


def _light(picture: Image.Image, lit: Tensor, asking: Tensor, cell: int) -> Image.Image:
    def grow(cells: Tensor) -> np.ndarray:
        return cells.numpy().repeat(cell, 0).repeat(cell, 1)

    pixels = np.array(picture).astype(float)
    on = grow(lit)
    pixels[~on] = pixels[~on] * 0.2 + 13
    pixels[grow(asking)] = pixels[grow(asking)] * 0.58 + np.array(ASKING) * 0.42
    padded = np.pad(on, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    pixels[on & ~inner] = EDGE
    return Image.fromarray(pixels.round().astype(np.uint8))


def _outline(picture: Image.Image, row: int, column: int, cell: int) -> None:
    box = (column * cell - 1, row * cell - 1, (column + 1) * cell, (row + 1) * cell)
    ImageDraw.Draw(picture).rectangle(box, outline=(255, 255, 255), width=2)


def _scale(picture: Image.Image, draw: ImageDraw.ImageDraw, left: int, top: int) -> None:
    strip = Image.fromarray(ramp(np.linspace(0, 1, 120)[None].repeat(8, 0)))
    draw.text((left, top + 4), "0", fill=INK, font=font(10), anchor="lm")
    picture.paste(strip, (left + 12, top))
    draw.text((left + 138, top + 4), "1, dense", fill=INK, font=font(10), anchor="lm")
