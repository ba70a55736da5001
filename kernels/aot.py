"""Compile the kernels ahead of time for every architecture, without a GPU, and read the machine code.

    python -m sparsediff.kernels.aot sm90 sm120          # one JSON line a kernel; --quick for a few of them

A kernel that spills registers is slow on a machine nobody here may own; this is how we know.  Needs an environment
without `TRITON_INTERPRET`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import get_args

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsediff.kernels._block_bitmap_fwd import pack_rows
from sparsediff.kernels._block_lists_fwd import compact_rows
from sparsediff.kernels._block_pairs_fwd import pair_rows
from sparsediff.kernels._block_sparse_fwd import block_sparse_fwd
from sparsediff.kernels._quantize_fwd import quantize_pair, quantize_values
from sparsediff.kernels._token_order_fwd import gather_rows
from sparsediff.kernels.block_lists import Visits
from sparsediff.kernels.block_pairs import FIELD
from sparsediff.kernels.quantize import PAIR_OPTIONS, QUERY_BLOCK, VALUES_OPTIONS
from sparsediff.kernels.token_order import TILE_BYTES
from sparsediff.kernels.tuning import (
    PairForm,
    Tile,
    get_tile,
    hopper_8bit_ring,
    hopper_mass_ring,
    hopper_pair_form,
    hopper_ring,
)

ARCHITECTURES = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120")
TMA_ARCHITECTURES = ("sm90", "sm100", "sm120")
AMD = "gfx942"  # MI300: the portable kernels compile for it, and nobody has run them there
_DTYPES = {"bf16": 16, "fp16": 16, "fp32": 32}


@dataclass(frozen=True)
class Compiled:
    """What one kernel became on one architecture."""

    kernel: str
    arch: str
    registers: int
    stack_bytes: int  # spills live here; 0 is what we want
    shared_bytes: int
    # Hopper only: exponentials that run while PV is in flight, for each of the two warpgroups' loops
    overlapped_exponentials: tuple[int, ...] = ()
    # shuffles, votes and accesses to global memory among them: all are waited for before the next turn
    detours: tuple[int, ...] = ()
    # and multiplications of the output that a warp jumps over where no maximum has moved
    jumped_multiplications: tuple[int, ...] = ()
    # and how often it waits for products: more often than the source says means that ptxas has serialised them
    waits: int = 0
    # Portable kernel through TMA only: its tile loads in the machine code
    tma_loads: int = 0


def portable_attention(
    arch: str,
    dtype: str,
    head_dim: int,
    block_size: tuple[int, int],
    *,
    byproducts: bool,
    tile: Tile | None = None,
    tma: bool = False,
) -> Compiled:
    """Compile the portable attention kernel; `byproducts` turns on lengths, LSE, vote and mass together."""
    capability = (8, 0) if arch == AMD else divmod(int(arch[2:]), 10)
    tile = tile or get_tile(capability, _DTYPES[dtype], head_dim, block_size, tma=tma)
    block_d = triton.next_power_of_2(head_dim)
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "Q_BLOCK": block_size[0],
        "KV_BLOCK": block_size[1],
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "HAS_LENGTHS": byproducts,
        "WITH_PV": True,
        "WITH_LSE": byproducts,
        "WITH_VOTE": byproducts,
        "WITH_MASS": byproducts,
        # AMD has no TF32.
        "PRECISION": "tf32" if dtype != "fp32" else "ieee" if arch == AMD else "tf32x3",
        "STAGES": tile.num_stages,
        "TMA": tma,
    }
    rows = {"q": tile.block_m, "k": tile.block_n, "v": tile.block_n}
    boxes = {n: f"tensordesc<{dtype}[1, 1, {size}, {block_d}]>" for n, size in rows.items()}
    pointers = {
        **(boxes if tma else dict.fromkeys(rows, f"*{dtype}")),
        "out_ptr": f"*{dtype}",
        **dict.fromkeys(("lse_ptr", "mass_ptr", "lse_prev_ptr"), "*fp32"),
        **dict.fromkeys(("kv_num_blocks_ptr", "kv_indices_ptr", "kv_lengths_ptr"), "*i32"),
        "vote_ptr": "*u8",
        "scale": "fp32",
        "vote_threshold": "fp32",
    }
    name = (
        f"portable{' TMA' if tma else ''} {dtype} D{head_dim} {block_size[0]}x{block_size[1]} tile {tile.block_m}x{tile.block_n}"
        f" w{tile.num_warps} s{tile.num_stages}{' byproducts' if byproducts else ''}"
    )
    # Pointers, and strides of contiguous heads, are multiples of 16, and Triton is told so at run time too.
    aligned = [
        n
        for n in block_sparse_fwd.arg_names
        if n.endswith("_ptr") or re.fullmatch(r"stride_[qkvo][bsh]", n) or (n in rows and not tma)
    ]
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return compile_kernel(name, arch, block_sparse_fwd, pointers, constants, aligned, options)


def token_gather(arch: str, dtype: str, head_dim: int) -> Compiled:
    """Compile the kernel that reorders query, key and value, each head in an order of its own."""
    constants = {
        "COUNT": 3,
        "PER_HEAD": True,
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "ROWS": TILE_BYTES * 8 // (_DTYPES[dtype] * triton.next_power_of_2(head_dim)),
    }
    names = gather_rows.arg_names
    pointers = {n: f"*{dtype}" for n in names if n.endswith("_ptr")}
    pointers |= dict.fromkeys(("index_ptr", "heads_ptr"), "*i32")
    aligned = [n for n in names if n.endswith("_ptr") or n.startswith("stride_")]
    name = f"token gather {dtype} D{head_dim}"
    return compile_kernel(name, arch, gather_rows, pointers, constants, aligned, {"num_warps": 4})


def mask_packing(arch: str) -> Compiled:
    """Compile the kernel that stores a mask."""
    names = pack_rows.arg_names
    pointers = dict.fromkeys(("keep_ptr", "forced_ptr", "bitmap_ptr"), "*u8")
    pointers |= {"count_ptr": "*i32", "index_ptr": "*i32", "share_ptr": "*fp32", "scale": "fp32"}
    constants = {"WITH_LISTS": True, "CHUNK": 1024}
    aligned = [n for n in names if n.endswith("_ptr")]
    return compile_kernel(
        "mask packing", arch, pack_rows, pointers, constants, aligned, {"num_warps": 4}
    )


def list_building(arch: str, visits: Visits) -> Compiled:
    """Compile the kernel that turns a bitmap into lists."""
    names = compact_rows.arg_names
    pointers = {"keep_ptr": "*u8", "count_ptr": "*i32", "index_ptr": "*i32"}
    constants = {"PACKED": True, "CHUNK": 1024, "VISITS": visits, "RAGGED": True}
    aligned = [n for n in names if n.endswith("_ptr")]
    return compile_kernel(
        f"lists {visits}", arch, compact_rows, pointers, constants, aligned, {"num_warps": 4}
    )


def pair_joining(arch: str) -> Compiled:
    """Compile the kernel that joins the lists of neighbouring rows."""
    names = pair_rows.arg_names
    pointers = dict.fromkeys((n for n in names if n.endswith("_ptr")), "*i32")
    pointers |= {"mark_ptr": "*u8", "row_ptr": "*i64"}
    constants = {"HAS_LENGTHS": True, "BLOCK_N": 64, "FIELD": FIELD, "CHUNK": 1024}
    return compile_kernel(
        "lists of pairs", arch, pair_rows, pointers, constants, list(pointers), {"num_warps": 4}
    )


def pair_quantizing(arch: str, *, shift: bool, norms: bool) -> Compiled:
    """Compile the kernel that makes 8 bits of queries and keys; `norms` are for votes."""
    names = quantize_pair.arg_names
    pointers = {n: "*fp32" for n in names if n.endswith("_ptr")}
    pointers |= {"q_ptr": "*bf16", "k_ptr": "*bf16", "q8_ptr": "*i8", "k8_ptr": "*i8"}
    constants = {
        "Q_BLOCK": QUERY_BLOCK,
        "K_BLOCK": 128,
        "HEAD_DIM": 128,
        "BLOCK_D": 128,
        "WITH_SHIFT": shift,
        "WITH_NORMS": norms,
    }
    aligned = [n for n in names if n.startswith("stride_") or n in pointers]
    name = _named("quantise pair bf16", shift=shift, norms=norms)
    return compile_kernel(name, arch, quantize_pair, pointers, constants, aligned, PAIR_OPTIONS)


def values_quantizing(arch: str) -> Compiled:
    """Compile the kernel that makes 8 bits of values."""
    names = quantize_values.arg_names
    pointers = {"x_ptr": "*bf16", "out_ptr": "*fp8e4nv", "top_ptr": "*fp32"}
    constants = {"BLOCK": 128, "HEAD_DIM": 128}
    aligned = [n for n in names if n.startswith("stride_") or n in pointers]
    return compile_kernel(
        "quantise values bf16", arch, quantize_values, pointers, constants, aligned, VALUES_OPTIONS
    )


def compile_kernel(
    name: str,
    arch: str,
    kernel,
    signature: dict[str, str],
    constants: dict,
    aligned: list[str],
    options: dict,
) -> Compiled:
    """Compile a `@triton.jit` function; arguments in neither `signature` nor `constants` are `i32`."""
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else signature.get(n, "i32") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    return _compile(name, arch, source, options)


def hopper_attention(
    dtype: str,
    head_dim: int,
    block_n: int,
    *,
    byproducts: bool,
    lengths: bool = False,
    lse_prev: bool = False,
) -> Compiled:
    """Compile the Hopper kernel for key blocks of `block_n`; `byproducts` turns on LSE, vote and mass."""
    from sparsediff.kernels._block_sparse_sm90 import block_sparse_fwd_sm90

    block_d = 64 if head_dim == 64 else 128
    ring, alias = hopper_ring(block_n, block_d)
    constants = {
        "RING": ring,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "ALIAS": alias,
        "HAS_LENGTHS": lengths,
        **_byproduct_flags(byproducts, lse_prev),
    }
    boxes = {
        name: (dtype, rows, block_d)
        for name, rows in (
            ("q_desc", 64),
            ("k_desc", block_n),
            ("v_desc", block_n),
            ("out_desc", 64),
        )
    }
    form = f"hopper {dtype} D{head_dim} 128x{block_n} ring {ring}"
    name = _named(form, byproducts=byproducts, lengths=lengths, lse_prev=lse_prev)
    return _compile_gluon(name, block_sparse_fwd_sm90, boxes, constants, maxnreg=168)


def hopper_pairs(
    dtype: str,
    head_dim: int,
    *,
    lengths: bool = False,
    lse: bool = False,
    form: PairForm | None = None,
) -> Compiled:
    """Compile the Hopper kernel for pairs of 64-row blocks, in another `form` than the shipped one for trials."""
    from sparsediff.kernels._block_sparse_pair_sm90 import block_sparse_pairs_sm90
    from sparsediff.kernels._block_sparse_pair_wide_sm90 import block_sparse_wide_pairs_sm90

    block_d = 64 if head_dim == 64 else 128
    form = form or hopper_pair_form(block_d)
    constants = {
        **form.constants,
        "BLOCK_D": block_d,
        "HAS_LENGTHS": lengths,
        "WITH_LSE": lse,
    }
    boxes = dict.fromkeys(("q_desc", "k_desc", "v_desc", "out_desc"), (dtype, 64, block_d))
    name = f"hopper pairs {dtype} D{head_dim} 128x{128 if form.wide else 64} ring {form.ring}"
    flags = {
        "alias": form.alias,
        "turns": form.turns,
        "two programs": form.programs == 2,
        "wide": form.wide,
    }
    kernel = block_sparse_wide_pairs_sm90 if form.wide else block_sparse_pairs_sm90
    name = _named(name, **flags, lengths=lengths, lse=lse)
    return _compile_gluon(name, kernel, boxes, constants, maxnreg=form.registers[0])


def hopper_8bit(dtype: str, *, fp8_pv: bool, byproducts: bool) -> Compiled:
    """Compile the Hopper kernel with 8-bit logits and, with `fp8_pv`, values."""
    from sparsediff.kernels._block_sparse_8bit_sm90 import block_sparse_fwd_8bit_sm90

    ring = hopper_8bit_ring(fp8_pv)
    constants = {
        "RING": ring,
        "BLOCK_N": 128,
        "BLOCK_D": 128,
        "FP8_PV": fp8_pv,
        **_byproduct_flags(byproducts),
    }
    boxes = {
        "q_desc": ("i8", 64, 128),
        "k_desc": ("i8", 128, 128),
        "v_desc": ("fp8e4nv" if fp8_pv else dtype, 128, 128),
        "out_desc": (dtype, 64, 128),
    }
    form = "int8 fp8" if fp8_pv else "int8"
    name = f"hopper {dtype} D128 128x128 ring {ring} {form}{' byproducts' if byproducts else ''}"
    return _compile_gluon(name, block_sparse_fwd_8bit_sm90, boxes, constants, maxnreg=168)


def _named(form: str, **flags: bool) -> str:
    """The name of a kernel's form and of whatever is switched on in it."""
    return " ".join([form, *(name for name, on in flags.items() if on)])


