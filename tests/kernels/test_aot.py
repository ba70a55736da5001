"""Every kernel compiles for every architecture, and its machine code is what the source means.  No GPU needed."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

ARCHITECTURES = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "gfx942")


def compile_ahead(*arguments):
    # The interpreter switches code generation off for the whole process: compile in another.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "sparsediff.kernels.aot", *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def assert_sound(kernel):
    name = kernel["kernel"]
    if "two programs" in name:
        assert kernel["registers"] == 80, "two programs share the registers of a multiprocessor"
        assert kernel["stack_bytes"] == 0, kernel
        # ptxas would end every single product before the next if it were short of registers.
        assert kernel["waits"] == 10, (
            "two of each of S and PV in both warpgroups and S made again, none inside a product"
        )
        assert kernel["shared_bytes"] <= (228 // 2 - 1) * 1024, "two programs a multiprocessor"
    elif name.startswith("hopper"):
        assert kernel["registers"] == 168, "the warpgroups' register budget starts from 168"
        # With by-products a few registers are set aside between rows of blocks.
        some = "byproducts" in name or name.endswith("lse")
        assert kernel["stack_bytes"] <= (32 if some else 0), kernel
        tile_columns = int(name.split("128x")[1].split()[0])
        assert len(kernel["overlapped_exponentials"]) == 2, name
        # Each thread has half a row of a 64-row tile pair: BLOCK_N / 2 exponentials, minus a few that may lag.
        assert min(kernel["overlapped_exponentials"]) >= tile_columns // 2 - 4, (
            "the softmax does not hide PV"
        )
        if "int8" not in name and "pairs" not in name:
            # One vote: whether a warp must do the tile again.  At head size 64 nothing hides what else waits there.
            assert kernel["detours"] == [1, 1], "by-products hold up the softmax"
        each = 32 if " D64 " in name else 64  # a thread has half a row of the output
        if "wide" in name:
            # Only what both rows want has no running maximum: jumps before, between and after.
            assert kernel["jumped_multiplications"] == [each] * 6, kernel
        elif "fp8" not in name:
            # What does a tile again, once in each warpgroup: the output under another maximum, beside little else.
            assert len(kernel["jumped_multiplications"]) == 2, kernel
            assert min(kernel["jumped_multiplications"]) >= each, kernel
            assert max(kernel["jumped_multiplications"]) < 1.5 * each, kernel
        # S twice and PV twice in both warpgroups; the wide kernel has blocks of one row alone besides, and makes S again
        assert kernel["waits"] == (18 if "wide" in name else 8), "ptxas has serialised products"
    elif name.startswith("mass"):
        assert kernel["registers"] == 96, "five warpgroups' register budget starts from 96"
        # Set aside between rows; none of it in the loop
        assert kernel["stack_bytes"] <= 48, kernel
    elif name.startswith("quantise"):
        # With both by-products a few registers of a query are set aside.
        assert kernel["stack_bytes"] <= (32 if "shift norms" in name else 0), kernel
        if "pair" in name:
            assert kernel["registers"] <= 80, "three programs share a multiprocessor's registers"
    else:
        # A few spills before and after the loop are harmless; hundreds of bytes are in the loop.
        assert kernel["stack_bytes"] <= 192, kernel
    if "TMA" in name:
        # The query; keys and values of the first block, before the loop and in it
        assert kernel["tma_loads"] >= 7, kernel
    limit = {"sm86": 99, "sm89": 99, "sm120": 99, "sm80": 163, "gfx942": 64}.get(
        kernel["arch"], 227
    )
    assert kernel["shared_bytes"] <= limit * 1024, kernel


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_common_kernels_compile_without_spilling(arch):
    kernels = compile_ahead("--quick", arch)
    assert len(kernels) >= 2
    for kernel in kernels:
        assert_sound(kernel)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_compiles_without_spilling(arch):
    for kernel in compile_ahead(arch):
        assert_sound(kernel)
