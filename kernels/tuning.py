"""Tile sizes of the Triton kernels: data in `configs/<architecture>.json`, never found by trial behind the user's back.

A file maps `"<bits of the dtype>x<head_dim>"` to tiles in order of preference; the first that divides the mask's
blocks is taken; a second key that ends in " tma" holds what TMA wants otherwise.  The block size belongs to the mask; a tile is how a kernel walks through it.
"""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import triton

_CONFIGS = Path(__file__).parent / "configs"
HEAD_DIMS = (64, 96, 128, 256)
# What Triton's interpreter pretends to be; it has no device to ask.
INTERPRETED_CAPABILITY = (9, 0)

# The versions of Triton under which the Hopper kernel is compiled and its machine code checked: [first, end).
GLUON_VERSIONS = ((3, 6), (3, 8))


class Tile(NamedTuple):
    """How one program of the portable kernel is cut."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def get_tile(
    capability: tuple[int, int],
    bits: int,
    head_dim: int,
    block_size: tuple[int, int],
    *,
    tma: bool = False,
) -> Tile:
    """The tile for a CUDA compute capability, dtype width, head size and mask block; for `tma` where it differs.

    Raises:
        ValueError: no tile divides the blocks, or the head size is not served; the message says what is.
    """
    table = _table(architecture(capability))
    key = f"{bits}x{head_dim}"
    if key not in table:
        raise ValueError(
            f"head_dim {head_dim} is not served by the Triton kernels; use one of {HEAD_DIMS}"
        )
    if tma and f"{key} tma" in table:
        key = f"{key} tma"
    for tile in map(Tile._make, table[key]):
        if block_size[0] % tile.block_m == 0 and block_size[1] % tile.block_n == 0:
            return tile
    raise ValueError(
        f"blocks of {tuple(block_size)} tokens are not served by the Triton kernels; use multiples of 16"
    )


@cache
def architecture(capability: tuple[int, int]) -> str:
    """Name of the newest configuration that is not newer than the device, such as `sm90`."""
    known = sorted(int(f.stem[2:]) for f in _CONFIGS.glob("sm*.json"))
    number = capability[0] * 10 + capability[1]
    older = [sm for sm in known if sm <= number]
    if not older:
        raise ValueError(
            f"compute capability {capability} is too old for the Triton kernels; they need 8.0"
        )
    return f"sm{older[-1]}"


def why_not_tma(capability: tuple[int, int], bits: int) -> str:
    """One line on what keeps the portable kernel from loading tiles by TMA, or ""."""
    if capability < (9, 0):
        return f"needs compute capability 9.0 or newer, got {capability[0]}.{capability[1]}"
    if bits != 16:
        return "serves fp16 and bf16"
    if importlib.util.find_spec("triton.tools.tensor_descriptor") is None:
        return f"needs a Triton that takes tensor descriptors, got {triton.__version__}"
    return ""


def tma_by_name_only(
    capability: tuple[int, int], bits: int, head_dim: int, block_size: tuple[int, int]
) -> str:
    """Why TMA is used in such a call only if it is asked for by name, or ""; for calls that `why_not_tma` lets pass."""
    if capability[0] != 9:
        return "not timed on this card"
    if get_tile(capability, bits, head_dim, block_size, tma=True).block_n < 64:
        return "not timed in tiles of fewer than 64 keys"
    return ""


def hopper_ring(block_n: int, block_d: int) -> tuple[int, bool]:
    """Stages of the Hopper kernel's ring, and whether the output must share Q's buffers to make room for them.

    Three stages of 64 KB give TMA a full turn and fill the 227 KB of an SM; smaller tiles leave room for both.
    """
    if block_d == 64:
        return 4, False
    return (3, True) if block_n == 128 else (5, False)


class PairForm(NamedTuple):
    """How the Hopper kernels for pairs of 64-row blocks are cut."""

    ring: int  # stages, each K and V of one block: 32 KB, or 16 KB at head size 64
    alias: bool  # the output shares Q's buffers
    turns: bool  # the warpgroups take turns on the tensor cores where both have the block
    programs: int = 1  # on a multiprocessor at a time, or at head size 64 also 2 (with `alias`)
    wide: bool = False  # tiles of two blocks: stages are twice as large, and the warpgroups always take turns

    @property
    def registers(self) -> tuple[int, int]:
        """A thread's at entry, which 3 x 128 threads a program share, and what each consumer then takes."""
        return (168, 240) if self.programs == 1 else (80, 104)

    @property
    def constants(self) -> dict[str, int]:
        """Compile-time arguments.  Two programs hide each other's waits, and have no registers to overlap anything."""
        if self.wide:
            return {"RING": self.ring, "ALIAS": self.alias}
        return {
            "RING": self.ring,
            "ALIAS": self.alias,
            "TURNS": self.turns,
            "SHARED_Q": self.programs == 2,
            "OVERLAP": self.programs == 1,
            "REGISTERS": self.registers[1],
        }


