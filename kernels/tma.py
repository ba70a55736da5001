"""What TMA, the copy engine of NVIDIA's Hopper and later cards, can read of a tensor: shared by every kernel that uses it."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

Form = TypeVar("Form")


def head_strides(
    itemsize: int, shape: tuple[int, int, int, int], strides: tuple[int, int, int, int]
) -> list[int] | None:
    """Strides `[B, H, S, D]` of a `[B, S, H, D]` tensor for TMA, or None if it cannot read the tensor.

    It wants a unit last stride and every other one positive and on 16 bytes.
    """
    if 0 in shape:
        return None
    unit = 16 // itemsize
    # The stride of a dimension of size 1 is never used, but it is checked.
    step = [s if size > 1 else shape[3] * 16 for s, size in zip(strides, shape, strict=True)]
    if strides[3] != 1 or any(s <= 0 or s % unit for s in step[:3]):
        return None
    return [step[0], step[2], step[1], 1]


def readable(x: Tensor) -> bool:
    """Whether TMA can read `[B, S, H, D]` as it lies: `head_strides`, from an address on 16 bytes."""
    return x.data_ptr() % 16 == 0 and _readable_form(x.dtype.itemsize, x.shape, x.stride())


@lru_cache(maxsize=256)
def _readable_form(
    itemsize: int, shape: tuple[int, int, int, int], strides: tuple[int, int, int, int]
) -> bool:
    return head_strides(itemsize, shape, strides) is not None


def tile_descriptor(x: Tensor, rows: int, block_d: int):
    """Descriptor `[B, H, S, D]` of a `readable` `[B, S, H, D]`, in boxes of `rows x block_d`, for `@triton.jit` kernels.

    Past the ends of the tensor, TMA reads zeros.
    """
    return at(_tile_form(x.dtype, x.shape, x.stride(), rows, block_d), x)


def at(form: Form, x: Tensor) -> Form:
    """A checked descriptor moved to the address of `x`: making one takes longer than launching a kernel."""
    descriptor = copy.copy(form)
    descriptor.base = x
    return descriptor


@lru_cache(maxsize=256)
def _tile_form(
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    strides: tuple[int, int, int, int],
    rows: int,
    block_d: int,
):
    from triton.tools.tensor_descriptor import TensorDescriptor

    batch, seq, heads, dim = shape
    return TensorDescriptor(
        torch.empty(0, dtype=dtype),
        [batch, heads, seq, dim],
        head_strides(dtype.itemsize, shape, strides),
        [1, 1, rows, block_d],
    )
