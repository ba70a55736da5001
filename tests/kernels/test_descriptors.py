"""What TMA is told about a tensor: made once for a form, and never of a tensor that it cannot read."""

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from sparsediff.kernels._block_sparse_gluon import tma_descriptor


def seen(descriptor):
    """The tensor as TMA sees it, `[B, H, S, D]`."""
    return descriptor.base.as_strided(descriptor.shape, descriptor.strides)


def make(*shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.bfloat16).view(shape)


@pytest.mark.parametrize(
    "x",
    [
        make(2, 5, 3, 64),
        make(2, 3, 5, 64).transpose(1, 2),
        make(2, 5, 3 * 192).chunk(3, -1)[1].unflatten(-1, (3, 64)),
        make(2, 5, 3, 128)[..., :96],
    ],
    ids=["contiguous", "head-major", "fused", "wide"],
)
def test_a_view_without_a_copy(x):
    descriptor = tma_descriptor(x, 64, 64)
    assert descriptor.base.data_ptr() == x.data_ptr()
    assert torch.equal(seen(descriptor), x.transpose(1, 2))
    assert descriptor.block_shape == [1, 1, 64, 64]


@pytest.mark.parametrize(
    "x",
    [
        make(2, 5, 3, 128)[..., ::2],
        make(2, 5, 3, 65)[..., :64],
        make(1, 1, 3, 64).expand(1, 5, 3, 64),
        make(5 * 3 * 64 + 1)[1:].view(1, 5, 3, 64),
    ],
    ids=["last stride", "odd stride", "stride 0", "address"],
)
def test_what_tma_cannot_read_is_copied(x):
    descriptor = tma_descriptor(x, 64, 64)
    assert descriptor.base.data_ptr() != x.data_ptr()
    assert torch.equal(seen(descriptor), x.transpose(1, 2))


def test_one_form_serves_many_tensors():
    first, second = make(1, 5, 3, 64), make(1, 5, 3, 64) + 1
    descriptors = [tma_descriptor(x, 64, 64) for x in (first, second, first)]
    assert [d.base.data_ptr() for d in descriptors] == [
        x.data_ptr() for x in (first, second, first)
    ]
    assert descriptors[0].layout is descriptors[1].layout


def test_strides_of_single_heads_and_batches_do_not_matter():
    x = make(1, 5, 1, 64).as_strided((1, 5, 1, 64), (7, 64, 3, 1))
    assert torch.equal(tma_descriptor(x, 64, 64).base, x)
    assert tma_descriptor(x, 64, 64).base.data_ptr() == x.data_ptr()
