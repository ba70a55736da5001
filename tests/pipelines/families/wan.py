"""Wan 2.1 and 2.2, with all of their parts: these pipelines are small enough."""

from functools import partial

from families.registry import Family, clip
from PIL import Image

from sparsediff.testing import random_wan_pipeline


def call(pipe, size, *, guidance, pad=0.0, steps=2, seed=0, last=False):
    height, width, _ = size
    kwargs = {"max_sequence_length": 16}
    if type(pipe).__name__ == "WanImageToVideoPipeline":
        kwargs = {"max_sequence_length": 512, "image": Image.new("RGB", (width, height), "red")}
        if last:
            kwargs["last_image"] = Image.new("RGB", (width, height), "blue")
    return pipe(
        prompt="a small red circle moves left",
        **clip(size, guidance=guidance, steps=steps, seed=seed),
        **kwargs,
    ).frames


def family(name, variant, **changes):
    settings = {
        "name": name,
        "build": partial(random_wan_pipeline, variant),
        "call": call,
        "sizes": {(96, 128, 9): "3x6x8", (112, 80, 13): "4x7x5"},
        "guidance": ("sequential", "off"),
    }
    return Family(**{**settings, **changes})


FAMILIES = [
    family("wan", "t2v"),
    family("wan-2.2", "t2v-2.2"),
    family("wan-ti2v", "ti2v-2.2"),
    family("wan-flf2v", "flf2v", call=partial(call, last=True)),
    family("wan-vace", "vace"),
]