def _byproduct_flags(on: bool, lse_prev: bool = False) -> dict[str, bool]:
    return {"WITH_LSE": on, "WITH_VOTE": on, "WITH_MASS": on, "HAS_LSE_PREV": lse_prev}


def hopper_mass(
    dtype: str, head_dim: int, block_size: tuple[int, int], *, own_lse: bool, lengths: bool = False
) -> Compiled:
    """Compile the Hopper kernel for exact block mass."""
    from sparsediff.kernels._block_mass_sm90 import block_mass_sm90

    block_d = 64 if head_dim == 64 else 128
    constants = {
        "RING": hopper_mass_ring(block_d),
        "BLOCK_D": block_d,
        "Q_BLOCK": block_size[0],
        "KV_BLOCK": block_size[1],
        "OWN_LSE": own_lse,
        "HAS_LENGTHS": lengths,
    }
    boxes = {"q_desc": (dtype, 64, block_d), "k_desc": (dtype, 128, block_d)}
    form = f"mass {dtype} D{head_dim} {block_size[0]}x{block_size[1]}"
    name = _named(form, **{"own lse": own_lse, "lengths": lengths})
    return _compile_gluon(name, block_mass_sm90, boxes, constants, maxnreg=96)


def _compile_gluon(
    name: str, kernel, boxes: dict[str, tuple[str, int, int]], constants: dict, maxnreg: int
) -> Compiled:
    """Compile a Hopper kernel; `boxes` are dtype, rows and head size of each descriptor's box."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    layouts = {
        bits: gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=4)
        for bits in (8, 16)
    }
    signature = {
        **{
            n: f"tensordesc<{dtype}[1, 1, {rows}, {width}],{layouts[16 if dtype in _DTYPES else 8]!r}>"
            for n, (dtype, rows, width) in boxes.items()
        },
        **dict.fromkeys(("kv_num_blocks_ptr", "kv_indices_ptr", "kv_lengths_ptr"), "*i32"),
        **dict.fromkeys(("order_ptr", "draw_ptr", "totals_ptr", "walk_ptr"), "*i32"),
        "rows_ptr": "*i64",
        **dict.fromkeys(("lse_ptr", "lse_prev_ptr", "mass_ptr", "space_ptr"), "*fp32"),
        **dict.fromkeys(("q_scale_ptr", "k_scale_ptr", "v_scale_ptr", "error_ptr"), "*fp32"),
        "vote_ptr": "*u8",
        "scale": "fp32",
        "vote_threshold": "fp32",
    }
    names = kernel.arg_names
    constants = {n: value for n, value in {**constants, "num_warps": 4}.items() if n in names}
    source = GluonASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else signature.get(n, "i32") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in names if n.endswith("_ptr")},
    )
    return _compile(name, "sm90", source, {"num_warps": 4, "maxnreg": maxnreg})


def _compile(name: str, arch: str, source: ASTSource, options: dict) -> Compiled:
    if arch == AMD:
        compiled = triton.compile(source, target=GPUTarget("hip", AMD, 64), options=options)
        text = compiled.asm["amdgcn"]
        registers, stack = (
            int(re.search(rf"\.{field}:\s+(\d+)", text)[1])
            for field in ("vgpr_count", "private_segment_fixed_size")
        )
        return Compiled(name, arch, registers, stack, compiled.metadata.shared)
    compiled = triton.compile(source, target=GPUTarget("cuda", int(arch[2:]), 32), options=options)
    cubin = compiled.asm["cubin"]
    registers, stack = resources(cubin)
    found: tuple[tuple[int, ...] | int, ...] = ()
    if name.startswith("hopper"):
        instructions = machine_code(cubin)
        found = (
            while_pv_runs(instructions, r"MUFU\.EX2"),
            while_pv_runs(instructions, r"\b(SHFL|REDUX|VOTE|LDG|STG|LDL|STL|LG2)\b"),
            jumped_multiplications(instructions),
            sum("WARPGROUP.DEPBAR" in line for line in instructions),
        )
    tma_loads = 0
    if name.startswith("portable TMA"):
        tma_loads = sum("UTMALDG" in line for line in machine_code(cubin))
    shared = compiled.metadata.shared
    return Compiled(name, arch, registers, stack, shared, *found, tma_loads=tma_loads)


def while_pv_runs(instructions: list[str], pattern: str) -> tuple[int, ...]:
    """For each wait that leaves products in flight: matching instructions issued before the wait for those.

    Nothing in PTX orders arithmetic against that wait, so ptxas may sink the exponentials past it; then a warpgroup's
    softmax no longer hides its own PV although the source says so.
    """
    counts, counting = [], False
    for line in instructions:
        if re.search(r"DEPBAR.LE gsb0, 0x[12]\b", line):
            counts.append(0)
            counting = True
        elif "DEPBAR.LE gsb0, 0x0" in line:
            counting = False
        elif counting and re.search(pattern, line):
            counts[-1] += 1
    return tuple(counts)


def jumped_multiplications(instructions: list[str]) -> tuple[int, ...]:
    """For each jump that a warp takes by vote: the multiplications it leaves out.

    ptxas may turn a jump over little work into predicates; then every tile pays for rescaling the output.  Jumps to a
    wait that was in vain lie beside it; nothing is waited for in what a vote decides on.
    """
    places = {line.strip().removesuffix(":"): i for i, line in enumerate(instructions)}
    counts, voted = [], False
    for i, line in enumerate(instructions):
        words = line.split()
        if "VOTE.ANY" in words:
            voted = True
        elif voted and (found := re.search(r"@!?P\d+ BRA `\((\S+)\)", line)):
            jumped = instructions[i + 1 : places[found[1]]]
            if jumped and not any(re.search(r"\b(HGMMA|BAR|DEPBAR)\b", x) for x in jumped):
                counts.append(sum("FMUL" in x.split() for x in jumped))
                voted = False
    return tuple(n for n in counts if n)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes a thread, as `cuobjdump` reads them off the machine code."""
    text = _tool("cuobjdump", "--dump-resource-usage", cubin)
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def machine_code(cubin: bytes) -> list[str]:
    """The instructions, one a line."""
    return _tool("nvdisasm", "-c", cubin).splitlines()


