"""Running maxima that move late and far, for kernels that do a tile again then, under the emulator."""

import torch
from gluon_emulator import Pointer

from sparsediff.block_mask import BlockMask
from sparsediff.kernels._block_sparse_reference import attend as reference


class Redone:
    """How often a tile was exponentiated again: the vote of `are_beyond`, for a whole warpgroup."""

    count = 0

    def __call__(self, b_parts, *_):
        beyond = bool((b_parts > 4096).any())
        self.count += beyond
        return int(beyond)


class Address(Pointer):
    """A pointer that is a number: bytes are added to it."""

    def __init__(self, data, offset, size) -> None:
        super().__init__(data, offset)
        self.size = size

    def to(self, _):
        return self

    def __add__(self, number):
        return Address(self.data, self.offset + number // self.size, self.size)


def store_vote(b_gap, address):
    """One predicated store for each warp of 16 rows."""
    for wanted, place in zip(
        (b_gap > 0).view(4, 16).any(1), address.offset.view(4, 16)[:, 0], strict=True
    ):
        if wanted:
            address.data[place] = 1


def mass_place(p_space, group, _):
    o_m = torch.arange(64)
    return Address(p_space.data, p_space.offset + group * 64 + o_m, 4)


def store_pair(b_x, address):
    address.data[address.offset] = b_x


def make(seed, spread, *, dim=128, block_n=128, dtype=torch.bfloat16):
    """Inputs whose logits have that standard deviation, with an empty row of blocks."""
    g = torch.Generator().manual_seed(seed)
    batch, heads, seq_q, seq_k = 1, 2, 300, 700
    q, k, v = (
        torch.randn(batch, s, heads, dim, generator=g).to(dtype) for s in (seq_q, seq_k, seq_k)
    )
    keep = torch.rand(batch, heads, 3, -(-seq_k // block_n), generator=g) < 0.7
    keep[0, 1, 1] = False
    return q * spread, k, v, BlockMask.from_dense(keep, (128, block_n), (seq_q, seq_k))


def errors(out, lse, q, k, v, mask, **options):
    """Relative error of the output and largest one of the log-sum-exp."""
    want, want_lse, *_ = reference(
        q.double(),
        k.double(),
        v.double(),
        mask,
        scale=q.shape[-1] ** -0.5,
        want_lse=True,
        **options,
    )
    finite = want_lse.isfinite()
    assert torch.equal(finite, lse.isfinite())
    return (out - want).norm() / want.norm(), (lse - want_lse)[finite].abs().max()
