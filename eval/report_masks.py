"""Captured masks for the report's viewer: packed bits, where each token stands, and stills to draw on."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from sparsediff.eval.captured import Capture, CapturedCall
from sparsediff.eval.pictures import stills
from sparsediff.eval.results import ArmResult, ClipResult, Results
from sparsediff.eval.video import read_video
from sparsediff.token_grid import TokenGrid, TokenOrder, Window

if TYPE_CHECKING:
    from sparsediff.eval.report import Blobs

STILL_PIXELS = 320  # longer side


def page_masks(results: Results, blobs: Blobs) -> tuple[list[dict[str, object]], list[str]]:
    """What `MaskViewer` reads, one entry an arm that has a capture, and what to tell the reader."""
    masks, notes = [], []
    for arm in results.arms:
        path = results.capture_path(arm)
        if path is None:
            continue
        mask = _mask(results, arm, Capture.load(path), blobs, notes)
        if mask is not None:
            masks.append(mask)
    return masks, notes


def _mask(
    results: Results, arm: ArmResult, capture: Capture, blobs: Blobs, notes: list[str]
) -> dict[str, object] | None:
    grids = list(dict.fromkeys(c.grid for c in capture.calls if c.grid is not None))
    if not grids:
        notes.append(f"{arm.label}: the captured calls have no grid of tokens to draw.")
        return None
    grid, packer = grids[0], _Packer(blobs)
    usable = [c for c in capture.calls if c.grid == grid]
    calls = [packed for c in usable if (packed := packer.call(c)) is not None]
    if len(calls) < len(capture.calls):
        notes.append(
            f"{arm.label}: {len(calls)} of {len(capture.calls)} captured attention calls are in the mask viewer; the others did "
            "not fit, or have another grid."
        )
    if not calls:
        return None
    clip = _clip(arm, capture.about)
    path = None if clip is None else results.video_path(clip)
    said = (
        []
        if capture.complete
        else ["The recording stopped before the run ended: its memory was full."]
    )
    if packer.no_mass:
        said.append("Attention mass did not fit into the page for every call.")
    return {
        "arm": arm.arm,
        "grid": list(grid.shape),
        "start": grid.grid_span[0],
        "outside": ", ".join(
            f"{s.length} {s.role}" for s in grid.segments if s.role != "grid" and s.length
        ),
        "stills": [] if path is None else _pictures(path, grid.shape[0]),
        "calls": calls,
        "about": " · ".join(
            filter(None, [clip.prompt if clip else "", str(grid) + " latent tokens"])
        ),
        "note": " ".join(said),
    }


def _clip(arm: ArmResult, about: dict[str, str]) -> ClipResult | None:
    """The clip that was captured; the first if the capture does not say."""
    named = (
        c for c in arm.clips if c.prompt == about.get("prompt") and str(c.seed) == about.get("seed")
    )
    return next(named, arm.clips[0] if arm.clips else None)


class _Packer:
    """Puts tensors into the page, each once."""

    def __init__(self, blobs: Blobs) -> None:
        self.blobs = blobs
        self.known: dict[int, str] = {}
        self.places: dict[tuple[TokenGrid, Window], str] = {}
        self.no_mass = False
        self.held: list[Tensor] = []  # an identity is only one while the tensor lives

    def call(self, call: CapturedCall) -> dict[str, object] | None:
        """One call, or None where its mask does not fit."""
        bits = None
        if call.bitmap is not None:
            bits = self._tensor(call.bitmap)
            if bits is None:
                return None
        mass = kept = None
        if call.mass is not None:
            mass = self._tensor(call.mass, mass_to_bytes)
            kept = self._tensor(kept_of_rows(call))
            self.no_mass |= mass is None or kept is None
        named = bool(call.windows)
        return {
            "layer": call.layer,
            "step": call.step,
            "branch": call.branch,
            "reason": call.dense_reason,
            "block": list(call.block_size),
            "blocks": list(call.num_blocks),
            "heads": list(call.heads),
            "windows": call.head_windows.tolist() if named else None,
            "names": [self._place(call.grid, w) for w in call.windows] if named else None,
            "windowNames": [window_name(w) for w in call.windows] if named else None,
            "bits": bits,
            "shape": None if call.bitmap is None else list(call.bitmap.shape),
            "mass": mass if kept else None,
            "kept": kept,
            "density": call.density().tolist(),
        }

    def _tensor(self, tensor: Tensor, convert=lambda x: x) -> str | None:
        if id(tensor) not in self.known:
            packed = convert(tensor)
            if not self.blobs.fits(packed.nbytes):
                return None
            self.known[id(tensor)] = self.blobs.add(packed.contiguous().numpy().tobytes())
            self.held.append(tensor)
        return self.known[id(tensor)]

    def _place(self, grid: TokenGrid, window: Window) -> str:
        """Where each token of the video stands in the order of a window: little-endian `uint32`."""
        if (grid, window) not in self.places:
            start, stop = grid.grid_span
            place = TokenOrder((window,)).inverse(grid)[0, start:stop]
            self.places[grid, window] = self.blobs.add(place.numpy().astype("<u4").tobytes())
        return self.places[grid, window]


def mass_to_bytes(mass: Tensor) -> Tensor:
    """Shares in [0, 1] as `uint8`, eight steps to a halving: 255 is 1, 0 is nothing."""
    steps = 255 + 8 * torch.log2(mass.float().clamp_min(1e-30))
    return torch.where(mass > 0, steps.round().clamp(1, 255), 0).to(torch.uint8)


def kept_of_rows(call: CapturedCall) -> Tensor:
    """Share of each query block's mass in the blocks it reads, 65535 to 1: `uint8 [B, H, Mq, 2]`, low byte first."""
    kept = (call.mass.float() * call.keep()).sum(-1) / call.mass.float().sum(-1)
    steps = (kept * 65535).round().to(torch.int32)
    return torch.stack([steps & 255, steps >> 8], -1).to(torch.uint8)


def window_name(window: Window) -> str:
    """For people."""
    if isinstance(window, str):
        return f"axes {window}, slowest first"
    return "windows of " + " x ".join(map(str, window))


def _pictures(path: Path, latent_frames: int) -> list[str]:
    """Data URIs."""
    return [
        _data_uri(Image.fromarray(frame)) for frame in stills(read_video(path)[0], latent_frames)
    ]


def _data_uri(image: Image.Image) -> str:
    image.thumbnail((STILL_PIXELS, STILL_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