def hopper_pair_form(block_d: int) -> PairForm:
    """The fastest of those that `bench_pairs` times on an H200, where neighbouring rows agree in half of their blocks."""
    if block_d == 64:
        return PairForm(6, True, False, programs=2)
    return PairForm(3, True, True, wide=True)


def hopper_8bit_ring(fp8_pv: bool) -> int:
    """Stages of the ring with 8-bit keys, and with 16-bit or 8-bit values: 48 or 32 KB a stage."""
    return 5 if fp8_pv else 3


def hopper_mass_ring(block_d: int) -> int:
    """Stages of the ring of keys in the Hopper kernel for block mass, beside 256 query rows."""
    return 4 if block_d == 128 else 8


def why_not_hopper(
    capability: tuple[int, int], bits: int, head_dim: int, block_size: tuple[int, int]
) -> str:
    """One line on what keeps the Hopper kernel from serving such a call, or ""."""
    if why_not := _why_not_hopper_tensors(capability, bits, head_dim):
        return why_not
    if block_size not in ((128, 128), (128, 64)):
        return f"serves blocks of (128, 128) and (128, 64) tokens, got {block_size}"
    return ""


def why_not_hopper_pairs(
    capability: tuple[int, int], bits: int, head_dim: int, block_size: tuple[int, int]
) -> str:
    """One line on what keeps the Hopper kernel for pairs of rows from serving such a call, or ""."""
    if why_not := _why_not_hopper_tensors(capability, bits, head_dim):
        return why_not
    if block_size != (64, 64):
        return f"serves blocks of (64, 64) tokens, got {block_size}"
    return ""


def why_not_hopper_mass(
    capability: tuple[int, int], bits: int, head_dim: int, block_size: tuple[int, int]
) -> str:
    """One line on what keeps the Hopper kernel for block mass from serving such a call, or ""."""
    if why_not := _why_not_hopper_tensors(capability, bits, head_dim):
        return why_not
    if not set(block_size) <= {64, 128}:
        return f"serves blocks with sides of 64 and 128 tokens, got {block_size}"
    return ""


def _why_not_hopper_tensors(capability: tuple[int, int], bits: int, head_dim: int) -> str:
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if capability[0] != 9:
        return f"needs compute capability 9.x, got {capability[0]}.{capability[1]}"
    if not GLUON_VERSIONS[0] <= version < GLUON_VERSIONS[1]:
        return f"proven under Triton 3.6 and 3.7, got {triton.__version__}"
    if bits != 16:
        return "serves fp16 and bf16"
    if head_dim not in (64, 96, 128):
        return f"serves head_dim 64, 96 and 128, got {head_dim}"
    return ""


def interpreting() -> bool:
    """Whether Triton runs kernels on the CPU (`TRITON_INTERPRET=1` in the environment)."""
    return triton.knobs.runtime.interpret


@cache
def _table(name: str) -> dict[str, list[list[int]]]:
    return json.loads((_CONFIGS / f"{name}.json").read_text())
