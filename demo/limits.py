"""What the page lets people ask for: sizes that the model can make, and that one visitor may take."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass

from sparsediff.eval.compare import Request
from sparsediff.eval.models import default_request

PROMPT_CHARACTERS = 1000
LARGEST_SEED = 2**32 - 1
LARGEST_GUIDANCE = 30.0
# A visitor may ask for so many times the model's usual pixels and steps, and not for less than these.
PIXELS_FACTOR, STEPS_FACTOR = 2.0, 2
SMALLEST_SIDE = 32
SIZES = {
    "steps": "num_inference_steps",
    "height": "height",
    "width": "width",
    "frames": "num_frames",
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of a request.

    Attributes:
        defaults: the model's usual request.
        multiple: height and width are multiples of this, in pixels.
        frame_step: frames are one more than a multiple of this.
        steps, side, frames: the largest of each; `side` in pixels.
        pixels: the largest height x width x frames.
    """

    defaults: Request
    multiple: int
    frame_step: int
    steps: int
    side: int
    frames: int
    pixels: int

    def check(self, request: Request) -> Request:
        """The request, if it can be served; what it leaves open is filled in.

        Raises:
            ValueError: it cannot; the message is a sentence that says what can.
        """
        filled = {name: getattr(request, name) for name in SIZES}
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
        self._check_frames(filled["frames"])
        pixels = filled["height"] * filled["width"] * filled["frames"]
        if pixels > self.pixels:
            raise ValueError(
                f"{filled['frames']} frames of {filled['width']} x {filled['height']} are too much for this page: it makes "
                f"{self.pixels / 1e6:.2g} million pixels in all at most, and these are {pixels / 1e6:.2g}."
            )
        return Request(
            prompt=request.prompt.strip(),
            negative_prompt=(request.negative_prompt or "").strip() or None,
            guidance=self.defaults.guidance if request.guidance is None else request.guidance,
            text_tokens=self.defaults.text_tokens,
            seed=request.seed,
            **filled,
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


def limits_of(pipe: object, model: str) -> Limits:
    """What a pipeline can make: from its autoencoder, its patches and the defaults of its call.

    Raises:
        ValueError: a pipeline that makes no video.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    if "num_frames" not in parameters:
        raise ValueError(
            f"{type(pipe).__name__} makes no video, and this page shows videos; start it with a video model"
        )
    known = {name: parameters[call].default for name, call in SIZES.items() if call in parameters}
    known["guidance"] = getattr(parameters.get("guidance_scale"), "default", None)
    config = pipe.transformer.config
    spatial = getattr(pipe, "vae_scale_factor_spatial", None) or getattr(
        pipe, "vae_spatial_compression_ratio", 8
    )
    temporal = getattr(pipe, "vae_scale_factor_temporal", None) or getattr(
        pipe, "vae_temporal_compression_ratio", 1
    )
    multiple = spatial * _patch(getattr(config, "patch_size", 1))
    # Pipelines that leave a size to the model's configuration (CogVideoX) name latent sizes there.
    latent = {
        "height": getattr(config, "sample_height", None), "width": getattr(config, "sample_width", None),
    }  # fmt: skip
    for name, size in latent.items():
        if not isinstance(known.get(name), int):
            known[name] = (size or 64) * spatial
    if not isinstance(known.get("frames"), int):
        known["frames"] = getattr(config, "sample_frames", None) or 49
    defaults = Request(**{"prompt": "", **known, **default_request(model)})
    return Limits(
        defaults=defaults,
        multiple=multiple,
        frame_step=temporal,
        steps=max(50, STEPS_FACTOR * defaults.steps),
        side=max(defaults.height, defaults.width) * 2 // multiple * multiple,
        frames=2 * defaults.frames // temporal * temporal + 1,
        pixels=int(PIXELS_FACTOR * defaults.height * defaults.width * defaults.frames),
    )


def _patch(size: object) -> int:
    """Side of a patch; three-part sizes are `(frames, height, width)`."""
    return int(size[-1] if isinstance(size, list | tuple) else size or 1)
