"""Every kernel once on small, ragged shapes: what compute-sanitizer looks at.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m sparsediff.kernels.smoke triton

Without PyTorch's cache of freed memory every tensor ends where it ends.  Results are checked elsewhere.
"""

from __future__ import annotations

import sys

import torch

from sparsediff.block_mask import BlockMask
from sparsediff.kernels import block_bitmap, block_lists, block_scores, token_order
from sparsediff.kernels.attention import attend_blocks
from sparsediff.kernels.bench_inputs import DEVICE, make_inputs, spoil

# Backend -> blocks and head size
FORMS = {
    "triton": (((128, 128), 128), ((64, 64), 64), ((128, 64), 96)),
    "triton_tma": (((128, 128), 128), ((64, 64), 64), ((128, 64), 96)),
    "gluon": (((128, 128), 128), ((128, 64), 64)),
    "gluon_pairs": (((64, 64), 128), ((64, 64), 64)),
    "gluon_int8": (((128, 128), 128),),
    "gluon_fp8": (((128, 128), 128),),
}


def main() -> None:
    """Run the backends named on the command line (all, if none is), then what builds masks and moves tokens."""
    names = sys.argv[1:] or list(FORMS)
    for name in names:
        for block_size, head_dim in FORMS[name]:
            attend(name, block_size, head_dim)
    if "gluon" in names:
        q, k, _ = make_inputs((2, 3, 300, 64))
        block_scores.block_mass(q, k, (64, 64))
    if "triton" in names:
        masks_and_orders()
    torch.cuda.synchronize()


def attend(backend: str, block_size: tuple[int, int], head_dim: int) -> None:
    """Attention with and without by-products, over a ragged end, a full block and an empty row."""
    for seq in (1, 129, 300):
        q, k, v = make_inputs((2, 2, seq, head_dim), seed=seq)
        blocks = -(-seq // block_size[0]), -(-seq // block_size[1])
        keep = torch.rand(2, 2, *blocks, device=DEVICE) < 0.6
        keep[0, 0, -1] = False
        mask = spoil(BlockMask.from_dense(keep, block_size, (seq, seq)))
        attend_blocks(q, k, v, mask, backend=backend)
        attend_blocks(q, k, v, mask, backend=backend, return_lse=True, vote_threshold=-1.0)
        lengths = torch.tensor([seq // 2, seq], device=DEVICE, dtype=torch.int32)
        attend_blocks(q, k, v, mask, backend=backend, kv_lengths=lengths, return_mass=True)
        attend_blocks(q, k, v, mask, backend=backend, kv_lengths=lengths, return_lse=True)


def masks_and_orders() -> None:
    """Pooling, lists, bitmaps and reordering."""
    q, k, v = make_inputs((2, 3, 300, 64))
    scores = block_scores.pooled_scores(q, k, (64, 64))
    counts, _ = block_lists.lists_from_top_k(scores, 2)
    block_lists.order(counts, 2, 3)
    forced = torch.zeros(5, 5, device=DEVICE, dtype=torch.bool)
    packed = block_bitmap.pack_mask(scores > 0, forced, (64, 64), (300, 300))
    block_lists.lists_from_bitmap(packed.bitmap, 5)
    block_lists.lists_from_bitmap(packed.bitmap, 5, "centre-out", ragged=True)
    index = torch.stack([torch.randperm(300, device=DEVICE) for _ in range(2)]).int()
    token_order.gather_tokens((q, k, v), index)
    heads = torch.tensor([0, 1, 0], device=DEVICE, dtype=torch.int32)
    token_order.gather_tokens((q,), index, heads)


if __name__ == "__main__":
    main()
