"""What families of video models share: the grid of a latent video that the transformer itself cuts into patches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from sparsediff.token_grid import TokenGrid


def video_grid(
    model: nn.Module, arguments: Mapping[str, object], *, text: int = 0, text_first: bool = False
) -> TokenGrid:
    """`hidden_states [B, C, F, H, W]` in patches of `config.patch_size`, in one sequence with `text` tokens.

    A patch is three sizes, or one for rows and columns beside `config.patch_size_t` (1 if there is none) for frames.

    Raises:
        ValueError: the latent video is no whole number of patches.
    """
    patch = model.config.patch_size
    if isinstance(patch, int):
        patch = (getattr(model.config, "patch_size_t", None) or 1, patch, patch)
    sizes = arguments["hidden_states"].shape[2:]
    return patched(sizes, patch, text=text, text_first=text_first)


def patched(
    sizes: Sequence[int], patch: Sequence[int], *, text: int = 0, text_first: bool = False
) -> TokenGrid:
    """A latent video of `sizes` (frames, height, width) in patches, in one sequence with `text` tokens.

    Raises:
        ValueError: the latent video is no whole number of patches.
    """
    if any(n % p for n, p in zip(sizes, patch, strict=True)):
        raise ValueError(
            f"latent video {tuple(sizes)} is not a multiple of the patch {tuple(patch)}"
        )
    shape = (n // p for n, p in zip(sizes, patch, strict=True))
    return TokenGrid.video(*shape, text=text, text_first=text_first)


def history_tokens(latents: Tensor, patch: Sequence[int]) -> int:
    """Tokens that `latents [B, C, F, H, W]` of an earlier part make in patches; models pad what is no whole number of them."""
    return math.prod(-(-n // p) for n, p in zip(latents.shape[2:], patch, strict=True))
