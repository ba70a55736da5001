"""Storing masks: the kernel, run by Triton's interpreter, and plain torch against the mask's own forms."""

import pytest
import torch

from sparsediff.block_mask import BlockMask, unpack_bits
from sparsediff.kernels.attention import _why_not_triton
from sparsediff.kernels.block_bitmap import pack_mask, pack_mask_reference, pack_mask_triton

INTERPRETED = not _why_not_triton(torch.device("cpu"), torch.float32, 64, (64, 64))
FORMS = (pack_mask_reference, *([pack_mask_triton] if INTERPRETED else []))


def make(rows, columns, *, batch=2, heads=3, density=0.4):
    g = torch.Generator().manual_seed(rows + columns)
    keep = torch.rand(batch, heads, rows, columns, generator=g) < density
    keep[0, 0, -1] = False
    return keep, torch.rand(rows, columns, generator=g) < 0.1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("seq_q", "seq_k"), [(1, 1), (63, 65), (64, 512), (130, 1000), (200, 127), (16, 17_000)]
)
def test_every_form_of_keep_or_forced(form, seq_q, seq_k):
    block_size = (16, 8)
    keep, forced = make(-(-seq_q // 16), -(-seq_k // 8))
    packed = form(keep, forced, block_size, (seq_q, seq_k))
    want = BlockMask.from_dense(keep | forced, block_size, (seq_q, seq_k))
    assert torch.equal(packed.bitmap, want.to_bitmap())
    torch.testing.assert_close(packed.density, want.density_per_head().mean(0))
    mask = BlockMask(*packed.lists, block_size, (seq_q, seq_k))
    assert torch.equal(mask.to_dense(), keep | forced)
    listed = torch.arange(mask.num_blocks[1]) < mask.kv_num_blocks[..., None]
    ascending = mask.kv_indices[..., 1:] > mask.kv_indices[..., :-1]
    assert (ascending | ~listed[..., 1:]).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_bitmap_evolves_in_place(form):
    keep, forced = make(9, 77)
    first = form(keep, forced, (64, 64), (570, 4900), want_lists=False)
    assert first.lists is None
    vote = unpack_bits(first.bitmap, 77) & (torch.arange(77) % 3 != 0)
    memory = first.bitmap.data_ptr()
    second = form(vote, forced, (64, 64), (570, 4900), bitmap=first.bitmap, want_lists=False)
    assert second.bitmap.data_ptr() == memory
    assert torch.equal(unpack_bits(second.bitmap, 77), vote | forced)
    assert (second.density < first.density).all()


def test_masks_that_do_not_fit_are_refused():
    keep, forced = make(4, 6)
    with pytest.raises(ValueError, match=r"bool \[B, H, Mq, Nk\] and forced its last two"):
        pack_mask(keep, forced[:3], (64, 64), (256, 384))
    with pytest.raises(ValueError, match=r"got torch.float32"):
        pack_mask(keep.float(), forced, (64, 64), (256, 384))
