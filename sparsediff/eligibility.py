"""Whether an attention call can be served sparse at all: what only the call itself can tell (docs/adr/0003)."""

from __future__ import annotations

from torch import Tensor

from sparsediff.adapter import ModelAdapter
from sparsediff.kernels.attention import DTYPES
from sparsediff.methods import Method
from sparsediff.padding import Packing, pack_padding, valid_keys
from sparsediff.token_grid import TokenGrid

MIN_BLOCKS = 4  # a sequence of fewer key blocks leaves nothing to choose


def why_not_sparse(
    adapter: ModelAdapter,
    method: Method,
    grid: TokenGrid,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    enable_gqa: bool,
) -> str | None:
    """Why the method cannot even be asked about a call over `grid`, for reports; None if it can.

    Tensors are `[B, S, H, D]`.  Nothing is read back to the host.
    """
    if attn_mask is not None and not adapter.reads_masks:
        kind, (batch, keys) = adapter.padding_mask, key.shape[:2]
        valid = None if kind is None else valid_keys(attn_mask, kind)
        if valid is None or valid.shape not in ((1, keys), (batch, keys)):
            return adapter.mask_reason
    if is_causal:
        return "causal attention"
    if query.dtype not in DTYPES:
        return f"{str(query.dtype).removeprefix('torch.')} tensors"
    grouped = enable_gqa and query.shape[2] % key.shape[2] == 0
    fit = query.shape[3] == key.shape[3] and (grouped or query.shape[2] == key.shape[2])
    if not fit or (grid.queries is None and query.shape[1] != key.shape[1]):
        return f"queries {list(query.shape[1:])} and keys {list(key.shape[1:])} differ in shape"
    if value.shape != key.shape:
        return f"keys {list(key.shape[1:])} and values {list(value.shape[1:])} differ in shape"
    if query.shape[1] != grid.num_queries:
        return (
            f"a sequence of {query.shape[1]} tokens, where the grid {grid} has {grid.num_queries}"
        )
    block = method.block_size(grid)[1]
    if -(-grid.num_tokens // block) < MIN_BLOCKS:
        return f"{grid.num_tokens} tokens are too few: fewer than {MIN_BLOCKS} blocks of {block}"
    return None


def packing_of(
    adapter: ModelAdapter, grid: TokenGrid, attn_mask: Tensor | None, batch: int
) -> Packing:
    """What hides the keys that a padding mask hides; `why_not_sparse` has understood the mask."""
    if attn_mask is None or adapter.reads_masks:
        return Packing(grid=grid)
    valid = valid_keys(attn_mask, adapter.padding_mask)
    return pack_padding(grid, valid, batch, last=adapter.pads_last)
