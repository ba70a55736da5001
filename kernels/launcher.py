"""Launches Triton kernels without finding out anew which binary a call needs.

Triton binds and classifies every argument of every launch, 11 of the 13 microseconds that one takes on the host, and a
call of attention is several launches.  Who launches here says when two calls are alike, and the second goes straight
to the binary of the first.
"""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor

# (kernel, form) -> its binary and the values of its compile-time arguments; forms of a few shapes are alive at a time.
_binaries: dict[tuple[int, Hashable], tuple[object, tuple]] = {}
MAX_BINARIES = 1024


def launch_kernel(
    kernel, grid: tuple[int, ...], form: Hashable, arguments: tuple, **constants: object
) -> None:
    """`kernel[grid](*arguments, **constants)`.

    Args:
        kernel: a `@triton.jit` or `@gluon.jit` function whose compile-time parameters come last.
        grid: programs in up to three dimensions.
        form: equal for two calls only if all that Triton compiles for is: device, dtypes, numbers (their being 1, a
            multiple of 16 or beyond 32 bits), the alignment of pointers (`aligned`), and `constants`.
        arguments: all others, in order.
        constants: compile-time arguments and options such as `num_warps`.
    """
    key = (id(kernel), form)
    known = _binaries.get(key)
    if known is not None:
        binary, values = known
        binary[(*grid, 1, 1)[:3]](*arguments, *values)
        return
    binary = kernel[grid](*arguments, **constants)
    if binary is not None:  # the interpreter makes none
        if len(_binaries) >= MAX_BINARIES:
            _binaries.clear()
        names = kernel.arg_names[len(arguments) :]
        _binaries[key] = binary, tuple(constants[name] for name in names)


def aligned(*tensors: Tensor) -> int:
    """Which tensors start on 16 bytes, as bits: part of a `form`."""
    bits = 0
    for x in tensors:
        bits = 2 * bits + (x.data_ptr() % 16 == 0)
    return bits
