"""Ours beside other people's kernels: the same inputs and the same lists, in the same process.

A peer is a yardstick and never a dependency: one that is not installed is listed with the reason.  FlashAttention-4
(CuTe) is `pip install flash-attn-4`; cuDNN, FlashAttention-2 and FlexAttention come with PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsediff.block_mask import BlockMask
from sparsediff.kernels.attention import attend_blocks, select_backend
from sparsediff.kernels.bench_inputs import (
    DENSITIES,
    SHAPES,
    make_inputs,
    make_mask,
    median_ms,
    tile_flops,
    timing,
)

DENSE = ("sdpa cudnn", "sdpa flash", "fa4")  # the best of them at density 1 is the yardstick
# FlexAttention compiles anew for every shape; two show where it stands.
FLEX_SHAPES = ("wan32", "wan75")

Call = Callable[[], Tensor]


def time_peers() -> Iterator[dict]:
    """Every importable peer at every shape and density; dense ones are the yardstick at density 1."""
    for shape, size in SHAPES.items():
        q, k, v = make_inputs(size)
        for density in DENSITIES:
            mask = make_mask(size, (128, 128), density)
            calls, absent = _calls(shape, density, q, k, v, mask)
            yield from absent
            errors = {name: _row_error(call(), q, k, v, mask) for name, call in calls.items()}
            # There and back: whoever runs on a hotter device in one direction runs first in the other.
            there = {name: median_ms(call, 300) for name, call in calls.items()}
            back = {name: median_ms(calls[name], 300) for name in reversed(calls)}
            for name in calls:
                yield timing(
                    shape,
                    name,
                    density,
                    (there[name] + back[name]) / 2,
                    tile_flops(mask, size[1], size[3]),
                    block=[128, 128],
                    area_density=round(mask.density, 4),
                    two_runs_ms=[round(there[name], 4), round(back[name], 4)],
                    error=float(f"{errors[name]:.2e}"),
                )
        del q, k, v


def _calls(
    shape: str, density: float, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask
) -> tuple[dict[str, Call], list[dict]]:
    """What can run here, by name, and one record for each peer that cannot."""
    backend = select_backend(q.device, q.dtype, q.shape[-1], mask.block_size).name
    calls: dict[str, Call] = {backend: lambda: attend_blocks(q, k, v, mask, backend=backend).out}
    absent = []
    if density == 1:
        calls["sdpa cudnn"] = partial(_sdpa, SDPBackend.CUDNN_ATTENTION, q, k, v)
        calls["sdpa flash"] = partial(_sdpa, SDPBackend.FLASH_ATTENTION, q, k, v)
    elif shape in FLEX_SHAPES:
        calls["flex_attention"] = partial(_flex, q, k, v, mask.to_flex())
    try:
        calls["fa4"] = _fa4(q, k, v, None if density == 1 else mask)
    except ImportError as error:
        absent.append({"kind": "absent", "peer": "fa4", "shape": shape, "why": str(error)})
    return calls, absent


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    return out.transpose(1, 2)


@cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _compiled_flex()(q, k, v, block_mask=mask).transpose(1, 2)


def _fa4(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None) -> Call:
    """FlashAttention-4 in CuTe, dense or over the same whole blocks."""
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    lists = None
    if mask is not None:
        lists = BlockSparseTensorsTorch(
            mask_block_cnt=torch.zeros_like(mask.kv_num_blocks),
            mask_block_idx=torch.zeros_like(mask.kv_indices),
            full_block_cnt=mask.kv_num_blocks,
            full_block_idx=mask.kv_indices,
            block_size=mask.block_size,
        )

    def call() -> Tensor:
        result = flash_attn_func(q, k, v, block_sparse_tensors=lists)
        return result[0] if isinstance(result, tuple) else result

    return call


def _row_error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> float:
    """Relative error of the last query block of the last head against float64."""
    (bq, bk), (seq_q, seq_k), row = mask.block_size, mask.seq_lengths, mask.num_blocks[0] - 1
    listed = mask.kv_indices[-1, -1, row, : mask.kv_num_blocks[-1, -1, row]].long()
    columns = (listed[:, None] * bk + torch.arange(bk, device=q.device)).flatten()
    columns = columns[columns < seq_k]
    rows = slice(row * bq, seq_q)
    queries, keys, values = q[-1, rows, -1], k[-1, columns, -1], v[-1, columns, -1]
    scores = queries.double() @ keys.double().mT * q.shape[-1] ** -0.5
    exact = scores.softmax(-1) @ values.double()
    return ((out[-1, rows, -1] - exact).norm() / exact.norm()).item()
