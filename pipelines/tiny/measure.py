"""Read colour, shape and motion of the main object out of a clip, by measurement: no network is involved.

Pixels are assigned to the nearest object colour or to the background the caption names; the commonest object colour
(not that of a second object) is the reading.  Its pixels make a mask for every frame.  The shape is the one whose
drawn silhouettes, over sizes and angles, overlap best with the masks.  The motion follows from centre, area and self-overlap
of the masks over time.  What the caption says about the three things read is not used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import render

QUESTIONS = {"colour": tuple(render.COLOURS), "shape": render.SHAPES, "motion": render.MOTIONS}
SHAPE_FRAMES = 5  # evenly spread; the two that fit a silhouette best decide
HALF = 28  # silhouettes are compared in windows of 2 * 28 + 1 cells of 2x2 pixels
REACH = 2  # cells by which the window may be off centre
# only the bright parts of a pattern tell its colour: gaps up to twice this many pixels are closed, in clip and
# silhouette alike, before shapes are compared
CLOSE = {"plain": 0, "striped": 3, "checkered": 5}


@dataclass(frozen=True)
class Reading:
    """Indices into `QUESTIONS`, and the overlap of the silhouette that decided the shape."""

    colour: int
    shape: int
    motion: int
    overlap: float


def read(video: Tensor, scenes: render.Scenes) -> list[Reading]:
    """One reading for each clip of `[B, 3, F, H, W]` in [-1, 1], on the CPU.

    Of `scenes` only background, texture and the second object are looked at.
    """
    return [_read_one(clip, scenes, i) for i, clip in enumerate(video)]


def verdicts(video: Tensor, scenes: render.Scenes) -> dict[str, Tensor]:
    """For each question, bool `[B]`: is the reading what the scene says?"""
    readings = read(video, scenes)
    return {
        k: torch.tensor([getattr(r, k) for r in readings]) == getattr(scenes, k) for k in QUESTIONS
    }


def accuracy(right: dict[str, Tensor]) -> dict[str, float]:
    """Share of right answers per question, and of clips with all three right."""
    together = torch.stack(list(right.values())).all(0)
    shares = {k: v.float().mean().item() for k, v in right.items()}
    return {**shares, "all three": together.float().mean().item()}


def _read_one(clip: Tensor, scenes: render.Scenes, index: int) -> Reading:
    pixels = (clip.clamp(-1, 1) + 1) / 2
    background = list(render.BACKGROUNDS.values())[scenes.background[index]]
    label = _label(pixels, torch.tensor(background))  # [F, H, W]
    second = int(scenes.colour_2[index]) if scenes.relation[index] > 0 else -1
    counts = torch.bincount(label[label >= 0], minlength=len(render.COLOURS))
    if second >= 0:
        counts[second] = 0
    colour = int(counts.argmax())
    mask = (label == colour).float()
    hidden = (label == second).float() if second >= 0 else torch.zeros_like(mask)
    hidden = F.max_pool2d(hidden[:, None], 5, stride=1, padding=2)[:, 0] * (1 - mask)
    texture = render.TEXTURES[scenes.texture[index]]
    shape, overlap = _shape(_closed(mask, CLOSE[texture]), hidden, texture)
    return Reading(colour, shape, _motion(mask), overlap)


def _label(pixels: Tensor, background: Tensor) -> Tensor:
    """`[F, H, W]`: index of the object colour a pixel has, -1 for background."""
    objects = torch.tensor(list(render.COLOURS.values()))
    shades = background[None] * torch.tensor([0.5, 0.75, 1.0, 1.25, 1.5])[:, None]
    flat = pixels.permute(1, 2, 3, 0).reshape(-1, 3)
    to_object, which = torch.cdist(flat, objects).min(1)
    to_background = torch.cdist(flat, shades).min(1).values
    return torch.where((to_object < to_background) & (to_object < 0.4), which, -1).view(
        pixels.shape[1:]
    )


def _centre(mask: Tensor) -> Tensor:
    """Centre of gravity `[F, 2]` (x, y) of masks `[F, H, W]`; NaN where nothing is seen."""
    area = mask.sum((1, 2))
    y = (mask.sum(2) * torch.arange(mask.shape[1])).sum(1) / area
    x = (mask.sum(1) * torch.arange(mask.shape[2])).sum(1) / area
    return torch.stack([x, y], 1)


def _closed(mask: Tensor, radius: int) -> Tensor:
    """Close gaps of up to `2 * radius` pixels in masks `[F, H, W]`."""
    if radius == 0:
        return mask
    grown = _dilated(F.pad(mask[:, None], (2 * radius,) * 4), radius)
    eroded = -_dilated(-grown, radius)
    return eroded[:, 0, 2 * radius : -2 * radius, 2 * radius : -2 * radius]


def _dilated(mask: Tensor, radius: int) -> Tensor:
    """Maximum over a square, rows and columns one after the other; `[N, 1, H, W]`."""
    side = 2 * radius + 1
    rows = F.max_pool2d(mask, (side, 1), stride=1, padding=(radius, 0))
    return F.max_pool2d(rows, (1, side), stride=1, padding=(0, radius))


@lru_cache(maxsize=3)
def _silhouettes(texture: str) -> tuple[Tensor, Tensor]:
    """Every shape at many sizes and angles, `[N, cells]`, and which shape each is, `[N]`."""
    radius, angle = torch.arange(5.0, 46.0, 1.5), torch.arange(0, 2 * math.pi, 2 * math.pi / 24)
    radius, angle = (v.flatten() for v in torch.meshgrid(radius, angle, indexing="ij"))
    side = torch.arange(-2 * HALF, 2 * HALF + 2, dtype=torch.float32) - 0.5
    w, u = torch.meshgrid(side, side, indexing="ij")
    cos, sin = angle.cos().view(-1, 1, 1, 1), angle.sin().view(-1, 1, 1, 1)
    u, w = u * cos + w * sin, w * cos - u * sin
    patterns = [torch.ones_like(u)]
    if texture == "striped":
        patterns = [(2 * math.pi * u / 11 + phase).sin() > 0 for phase in (0, math.pi)]
    elif texture == "checkered":
        wave = (2 * math.pi * u / 18).sin() * (2 * math.pi * w / 18).sin()
        patterns = [wave > 0, wave < 0]
    bank, shape_of = [], []
    for shape in range(len(render.SHAPES)):
        index = torch.full((len(radius),), shape)
        inside = (render._distance(index, u, w, radius.view(-1, 1, 1, 1)) < 0).float()
        for pattern in patterns:
            solid = _closed((inside * pattern)[:, 0], CLOSE[texture])
            bank.append(F.avg_pool2d(solid[:, None], 2).flatten(1))
            shape_of.append(index)
    return torch.cat(bank), torch.cat(shape_of)


def _shape(mask: Tensor, hidden: Tensor, texture: str) -> tuple[int, float]:
    bank, shape_of = _silhouettes(texture)
    frames = torch.linspace(0, len(mask) - 1, SHAPE_FRAMES).round().long()
    scores = []
    for m, h in zip(mask[frames], hidden[frames], strict=True):
        if m.sum() < 20:
            continue
        x, y = (_centre(m[None])[0] / 2).round().long().tolist()
        margin = HALF + REACH
        small, covered = (F.avg_pool2d(v[None, None], 2)[0, 0] for v in (m, h))
        # beyond the edge of the picture nothing can be seen either
        small = F.pad(small, (margin,) * 4)
        visible = F.pad(1 - covered, (margin,) * 4)
        windows = [
            (y + dy + REACH, x + dx + REACH)
            for dy in range(-REACH, REACH + 1)
            for dx in range(-REACH, REACH + 1)
        ]
        size = 2 * HALF + 1
        a = torch.stack([small[r : r + size, c : c + size].flatten() for r, c in windows])
        b = torch.stack([visible[r : r + size, c : c + size].flatten() for r, c in windows])
        common = (a * b) @ bank.T
        union = (a * b).sum(1, keepdim=True) + b @ bank.T - common
        best = (common / union.clamp_min(1e-6)).amax(0)
        scores.append(torch.stack([best[shape_of == s].max() for s in range(len(render.SHAPES))]))
    if not scores:
        return 0, 0.0
    table = torch.stack(scores).sort(0, descending=True).values[:2].mean(0)
    return int(table.argmax()), table.max().item()


def _motion(mask: Tensor) -> int:
    seen = mask.sum((1, 2)) > 20
    mask = mask[seen]
    if len(mask) < 9:
        return render.MOTIONS.index("still")
    centre = F.avg_pool1d(_centre(mask).T[None], 3, stride=1)[0]  # [2, F - 2], smoothed
    net = centre[:, -1] - centre[:, 0]
    path = (centre[:, 1:] - centre[:, :-1]).abs().sum(1)
    x, y = 0, 1
    if path[y] > 40 and net[y].abs() < 0.6 * path[y] and path[y] > 1.5 * path[x]:
        return render.MOTIONS.index("bouncing")
    if net.abs().max() > 20:
        if net[x].abs() > net[y].abs():
            return render.MOTIONS.index("right" if net[x] > 0 else "left")
        return render.MOTIONS.index("down" if net[y] > 0 else "up")
    area = mask.sum((1, 2))
    growth = (area[-3:].mean() / area[:3].mean()).sqrt().item()
    if growth > 1.35:
        return render.MOTIONS.index("growing")
    if growth < 0.74:
        return render.MOTIONS.index("shrinking")
    overlap = min(_self_overlap(mask, lag) for lag in (4, 6, 8))
    return render.MOTIONS.index("spinning" if overlap < 0.88 else "still")


def _self_overlap(mask: Tensor, lag: int) -> float:
    """Median overlap of masks `lag` frames apart, centres aligned."""
    centre = _centre(mask)
    size = torch.tensor([mask.shape[2], mask.shape[1]])
    shift = 2 * (centre[lag:] - centre[:-lag]) / size  # [F, 2] in grid units
    theta = torch.eye(2, 3).repeat(len(shift), 1, 1)
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, [len(shift), 1, *mask.shape[1:]], align_corners=False)
    moved = F.grid_sample(mask[lag:, None], grid, align_corners=False)[:, 0]
    common = torch.minimum(moved, mask[:-lag]).sum((1, 2))
    return (common / torch.maximum(moved, mask[:-lag]).sum((1, 2))).median().item()