def _tool(name: str, flag: str, cubin: bytes) -> str:
    binary = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [binary, flag, file.name], capture_output=True, text=True, check=True
        ).stdout


def every_kernel(arch: str) -> Iterator[Compiled]:
    """What is shipped for one architecture, each form once."""
    for head_dim, block_size in (
        *product((64, 128), ((128, 128), (128, 64), (64, 64))),
        *product((96, 256), ((128, 128), (64, 64))),
    ):
        yield portable_attention(arch, "bf16", head_dim, block_size, byproducts=False)
    yield portable_attention(arch, "bf16", 64, (128, 128), byproducts=True)
    yield portable_attention(arch, "fp32", 128, (128, 128), byproducts=False)
    if arch in TMA_ARCHITECTURES:
        yield from tma_attention(arch)
    for dtype, head_dim in (("bf16", 128), ("bf16", 96), ("fp32", 64)):
        yield token_gather(arch, dtype, head_dim)
    yield mask_packing(arch)
    for visits in get_args(Visits):
        yield list_building(arch, visits)
    if arch == "sm90":
        for head_dim, block_n, byproducts in product((64, 128), (128, 64), (False, True)):
            yield hopper_attention("bf16", head_dim, block_n, byproducts=byproducts)
        yield hopper_attention("bf16", 128, 128, byproducts=True, lengths=True)
        yield hopper_attention("fp16", 128, 128, byproducts=False)  # packs by another instruction
        yield hopper_attention("bf16", 64, 128, byproducts=False, lengths=True)
        for head_dim in (64, 128):
            yield hopper_attention("bf16", head_dim, 128, byproducts=True, lse_prev=True)
        for head_dim, more in product((64, 128), (False, True)):
            yield hopper_pairs("bf16", head_dim, lengths=more, lse=more)
        yield hopper_pairs("bf16", 128, form=PairForm(5, False, True))
        yield hopper_pairs("bf16", 64, form=PairForm(5, False, True, wide=True))
        yield pair_joining(arch)
        for fp8_pv, byproducts in product((False, True), (False, True)):
            yield hopper_8bit("bf16", fp8_pv=fp8_pv, byproducts=byproducts)
        yield hopper_8bit("fp16", fp8_pv=False, byproducts=False)  # packs by another instruction
        for shift, norms in product((False, True), (False, True)):
            yield pair_quantizing(arch, shift=shift, norms=norms)
        yield values_quantizing(arch)
        for head_dim, block, own_lse in product((64, 128), (64, 128), (False, True)):
            yield hopper_mass("bf16", head_dim, (block, block), own_lse=own_lse)
        for own_lse in (False, True):
            yield hopper_mass("bf16", 128, (128, 128), own_lse=own_lse, lengths=True)


