"""The floor: random blocks, as many as a method keeps."""

import torch

from sparsediff import AttentionSite, TokenGrid
from sparsediff.eval.random_blocks import Random


def test_random_blocks_are_as_many_as_asked_and_the_same_every_time():
    grid = TokenGrid.video(5, 8, 8)
    q = torch.zeros(1, 320, 2, 8)
    site = AttentionSite(
        layer=1, num_layers=2, step=0, num_steps=5, sigma=1.0, branch="", grid=grid
    )
    method = Random(density=0.4)
    keep = method.keep_blocks(q, q, site)
    assert keep.shape == (1, 2, 5, 5)
    assert (keep.sum(-1) == 2).all()
    assert torch.equal(keep, method.keep_blocks(q, q, site))
