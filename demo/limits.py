"""What the page lets people ask for: sizes that the model can make, and that one visitor may take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from sparsediff.demo.served import Served
from sparsediff.eval.compare import Request

PROMPT_CHARACTERS = 1000
LARGEST_SEED = 2**32 - 1
LARGEST_GUIDANCE = 30.0
# A visitor may ask for so many times the model's usual pixels and steps, and not for less than these.
PIXELS_FACTOR, STEPS_FACTOR = 2.0, 2
SMALLEST_SIDE = 32
# Field of a request -> argument of a pipeline's call.
SIZES = {
    "steps": "num_inference_steps",
    "height": "height",
    "width": "width",
    "frames": "num_frames",
}
ARGUMENTS = {**SIZES, "guidance": "guidance_scale", "negative_prompt": "negative_prompt"}
# What pipelines call the pixels and frames of one latent.
SPATIAL = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor", "vae_scale_factor")  # fmt: skip
TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of a request.

    Attributes:
        defaults: the model's usual request.
        multiple: height and width are multiples of this, in pixels.
        frame_step: frames are one more than a multiple of this.
        steps, side, frames: the largest of each; `side` in pixels.  No frames: the model makes pictures.
        pixels: the largest height x width x frames.
        fixed: what a visitor cannot choose, since the pipeline's call has no such argument.
    """

    defaults: Request
    multiple: int
    frame_step: int
    steps: int
    side: int
    frames: int | None
    pixels: int
    fixed: frozenset[str] = frozenset()

    def check(self, request: Request) -> Request:
        """The request, if it can be served; what it leaves open is filled in.

        Raises:
            ValueError: it cannot; the message is a sentence that says what can.
        """
        for name in self.fixed:
            if getattr(request, name) is not None:
                word = name.replace("_", " ")
                raise ValueError(f"This model takes no {word}; leave it out.")
        filled = {name: getattr(request, name) for name in SIZES if name not in self.fixed}
        filled = {n: getattr(self.defaults, n) if v is None else v for n, v in filled.items()}
        for name, value in filled.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name.capitalize()} must be a whole number, not {value}.")
        self._check_text(request)
        self._check_numbers(request)
        if not 1 <= filled["steps"] <= self.steps:
            raise ValueError(f"Steps must lie between 1 and {self.steps}, not {filled['steps']}.")
        for name in ("height", "width"):
            self._check_side(name, filled[name])
        if self.frames is not None:
            self._check_frames(filled["frames"])
        self._check_pixels(filled["height"], filled["width"], filled.get("frames"))
        return Request(
            prompt=request.prompt.strip(),
            negative_prompt=(request.negative_prompt or "").strip() or None,
            guidance=self.defaults.guidance if request.guidance is None else request.guidance,
            text_tokens=self.defaults.text_tokens,
            seed=request.seed,
            **filled,
        )

    def _check_pixels(self, height: int, width: int, frames: int | None) -> None:
        pixels = height * width * (frames or 1)
        if pixels > self.pixels:
            size = f"{width} x {height}"
            what = f"{size} pixels" if frames is None else f"{frames} frames of {size}"
            raise ValueError(
                f"{what} are too much for this page: it makes {self.pixels / 1e6:.2g} million pixels in all at most, and these are "
                f"{pixels / 1e6:.2g}."
            )

    def _check_text(self, request: Request) -> None:
        if not request.prompt.strip():
            raise ValueError("Write a prompt first, or pick one of the examples.")
        for name, text in {
            "prompt": request.prompt,
            "negative prompt": request.negative_prompt,
        }.items():
            if text and len(text) > PROMPT_CHARACTERS:
                raise ValueError(
                    f"The {name} has {len(text)} characters; {PROMPT_CHARACTERS} are the most."
                )

    def _check_numbers(self, request: Request) -> None:
        seed, guidance = request.seed, request.guidance
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED:
            raise ValueError(
                f"The seed must be a whole number between 0 and {LARGEST_SEED}, not {seed}."
            )
        if guidance is not None and not (
            math.isfinite(guidance) and 0 <= guidance <= LARGEST_GUIDANCE
        ):
            raise ValueError(
                f"Guidance must lie between 0 and {LARGEST_GUIDANCE:.0f}, not {guidance}."
            )

    def _check_side(self, name: str, value: int) -> None:
        least = max(SMALLEST_SIDE, self.multiple)
        if not least <= value <= self.side or value % self.multiple:
            below = min(self.side, max(least, value // self.multiple * self.multiple))
            raise ValueError(
                f"{name.capitalize()} must be a multiple of {self.multiple} between {least} and {self.side} pixels, not "
                f"{value}; {below} would do."
            )

    def _check_frames(self, value: int) -> None:
        if not 1 <= value <= self.frames or (value - 1) % self.frame_step:
            below = min(self.frames, max(1, (value - 1) // self.frame_step * self.frame_step + 1))
            rule = (
                f" and one more than a multiple of {self.frame_step}" if self.frame_step > 1 else ""
            )
            raise ValueError(
                f"Frames must lie between 1 and {self.frames}{rule}, not {value}; {below} would do."
            )


def limits_of(pipe: object, served: Served, given: Mapping[str, object]) -> Limits:
    """What a pipeline can make: from its autoencoder, its patches and the defaults of its call.

    Args:
        pipe: the pipeline.
        served: what is known of its class.
        given: fields of a `Request` that stand instead of the pipeline's defaults.

    Raises:
        ValueError: something given that the pipeline cannot make.
    """
    config = pipe.transformer.config
    spatial, temporal = _first(pipe, SPATIAL, 8), _first(pipe, TEMPORAL, 1)
    # Pipelines of pictures pack two by two latents where the model has no patches.
    patch = _patch(getattr(config, "patch_size", 1))
    multiple = spatial * (patch if served.video else max(2, patch))
    known = {name: served.defaults.get(call) for name, call in SIZES.items()}
    for name, size in _usual_size(pipe, spatial).items():
        if not isinstance(known[name], int):
            known[name] = size // multiple * multiple
    if not isinstance(known["frames"], int):
        frames = getattr(config, "sample_frames", None) or 49
        known["frames"] = (frames - 1) // temporal * temporal + 1
    known["guidance"] = served.defaults.get("guidance_scale")
    fixed = fixed_fields(served)
    fields = {name: value for name, value in known.items() if name not in fixed}
    defaults = Request(**{"prompt": "", **fields, **given})
    frames = defaults.frames if served.video else None
    limits = Limits(
        defaults=defaults,
        multiple=multiple,
        frame_step=temporal,
        steps=max(50, STEPS_FACTOR * defaults.steps),
        side=max(defaults.height, defaults.width) * 2 // multiple * multiple,
        frames=None if frames is None else 2 * frames // temporal * temporal + 1,
        pixels=int(PIXELS_FACTOR * defaults.height * defaults.width * (frames or 1)),
        fixed=fixed,
    )
    if given:
        limits.check(dataclasses.replace(defaults, prompt="any"))
    return limits


def fixed_fields(served: Served) -> frozenset[str]:
    """Fields of a `Request` that a pipeline's call has no argument for."""
    return frozenset(name for name, call in ARGUMENTS.items() if not served.takes(call))


def _first(pipe: object, names: tuple[str, ...], default: int) -> int:
    """The first of some attributes that the pipeline has."""
    return next((n for name in names if (n := getattr(pipe, name, None))), default)


def _usual_size(pipe: object, spatial: int) -> dict[str, int]:
    """Where a call leaves height and width to the pipeline: its own notes (Mochi), sides of a square (HunyuanVideo 1.5), or
    latent sizes noted in the pipeline (Flux) or the transformer (CogVideoX).
    """
    config, usual = pipe.transformer.config, {}
    latent = getattr(pipe, "default_sample_size", None) or 64
    for name in ("height", "width"):
        usual[name] = (
            getattr(pipe, f"default_{name}", None)
            or getattr(pipe, "target_size", None)
            or (getattr(config, f"sample_{name}", None) or latent) * spatial
        )
    return usual


def _patch(size: object) -> int:
    """Side of a patch; three-part sizes are `(frames, height, width)`."""
    return int(size[-1] if isinstance(size, list | tuple) else size or 1)
