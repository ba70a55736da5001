"""Z-Image (base, Turbo, Edit): one stream of image and caption, image first.

Image and caption are each padded to whole multiples of 32 tokens with learned tokens that the stock model attends to
like any other; they count as text here.  Captions of a batch that differ in length bring a mask, which hides what is
behind the shorter ones.  The four refiner blocks, over the image or the caption alone, stay stock.  Guidance branches
come in one batch.  Z-Image Omni mixes several captions and images in one sequence; it runs dense and says so.

A 1024x1024 image is 4,096 tokens, too few for sparse attention to pay on a GPU; 2048x2048 is 16,384.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sparsediff.adapter import ModelAdapter
from sparsediff.token_grid import TokenGrid

MULTIPLE = 32  # tokens that image and caption are padded to


class ZImageAdapter(ModelAdapter):
    """`ZImageTransformer2DModel`."""

    processors = frozenset({"ZSingleStreamAttnProcessor"})
    attention = (("layers", "attention"),)
    padding_mask = "keys"
    pads_last = True

    def token_grid(self, model: nn.Module, arguments: Mapping[str, object]) -> TokenGrid:
        """`x`, a list of images `[C, F, H, W]`, and behind it the longest of the captions `cap_feats [T, C]`."""
        images, captions = arguments["x"], arguments["cap_feats"]
        if isinstance(images[0], list):
            raise ValueError("Omni sequences of several captions and images are not mapped")
        sizes = {tuple(image.shape[1:]) for image in images}
        if len(sizes) > 1:
            raise ValueError(f"images of different sizes in one batch: {sorted(sizes)}")
        frames, height, width = sizes.pop()
        patch, patch_t = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
        grid = (frames // patch_t, height // patch, width // patch)
        padding = -(grid[0] * grid[1] * grid[2]) % MULTIPLE
        caption = max(len(words) for words in captions)
        return TokenGrid.video(*grid, text=padding + caption + -caption % MULTIPLE)

    def head_dim(self, model: nn.Module) -> int:
        """Channels of one attention head."""
        return model.config.dim // model.config.n_heads

    def num_heads(self, model: nn.Module) -> int:
        """Attention heads of one layer."""
        return model.config.n_heads

    def timestep(self, arguments: Mapping[str, object]) -> Tensor | None:
        """Z-Image is called with how much is done, from 0 to 1."""
        done = arguments.get("t")
        return None if done is None else (1 - done) * 1000
