"""Captioned clips, rendered: the training data of the tiny pipelines.

A scene has one main object (sometimes a second one), a smooth background and a camera.  Every length is
in pixels and every speed in pixels per frame, so a larger canvas or a longer clip shows more of the
same world instead of a magnified one, and a model trained at one size carries over to another.
The main object's motion is its motion *on the screen*; a panning camera moves the background and the
second object.

Scenes and captions are drawn on the CPU from a `torch.Generator`; only the pixels are made on the
device, so a seed gives the same clip everywhere up to rounding.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

COLOURS = {
    "red": (0.93, 0.13, 0.10),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.98, 0.90, 0.15),
    "green": (0.12, 0.78, 0.20),
    "cyan": (0.10, 0.85, 0.90),
    "blue": (0.15, 0.35, 0.98),
    "purple": (0.65, 0.25, 0.90),
    "white": (0.97, 0.97, 0.97),
}
BACKGROUNDS = {
    "black": (0.06, 0.06, 0.08),
    "grey": (0.42, 0.42, 0.44),
    "navy": (0.08, 0.12, 0.34),
    "brown": (0.36, 0.24, 0.14),
    "teal": (0.06, 0.32, 0.32),
    "olive": (0.30, 0.32, 0.10),
    "maroon": (0.34, 0.07, 0.12),
    "plum": (0.28, 0.12, 0.30),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "heart")
TEXTURES = ("plain", "striped", "checkered")
SIZES = ("small", "large")
MOTIONS = ("left", "right", "up", "down", "spinning", "growing", "shrinking", "bouncing", "still")
CAMERAS = ("still", "left", "right")
RELATIONS = ("none", "in front of", "behind", "next to")

# Several words for one thing, so that a prompt need not guess ours.  The first is the plainest.
WORDING = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "cyan": ("cyan", "cyan", "turquoise"),
    "purple": ("purple", "purple", "violet"),
    "grey": ("grey", "gray"),
    "circle": ("circle", "circle", "disc", "ball"),
    "square": ("square", "square", "box"),
    "ring": ("ring", "ring", "hoop"),
    "striped": ("striped",),
    "checkered": ("checkered", "checked"),
    "motion left": ("moving left", "moves left", "moving to the left", "sliding left"),
    "motion right": ("moving right", "moves right", "moving to the right", "sliding right"),
    "motion up": ("moving up", "moves up", "rising", "floating up"),
    "motion down": ("moving down", "moves down", "falling", "sinking down"),
    "motion spinning": ("spinning", "spins", "rotating", "turning around"),
    "motion growing": ("growing", "grows", "getting bigger"),
    "motion shrinking": ("shrinking", "shrinks", "getting smaller"),
    "motion bouncing": ("bouncing", "bounces", "jumping up and down"),
    "motion still": ("standing still", "staying still", "not moving"),
    "in front of": ("in front of",),
    "behind": ("behind",),
    "next to": ("next to", "beside"),
    "backdrop": ("on a {} background", "over a {} background", "with a {} background"),
    "camera still": ("", "", "", "", ", still camera"),
    "camera left": (", the camera pans left", ", camera panning left"),
    "camera right": (", the camera pans right", ", camera panning right"),
}
PAN_SPEED = 1.3  # pixels per frame
LAST_FRAME = 32  # the default clip has 33 frames; growth is scaled to it


@dataclass(frozen=True)
class Scenes:
    """A batch of scene descriptions.  Integer fields index the tables above, all tensors are `[B, ...]`."""

    colour: Tensor
    shape: Tensor
    motion: Tensor
    size: Tensor
    texture: Tensor
    background: Tensor
    camera: Tensor
    relation: Tensor
    colour_2: Tensor
    shape_2: Tensor
    size_2: Tensor
    chance: Tensor  # [B, 12] uniform numbers: positions, speeds, angles
    blobs: Tensor  # [B, 1, 12, 24] coarse background noise

    def __len__(self) -> int:
        return len(self.colour)

    def __getitem__(self, index) -> Scenes:
        return Scenes(*(getattr(self, f.name)[index] for f in fields(self)))


def is_held_out(colour: Tensor, shape: Tensor, motion: Tensor) -> Tensor:
    """Combinations of the main object that training never shows: one in twelve of all 432."""
    return (7 * colour + 5 * shape + motion) % 12 == 0


def sample_scenes(count: int, generator: torch.Generator, *, held_out: bool = False) -> Scenes:
    """Draw `count` scenes from the training combinations, or from the held-out ones."""

    def choose(n: int, weights: tuple[float, ...] | None = None) -> Tensor:
        p = torch.tensor(weights if weights else [1.0] * n)
        return torch.multinomial(p, count, replacement=True, generator=generator)

    table = torch.cartesian_prod(*(torch.arange(len(t)) for t in (COLOURS, SHAPES, MOTIONS)))
    # nothing is seen of a circle or a ring that spins unless it is textured: see `texture` below
    allowed = is_held_out(*table.T) == held_out
    table = table[allowed]
    pick = torch.randint(len(table), (count,), generator=generator)
    colour, shape, motion = table[pick].T
    texture = choose(3, (0.6, 0.2, 0.2))
    round_and_spinning = ((shape == 0) | (shape == 4)) & (motion == MOTIONS.index("spinning"))
    texture = torch.where(round_and_spinning & (texture == 0), 1 + choose(2), texture)

    second = choose(2, (0.65, 0.35)).bool()
    crosses = motion < 4  # only an object that travels passes in front of or behind another
    relation = torch.where(second, torch.where(crosses, 1 + choose(2), 3), 0)
    size_2 = torch.where(
        relation == 1, choose(2), 0
    )  # a large one would hide or crowd the main object
    return Scenes(
        colour=colour,
        shape=shape,
        motion=motion,
        size=choose(2),
        texture=texture,
        background=choose(len(BACKGROUNDS)),
        camera=choose(3, (0.7, 0.15, 0.15)),
        relation=relation,
        colour_2=(colour + 1 + choose(len(COLOURS) - 1)) % len(COLOURS),
        shape_2=(shape + 1 + choose(len(SHAPES) - 1)) % len(SHAPES),
        size_2=size_2,
        chance=torch.rand(count, 12, generator=generator),
        blobs=torch.randn(count, 1, 12, 24, generator=generator),
    )


def captions(scenes: Scenes, generator: torch.Generator, *, complete: bool = False) -> list[str]:
    """One sentence a scene.  Training captions leave things out now and then; `complete` ones never do."""
    chance = torch.rand(len(scenes), 12, generator=generator).tolist()
    columns = {
        f.name: getattr(scenes, f.name).tolist()
        for f in fields(scenes)
        if f.name not in ("chance", "blobs")
    }
    return [
        _caption({k: v[i] for k, v in columns.items()}, c, complete) for i, c in enumerate(chance)
    ]


def _caption(s: dict[str, int], chance: list[float], complete: bool) -> str:
    draws = iter(chance)

    def say(key: str) -> str:
        options = WORDING.get(key, (key,))
        return options[0] if complete else options[int(next(draws) * len(options))]

    def keep(probability: float) -> bool:
        return complete or next(draws) < probability

    size, colour, shape = SIZES[s["size"]], list(COLOURS)[s["colour"]], SHAPES[s["shape"]]
    words = ["a"]
    words += [say(size)] if keep(0.9) else []
    words += [say(colour)]
    words += [say(TEXTURES[s["texture"]])] if s["texture"] else []
    words += [say(shape), say(f"motion {MOTIONS[s['motion']]}")]
    if s["relation"]:
        words += [
            say(RELATIONS[s["relation"]]),
            "a",
            SIZES[s["size_2"]],
            list(COLOURS)[s["colour_2"]],
        ]
        words += [SHAPES[s["shape_2"]]]
    words += [say("backdrop").format(list(BACKGROUNDS)[s["background"]])] if keep(0.85) else []
    text = " ".join(words) + say(f"camera {CAMERAS[s['camera']]}")
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def vocabulary() -> list[str]:
    """Every word and sign the grammar can produce, sorted."""
    words = (
        {"a", "an", "the", ",", "."}
        | set(COLOURS)
        | set(BACKGROUNDS)
        | set(SHAPES)
        | set(TEXTURES)
        | set(SIZES)
    )
    for options in WORDING.values():
        for option in options:
            words |= set(option.replace(",", " , ").replace("{}", "").split())
    return sorted(words)


def _distance(shape: Tensor, u: Tensor, w: Tensor, radius: Tensor) -> Tensor:
    """Signed distance in pixels to the outline of `shape`, `[B, F, H, W]`; negative inside, `w` points down."""
    r = (u * u + w * w).sqrt()
    x, y = u.abs(), -w
    h = 0.6 * radius  # heart: a square on its corner and a disc on each upper side
    heart_y = y + 0.15 * h
    heart = torch.minimum(
        (x + heart_y.abs()) / math.sqrt(2) - h,
        ((x - h / math.sqrt(2)) ** 2 + (heart_y - h / math.sqrt(2)) ** 2).sqrt() - h,
    )
    # star: fold the plane into half a spike, then measure to the one edge left
    sector = 2 * math.pi / 5
    angle = ((torch.atan2(u, y) + sector / 2) % sector - sector / 2).abs()
    outer, inner = 1.18 * radius, 0.52 * radius
    edge_x, edge_y = inner * math.cos(sector / 2) - outer, inner * math.sin(sector / 2)
    length = (edge_x**2 + edge_y**2).sqrt()
    star = ((r * angle.cos() - outer) * edge_y - r * angle.sin() * edge_x) / length
    candidates = {
        "circle": r - radius,
        "square": torch.maximum(x, w.abs()) - 0.84 * radius,
        "triangle": torch.maximum(0.866 * x - 0.5 * w, w) - 0.55 * radius,
        "star": star,
        "ring": (r - 0.75 * radius).abs() - 0.25 * radius,
        "heart": heart,
    }
    out = candidates["circle"]
    for i, name in enumerate(SHAPES[1:], start=1):
        out = torch.where(shape.view(-1, 1, 1, 1) == i, candidates[name], out)
    return out


def trajectory(
    scenes: Scenes, frames: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where the main object is: centre x, y and radius in pixels, angle in radians, each `[B, frames]`."""
    c, motion = scenes.chance, scenes.motion
    t = torch.arange(frames, dtype=torch.float32)[None]
    radius = torch.where(scenes.size == 0, 13 + 3 * c[:, 0], 24 + 4 * c[:, 0])[:, None]
    growth = 0.8 * (t / LAST_FRAME)
    is_motion = {name: (motion == i)[:, None] for i, name in enumerate(MOTIONS)}
    scale = torch.where(is_motion["growing"], 0.6 + growth, torch.ones_like(growth))
    scale = torch.where(is_motion["shrinking"], 1.4 - growth, scale).clamp(0.4, 1.6)
    speed = (1.4 + 0.5 * c[:, 1])[:, None]
    sign_x = is_motion["right"].float() - is_motion["left"].float()
    sign_y = is_motion["down"].float() - is_motion["up"].float()
    shift = speed * (t - (frames - 1) / 2)

    margin = (
        1.15
        * radius
        * (1 + 0.35 * is_motion["growing"].float() + 0.35 * is_motion["shrinking"].float())
    )
    half_travel = speed * (frames - 1) / 2

    def place(extent: int, u: Tensor, room: Tensor) -> Tensor:
        low = (margin + room).clamp(max=extent / 2)
        return low + u[:, None] * (extent - 2 * low)

    x = place(width, c[:, 2], half_travel * sign_x.abs()) + sign_x * shift
    y = place(height, c[:, 3], half_travel * sign_y.abs()) + sign_y * shift
    beside = (scenes.relation == 3)[:, None]
    side = torch.where(c[:, 4:5] < 0.5, -1.0, 1.0)
    x = torch.where(beside, width / 2 + side * (26 + 4 * c[:, 2:3]), x)
    floor = height - 4 - radius
    hop = (28 + 10 * c[:, 5:6]) * (math.pi * (t / 16 + c[:, 6:7])).sin().abs()
    y = torch.where(is_motion["bouncing"], floor - hop, y)
    tilt = 0.4 * (c[:, 7:8] - 0.5)
    angle = torch.where(
        is_motion["spinning"], 2 * math.pi * c[:, 7:8] + 0.14 * t, tilt.expand(-1, frames)
    )
    return x, y.expand_as(x), (radius * scale).expand_as(x), angle


