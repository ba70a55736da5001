"""Bounds on what measuring takes beside a run of the model itself.

At 75,600 tokens, 40 heads and a head size of 128, a tensor of one attention call is 774 MB in 16 bits, and one float32
score for every pair of tokens of one head is 23 GB.  So whatever calibrators look at is looked at a few heads, and a
few rows, at a time: `CHUNK_BYTES` is what all temporaries of one such look may take together.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_BYTES = 256 << 20  # on the device


def how_many_fit(size: int) -> int:
    """Things of `size` bytes that `CHUNK_BYTES` hold; one at least."""
    return max(1, CHUNK_BYTES // max(1, size))


def head_groups(tensor: Tensor, copies: int) -> Iterator[slice]:
    """Runs of the heads of `[B, S, H, D]` small enough for `copies` of them, in the tensor's dtype, to fit; one at least."""
    heads = tensor.shape[2]
    step = how_many_fit(copies * tensor.element_size() * tensor.numel() // max(1, heads))
    return (slice(start, min(heads, start + step)) for start in range(0, heads, step))


def relative_error(actual: Tensor, exact: Tensor, power: int) -> Tensor:
    """`|actual - exact|_p / |exact|_p` of tensors `[B, S, H, D]`, p = `power`: a float64 scalar on their device."""
    difference, size = (torch.zeros((), dtype=torch.float64, device=exact.device) for _ in "ab")
    for heads in head_groups(exact, copies=3 * 4 // exact.element_size()):
        # Half precision overflows in the sum, and rounds in the difference.
        b = exact[:, :, heads].float()
        a = actual[:, :, heads].float() - b
        difference += torch.linalg.vector_norm(a, power).double() ** power
        size += torch.linalg.vector_norm(b, power).double() ** power
    return (difference / size.clamp_min(1e-40)) ** (1 / power)


def require_host_memory(needed: int, what: str, fix: str) -> None:
    """Refuse at once what the machine would be killed for after hours.

    Raises:
        ValueError: `needed` bytes are more than this machine has; the message says `what` takes them, and the `fix`.
    """
    held = host_memory()
    if held is not None and needed > held:
        raise ValueError(
            f"{what} takes {needed / 2**30:,.1f} GiB of the host's memory, and this machine has {held / 2**30:,.1f}; {fix}"
        )


def host_memory() -> int | None:
    """Bytes of memory of this machine; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
