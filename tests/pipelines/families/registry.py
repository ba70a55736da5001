"""What the conformance tests need to know of a family: how to build it tiny, how to call it, what its tokens are.

Every module of this folder that defines `FAMILIES` takes part.  Text encoders and autoencoders are left out where the
pipeline takes embeddings and returns latents.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsediff.pipelines.cards import CARDS

Size = tuple[int, int, int]  # height, width, frames, in pixels


@dataclass(frozen=True, kw_only=True)
class Family:
    """One supported pipeline at a tiny random size.

    Attributes:
        name: in test ids.
        build: makes the pipeline, the same weights every time.
        call: `call(pipe, size, guidance=..., pad=..., steps=2, seed=0)` to latents.  `guidance` is one of the strings below;
            `pad` is what the text embeddings hold where the prompt is padded.
        sizes: each with the grid that the report must then name; the first is the usual one, another has odd sides.
        guidance: which of `"off"`, `"batched"` (both branches in one call) and `"sequential"` it has.
        outside: tokens beside the grid, whose rows and columns stay exact; several numbers where calls differ.
        by_sample: whether each sample of a batch has an attention call of its own.
        modular: that diffusers has a modular pipeline only, and the denoising loop is the tests'.
        masks: whether padded text is hidden by an attention mask.
        compiled: `"model"`, or how many kinds of repeated blocks there are, where stock diffusers cannot trace the model; 0: not
            these either.
        lora: the modules that peft adapts.
        tolerance: of a run that keeps every block, relative to the largest latent.
    """

    name: str
    build: Callable[[], object]
    call: Callable[..., Tensor]
    sizes: Mapping[Size, str]
    guidance: tuple[str, ...] = ("off",)
    outside: int | tuple[int, ...] = 0
    by_sample: bool = False
    modular: bool = False
    masks: bool = False
    compiled: str | int = "model"
    lora: tuple[str, ...] = ("to_q", "to_v")
    tolerance: float = 5e-5

    def __str__(self) -> str:
        return self.name

    @property
    def size(self) -> Size:
        """The usual one."""
        return next(iter(self.sizes))

    @property
    def lacking(self) -> str:
        """Why this release of diffusers has no such family; empty where it has."""
        return next(card.lacking for card in CARDS if self.name in card.checked)

    def pipeline(self) -> object:
        """A fresh one; skips the test where this release of diffusers is too old for it."""
        if self.lacking:
            pytest.skip(self.lacking)
        return self.build()

    def run(self, pipe: object, size: Size | None = None, **options: object) -> Tensor:
        """Latents of one short generation."""
        options.setdefault("guidance", self.guidance[0])
        pipe.set_progress_bar_config(disable=True)
        return self.call(pipe, size or self.size, **options)


def generator(seed: int) -> torch.Generator:
    """A seeded generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def clip(size: Size, *, guidance: str, steps: int, seed: int) -> dict[str, object]:
    """What the call of a pipeline for videos takes beside the words."""
    height, width, frames = size
    return {
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": 1.0 if guidance == "off" else 3.0,
        "output_type": "latent",
        "generator": generator(seed),
    }


def embeddings(*shape: int, seed: int = 0) -> Tensor:
    """Random text embeddings."""
    return torch.randn(*shape, generator=generator(seed))


def padded(embeds: Tensor, words: tuple[int, ...], fill: float) -> tuple[Tensor, Tensor]:
    """Embeddings `[B, T, C]` whose row `b` has `words[b]` words, then `fill`; and the mask `int64 [B, T]`."""
    places = torch.arange(embeds.shape[1])
    mask = (places < torch.tensor(words)[:, None]).long()
    return torch.where(mask[..., None].bool(), embeds, torch.full_like(embeds, fill)), mask


def all_families() -> list[Family]:
    """Of every module in this folder."""
    names = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem != "registry")
    modules = [importlib.import_module(f"families.{name}") for name in names]
    return [family for module in modules for family in module.FAMILIES]