def tma_attention(arch: str) -> Iterator[Compiled]:
    """The portable attention kernel with tiles loaded by TMA."""
    for head_dim, block_size in (
        *product((64, 128), ((128, 128), (128, 64), (64, 64), (32, 16))),
        *product((96, 256), ((128, 128), (64, 64))),
    ):
        yield portable_attention(arch, "bf16", head_dim, block_size, byproducts=False, tma=True)
    for dtype, head_dim in product(("bf16", "fp16"), (64, 128)):
        yield portable_attention(arch, dtype, head_dim, (128, 128), byproducts=True, tma=True)


def few_kernels(arch: str) -> Iterator[Compiled]:
    """The ones most calls use."""
    yield portable_attention(arch, "bf16", 128, (128, 128), byproducts=True)
    yield portable_attention(arch, "fp16", 64, (64, 64), byproducts=False)
    yield token_gather(arch, "bf16", 128)
    yield mask_packing(arch)
    yield list_building(arch, "centre-out")
    if arch in TMA_ARCHITECTURES:
        yield portable_attention(arch, "bf16", 128, (128, 128), byproducts=True, tma=True)
    if arch == "sm90":
        yield hopper_attention("bf16", 128, 128, byproducts=False)
        yield hopper_attention("bf16", 64, 128, byproducts=True)
        yield hopper_pairs("bf16", 128)
        yield hopper_8bit("bf16", fp8_pv=True, byproducts=True)
        yield pair_quantizing(arch, shift=False, norms=False)
        yield hopper_mass("bf16", 128, (128, 128), own_lse=True)


def main() -> None:
    """Compile for the architectures named on the command line (all, if none is)."""
    quick = "--quick" in sys.argv
    for arch in [a for a in sys.argv[1:] if a != "--quick"] or ARCHITECTURES:
        for compiled in (few_kernels if quick else every_kernel)(arch):
            print(json.dumps(asdict(compiled)), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