def render(
    scenes: Scenes, frames: int, height: int, width: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw the clips: `[B, 3, frames, height, width]`, float32 in [-1, 1]."""
    s = Scenes(*(getattr(scenes, f.name).to(device) for f in fields(scenes)))
    x, y, radius, angle = (v.to(device) for v in trajectory(scenes, frames, height, width))
    t = torch.arange(frames, dtype=torch.float32, device=device)[None]
    pan = (
        PAN_SPEED
        * ((s.camera == 2).float() - (s.camera == 1).float())[:, None]
        * (t - (frames - 1) / 2)
    )  # [B, F]
    rows = torch.arange(height, dtype=torch.float32, device=device) + 0.5
    columns = torch.arange(width, dtype=torch.float32, device=device) + 0.5

    video = _background(s, pan, rows, columns)
    colours = torch.tensor(list(COLOURS.values()), device=device)
    c = s.chance
    beside = s.relation == 3
    side = torch.where(c[:, 4] < 0.5, 1.0, -1.0)
    x_2 = width / 2 + torch.where(beside, side * (26 + 4 * c[:, 8]), 16 * (c[:, 8] - 0.5))
    y_2 = torch.where(
        beside, height * (0.3 + 0.4 * c[:, 9]), y[:, frames // 2] + 12 * (c[:, 9] - 0.5)
    )
    vertical = (s.motion == 2) | (s.motion == 3)
    x_2 = torch.where(vertical & ~beside, x[:, 0] + 12 * (c[:, 8] - 0.5), x_2)
    y_2 = torch.where(vertical & ~beside, height / 2 + 16 * (c[:, 9] - 0.5), y_2)
    radius_2 = torch.where(s.size_2 == 0, 13 + 3 * c[:, 10], 24 + 4 * c[:, 10])
    other = _layer(
        s.shape_2, torch.zeros_like(s.texture), colours[s.colour_2],
        x_2[:, None] - pan, y_2[:, None].expand(-1, frames), radius_2[:, None].expand(-1, frames),
        (0.4 * (c[:, 11:12] - 0.5)).expand(-1, frames), rows, columns,
    )  # fmt: skip
    main = _layer(s.shape, s.texture, colours[s.colour], x, y, radius, angle, rows, columns)
    present = (s.relation > 0).float().view(-1, 1, 1, 1, 1)
    main_on_top = (s.relation != 2).view(-1, 1, 1, 1, 1)
    other = (other[0], other[1] * present)
    for on_top in (False, True):
        paint = torch.where(main_on_top == on_top, main[0], other[0])
        alpha = torch.where(main_on_top == on_top, main[1], other[1])
        video = video + alpha * (paint - video)
    return (video * 2 - 1).clamp_(-1, 1).transpose(1, 2).contiguous()


def _background(s: Scenes, pan: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`[B, F, 3, H, W]`: a vertical gradient and soft blobs about 40 pixels wide that follow the camera."""
    batch, frames = pan.shape
    height, width = len(rows), len(columns)
    gx = (columns[None, None] - width / 2 + pan[:, :, None]) / (20.0 * 24)  # [B, F, W]
    gy = (rows - height / 2) / (20.0 * 12)
    grid = torch.stack(
        [
            gx[:, :, None].expand(-1, -1, height, -1),
            gy[None, None, :, None].expand(batch, frames, -1, width),
        ],
        -1,
    )
    blobs = s.blobs[:, None].expand(-1, frames, -1, -1, -1).flatten(0, 1)
    noise = F.grid_sample(
        blobs, grid.flatten(0, 1), mode="bicubic", padding_mode="reflection", align_corners=False
    )
    noise = noise.view(batch, frames, 1, height, width)
    base = torch.tensor(list(BACKGROUNDS.values()), device=pan.device)[s.background].view(
        batch, 1, 3, 1, 1
    )
    gradient = 1.25 - 0.5 * (rows / height).view(1, 1, 1, -1, 1)
    return base * gradient + 0.045 * noise


def _layer(shape, texture, colour, x, y, radius, angle, rows, columns) -> tuple[Tensor, Tensor]:
    """Paint `[B, F, 3, H, W]` and coverage `[B, F, 1, H, W]` of one object."""
    dx = columns[None, None, None, :] - x[:, :, None, None]
    dy = rows[None, None, :, None] - y[:, :, None, None]
    cos, sin = angle.cos()[:, :, None, None], angle.sin()[:, :, None, None]
    u, w = dx * cos + dy * sin, dy * cos - dx * sin
    radius = radius[:, :, None, None]
    alpha = torch.sigmoid(-2.2 * _distance(shape, u, w, radius))[:, :, None]
    # the pattern belongs to the object: it turns and grows with it
    first = radius[:, :1]
    u, w = u * (first / radius), w * (first / radius)
    stripes = (2 * math.pi * u / 11).sin()
    checks = (2 * math.pi * u / 18).sin() * (2 * math.pi * w / 18).sin() * 1.5
    pick = texture.view(-1, 1, 1, 1)
    light = torch.where(pick == 1, torch.sigmoid(5 * stripes), torch.sigmoid(6 * checks))
    tone = torch.where(pick == 0, torch.ones_like(u), 0.42 + 0.58 * light)[:, :, None]
    return tone * colour.view(-1, 1, 3, 1, 1), alpha
