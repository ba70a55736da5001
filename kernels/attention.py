"""Block-sparse attention: the public operation, its checks and its choice of backend.

    out[b, i, h] = sum_j softmax_j(scale * q[b, i, h] . k[b, j, h]) v[b, j, h]

with `j` running over the tokens of the key blocks that the mask keeps for the query block of `i`.

| backend     | device | dtypes           | head_dim | what it is                                             |
|-------------|--------|------------------|----------|--------------------------------------------------------|
| `reference` | any    | fp16, bf16, fp32 | any      | slow and obvious; defines the others                   |
| `cpu`       | CPU    | fp16, bf16, fp32 | any      | faster than dense attention below `CPU_BREAK_EVEN`     |
| `triton`    | CUDA   | fp16, bf16, fp32 | 64, 96, 128, 256 | portable kernel, SM80 and newer; blocks of multiples of 16 |
| `triton_tma` | SM90, newer | fp16, bf16  | 64, 96, 128, 256 | the same, tiles loaded by TMA where it can read the tensors; newer than SM90 by name |
| `gluon`     | SM90   | fp16, bf16       | 64, 96, 128 | Hopper kernel (TMA, warp specialisation); blocks 128x128, 128x64 |
| `gluon_pairs` | SM90  | fp16, bf16       | 64, 96, 128 | Hopper kernel for blocks of 64x64, two rows a program; a vote or mass: the portable kernel |
| `gluon_int8` | SM90  | fp16, bf16       | 128      | the same with 8-bit logits: faster, less exact, by name only |
| `gluon_fp8` | SM90   | fp16, bf16       | 128      | 8-bit values as well: faster and less exact again, by name only |

The vote is LiteAttention's (arXiv 2511.11062); the exact block mass under a cached log-sum-exp is AdaSpa's
(arXiv 2502.21079).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from sparsediff.block_mask import BlockMask

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Kept share of the blocks above which dense attention (scaled_dot_product_attention) is faster on a CPU: measured
# between 0.67 and 0.88 on one thread of an AMD EPYC (docs/benchmarks/kernels_cpu.json); a little is left for more
# threads.  The backend itself stays exact above it; callers who can run dense should.
CPU_BREAK_EVEN = 0.65

# What makes the portable kernel serve calls that the one for pairs of rows could
NO_BYPRODUCTS = "finds no votes and no mass"

# name -> module and function, of the reference's signature
_BACKENDS = {
    "reference": ("sparsediff.kernels._block_sparse_reference", "attend"),
    "cpu": ("sparsediff.kernels._block_sparse_cpu", "attend"),
    "triton": ("sparsediff.kernels._block_sparse_triton", "attend"),
    "triton_tma": ("sparsediff.kernels._block_sparse_triton", "attend_tma"),
    "gluon": ("sparsediff.kernels._block_sparse_gluon", "attend"),
    "gluon_pairs": ("sparsediff.kernels._block_sparse_pair_gluon", "attend"),
    "gluon_int8": ("sparsediff.kernels._block_sparse_8bit_gluon", "attend_int8"),
    "gluon_fp8": ("sparsediff.kernels._block_sparse_8bit_gluon", "attend_fp8"),
}


class AttentionOutput(NamedTuple):
    """What one attention call returns; by-products that were not asked for are None.

    Attributes:
        out: `[B, S, H, D]`, query's dtype, contiguous.
        lse: `float32 [B, H, Sq]`, natural log; -inf for rows that attend to nothing.
        vote: `bool [B, H, Mq, Nk]`, visited blocks worth visiting at the next step; False where not visited.
        mass: `float32 [B, H, Mq, Nk]`, softmax mass of each visited block, summed over the block's query rows.
    """

    out: Tensor
    lse: Tensor | None = None
    vote: Tensor | None = None
    mass: Tensor | None = None


@dataclass(frozen=True)
class BackendChoice:
    """Which backend runs and, in one line for people, why."""

    name: str
    reason: str


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the blocks that `mask` keeps; skipped blocks cost nothing.

    Args:
        query: `[B, Sq, H, D]`, any strides.
        key: `[B, Sk, H, D]`.
        value: `[B, Sk, H, D]`.
        mask: over `(Sq, Sk)`; a batch or head dimension of 1 serves all.
        scale: of the logits; `1 / sqrt(D)` unless given.
        return_lse: also return the log-sum-exp, with which partial results merge.
        backend: a name from `available_backends()`, or `"auto"`.

    Returns:
        `[B, Sq, H, D]` in query's dtype, or `(out, lse)` with `lse` `float32 [B, H, Sq]`.  A query block that keeps
        nothing gives zeros and -inf.

    Raises:
        ValueError: shapes, devices, mask or backend do not fit; the message says what would.
        TypeError: a dtype that is not served.
    """
    result = attend_blocks(
        query, key, value, mask, scale=scale, return_lse=return_lse, backend=backend
    )
    return (result.out, result.lse) if return_lse else result.out


def attend_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    kv_lengths: Tensor | None = None,
    vote_threshold: float | None = None,
    lse_prev: Tensor | None = None,
    return_lse: bool = False,
    return_mass: bool = False,
    backend: str = "auto",
) -> AttentionOutput:
    """`block_sparse_attention` with the by-products that temporal methods live on.

    Args:
        query: `[B, Sq, H, D]`, any strides.
        key: `[B, Sk, H, D]`.
        value: `[B, Sk, H, D]`.
        mask: over `(Sq, Sk)`; a batch or head dimension of 1 serves all.
        scale: of the logits; `1 / sqrt(D)` unless given.
        kv_lengths: `int32 [B]`; keys at or past it are not attended, blocks wholly past it not visited.  Needs a mask
            of ascending lists (`visits="descending"`).
        vote_threshold: in log2 units, usually negative; asks for `vote`.  Blocks of a row are visited as `mask.visits`
            says, from the last to the first unless told otherwise; a block's bit is set if it is the first visited or if in any of its query rows the best
            logit exceeds the running best of the blocks before it by more than the threshold.
        lse_prev: `float32 [B, H, Sq]`, the log-sum-exp under which `mass` is taken (an earlier step's, say) instead
            of this call's own.  A row where it is -inf contributes nothing.
        return_lse: fill `lse`.
        return_mass: fill `mass`; with this call's own log-sum-exp a row of blocks sums to its query rows.
        backend: a name from `available_backends()`, or `"auto"`.

    Raises:
        ValueError: shapes, devices, mask or backend do not fit; the message says what would.
        TypeError: a dtype that is not served.
    """
    _check(query, key, value, mask, scale, kv_lengths, lse_prev)
    out, lse, vote, mass = torch.ops.sparsediff.attend_blocks(
        query,
        key,
        value,
        mask.kv_num_blocks,
        mask.kv_indices,
        list(mask.block_size),
        query.shape[-1] ** -0.5 if scale is None else float(scale),
        kv_lengths,
        None if vote_threshold is None else float(vote_threshold),
        lse_prev,
        return_lse,
        return_mass,
        backend,
    )
    return AttentionOutput(
        out,
        lse if return_lse else None,
        vote if vote_threshold is not None else None,
        mass if return_mass else None,
    )


def run_backend(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    scale: float,
    **options: object,
) -> AttentionOutput:
    """What the operation runs, for callers that are inside an opaque operation already and have checked their inputs.

    Args:
        name: of a backend that serves the call, from `select_backend`.
        query: `[B, Sq, H, D]`; key, value and mask as for `attend_blocks`.
        key: `[B, Sk, H, D]`.
        value: `[B, Sk, H, D]`.
        mask: over `(Sq, Sk)`.
        scale: of the logits.
        options: `kv_lengths`, `vote_threshold`, `lse_prev`, `want_lse` and `want_mass` of the backends.
    """
    module, function = _BACKENDS[name]
    attend = getattr(import_module(module), function)
    return AttentionOutput(*attend(query, key, value, mask, scale=scale, **options))


# -- backends -----------------------------------------------------------------------------------------------------


def select_backend(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    block_size: tuple[int, int],
    backend: str = "auto",
    *,
    byproducts: bool = False,
) -> BackendChoice:
    """Which backend serves such a call, with a vote or mass if it asks for `byproducts`, and why.

    Raises:
        ValueError: if `backend` is unknown or cannot serve it; the message names what can.
    """
    return _select(torch.device(device), dtype, head_dim, tuple(block_size), backend, byproducts)


@cache
def _select(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    block_size: tuple[int, int],
    backend: str,
    byproducts: bool,
) -> BackendChoice:
    if backend == "auto":
        if device.type == "cpu":
            return BackendChoice("cpu", "CPU tensors: gathered blocks in plain torch")
        if why_not := _why_not_triton(device, dtype, head_dim, block_size):
            return BackendChoice(
                "reference", f"{why_not}: correct, but slower than dense attention"
            )
        if not _why_not_pairs(device, dtype, head_dim, block_size):
            if not byproducts:
                return BackendChoice(
                    "gluon_pairs", "Hopper kernel, two rows of 64 tokens a program"
                )
            why_not = f"for blocks of 64x64 {NO_BYPRODUCTS}"
        elif not (why_not := _why_not_gluon(device, dtype, head_dim, block_size)):
            return BackendChoice("gluon", "Hopper kernel")
        return _portable(device, dtype, head_dim, block_size, f"the Hopper kernel {why_not}")
    if backend not in _BACKENDS:
        raise ValueError(
            f"unknown backend {backend!r}; use 'auto' or one of {', '.join(_BACKENDS)}"
        )
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu' needs CPU tensors, got {device.type}; use 'auto'")
    limits = {"triton": _why_not_triton, "triton_tma": _why_not_tma, "gluon": _why_not_gluon}
    limits["gluon_pairs"] = _why_not_pairs
    limits |= dict.fromkeys(("gluon_int8", "gluon_fp8"), _why_not_8bit)
    if backend in limits and (why_not := limits[backend](device, dtype, head_dim, block_size)):
        raise ValueError(f"backend {backend!r} cannot run here: {why_not}; use 'auto'")
    if backend == "gluon_pairs" and byproducts:
        return _portable(device, dtype, head_dim, block_size, f"{backend} {NO_BYPRODUCTS}")
    return BackendChoice(backend, "asked for by name")


def _portable(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    block_size: tuple[int, int],
    reason: str,
) -> BackendChoice:
    """The portable kernel, for a call that it serves: by TMA where that has been timed, else by pointers."""
    if not _why_not_tma(device, dtype, head_dim, block_size):
        from sparsediff.kernels.tuning import tma_by_name_only

        bits = dtype.itemsize * 8
        why_not = tma_by_name_only(_capability(device), bits, head_dim, block_size)
        if not why_not:
            return BackendChoice("triton_tma", f"portable Triton kernel with TMA ({reason})")
        reason = f"{reason}; triton_tma, {why_not}, by name only"
    return BackendChoice("triton", f"portable Triton kernel ({reason})")


def available_backends() -> dict[str, str]:
    """Every backend's name, and "" if it can run on this machine or one line why not."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "reference": "",
        "cpu": "",
        "triton": _why_not_triton(device, torch.bfloat16, 128, (128, 128)),
        "triton_tma": _why_not_tma(device, torch.bfloat16, 128, (128, 128)),
        "gluon": _why_not_gluon(device, torch.bfloat16, 128, (128, 128)),
        "gluon_pairs": _why_not_pairs(device, torch.bfloat16, 128, (64, 64)),
        "gluon_int8": _why_not_8bit(device, torch.bfloat16, 128, (128, 128)),
        "gluon_fp8": _why_not_8bit(device, torch.bfloat16, 128, (128, 128)),
    }


def _why_not_triton(
    device: torch.device, dtype: torch.dtype, head_dim: int, block_size: tuple[int, int]
) -> str:
    """One line on what keeps the portable kernel from serving such a call, or ""."""
    try:
        from sparsediff.kernels.tuning import get_tile, interpreting
    except ImportError:
        return "Triton is not installed (pip install triton)"
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "AMD GPUs are not served yet"
    elif not interpreting():
        return f"Triton needs a CUDA device, got {device.type} (TRITON_INTERPRET=1 runs it slowly on a CPU)"
    try:
        get_tile(_capability(device), dtype.itemsize * 8, head_dim, tuple(block_size))
    except ValueError as error:
        return str(error)
    return ""


def _capability(device: torch.device) -> tuple[int, int]:
    """Of a CUDA device; of a CPU, what Triton's interpreter pretends to be."""
    from sparsediff.kernels.tuning import INTERPRETED_CAPABILITY

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)
    return INTERPRETED_CAPABILITY


def _why_not_tma(
    device: torch.device, dtype: torch.dtype, head_dim: int, block_size: tuple[int, int]
) -> str:
    """One line on what keeps the portable kernel from loading tiles by TMA, or ""."""
    if why_not := _why_not_triton(device, dtype, head_dim, block_size):
        return why_not
    from sparsediff.kernels.tuning import why_not_tma

    return why_not_tma(_capability(device), dtype.itemsize * 8)


def _why_not_gluon(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    block_size: tuple[int, int],
    *,
    pairs: bool = False,
) -> str:
    """One line on what keeps the Hopper kernel, or with `pairs` that for pairs of rows, from serving a call, or ""."""
    if device.type != "cuda":
        return f"needs a CUDA device, got {device.type}"
    # Whatever it hands on, the portable kernel has to serve.
    if why_not := _why_not_triton(device, dtype, head_dim, block_size):
        return why_not
    from sparsediff.kernels.tuning import why_not_hopper, why_not_hopper_pairs

    capability = torch.cuda.get_device_capability(device)
    serves = why_not_hopper_pairs if pairs else why_not_hopper
    return serves(capability, dtype.itemsize * 8, head_dim, tuple(block_size))


_why_not_pairs = partial(_why_not_gluon, pairs=True)


def _why_not_8bit(
    device: torch.device, dtype: torch.dtype, head_dim: int, block_size: tuple[int, int]
) -> str:
    """One line on what keeps the 8-bit kernel from serving such a call, or ""."""
    if why_not := _why_not_gluon(device, dtype, head_dim, block_size):
        return why_not
    if head_dim != 128 or tuple(block_size) != (128, 128):
        return f"serves head_dim 128 in blocks of (128, 128), got {head_dim} in {tuple(block_size)}"
    return ""


# -- checks -------------------------------------------------------------------------------------------------------


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scale: float | None,
    kv_lengths: Tensor | None,
    lse_prev: Tensor | None,
) -> None:
    tensors = {"query": query, "key": key, "value": value}
    for name, x in tensors.items():
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B, S, H, D], got {list(x.shape)}")
        if x.dtype not in DTYPES or x.dtype != query.dtype:
            raise TypeError(
                f"query, key and value must share one dtype of float16, bfloat16 or float32; "
                f"{name} is {x.dtype}, query {query.dtype}"
            )
    batch, seq_q, heads, head_dim = query.shape
    seq_k = key.shape[1]
    shapes = {
        "key": (key, [batch, seq_k, heads, head_dim], None),
        "value": (value, [batch, seq_k, heads, head_dim], None),
        "kv_lengths": (kv_lengths, [batch], torch.int32),
        "lse_prev": (lse_prev, [batch, heads, seq_q], torch.float32),
    }
    for name, (x, shape, dtype) in shapes.items():
        if x is None:
            continue
        if list(x.shape) != shape:
            raise ValueError(
                f"{name} must be {shape} beside query {list(query.shape)}, got {list(x.shape)}"
            )
        if dtype is not None and x.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name} is on {x.device}, query on {query.device}; move one of them")
    if mask.device != query.device:
        raise ValueError(
            f"mask is on {mask.device}, query on {query.device}; use mask.to({str(query.device)!r})"
        )
    if tuple(mask.seq_lengths) != (seq_q, seq_k):
        raise ValueError(
            f"mask is made for {tuple(mask.seq_lengths)} (query, key) tokens, got {(seq_q, seq_k)}"
        )
    for name, got, want in zip(
        ("batch", "head"), mask.kv_num_blocks.shape, (batch, heads), strict=False
    ):
        if got not in (1, want):
            raise ValueError(
                f"mask has {name} dimension {got}; query needs {want}, or 1 to share one mask"
            )
    if kv_lengths is not None and mask.visits != "descending":
        raise ValueError(
            f"kv_lengths needs a mask whose visits are 'descending', got {mask.visits!r}; "
            "make the mask without visits="
        )
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values()):
        raise ValueError(
            "block-sparse attention has no backward pass; call it under torch.no_grad()"
        )


# -- torch.library: torch.compile sees one opaque operation ---------------------------------------------------------


# Defined piece by piece: `torch.library.custom_op` takes three times as long a call, and attention is called often.
torch.library.define(
    "sparsediff::attend_blocks",
    "(Tensor query, Tensor key, Tensor value, Tensor kv_num_blocks, Tensor kv_indices, int[] block_size, "
    "float scale, Tensor? kv_lengths, float? vote_threshold, Tensor? lse_prev, bool want_lse, bool want_mass, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("sparsediff::attend_blocks", "default")
def _attend_blocks(
    query,
    key,
    value,
    kv_num_blocks,
    kv_indices,
    block_size,
    scale,
    kv_lengths,
    vote_threshold,
    lse_prev,
    want_lse,
    want_mass,
    backend,
):
    # Chosen in here, where torch.compile does not look: the choice reads files and device properties.
    choice = select_backend(
        query.device,
        query.dtype,
        query.shape[-1],
        tuple(block_size),
        backend,
        byproducts=want_mass or vote_threshold is not None,
    )
    mask = BlockMask(kv_num_blocks, kv_indices, tuple(block_size), (query.shape[1], key.shape[1]))
    # Triton launches on the current device, which need not be the one that holds the tensors.
    with torch.cuda.device_of(query):
        result = run_backend(
            choice.name,
            query,
            key,
            value,
            mask,
            scale=scale,
            kv_lengths=kv_lengths,
            vote_threshold=vote_threshold,
            lse_prev=lse_prev,
            want_lse=want_lse,
            want_mass=want_mass,
        )
    # An operation returns tensors, never None: what was not asked for is empty.
    return tuple(query.new_empty(0) if x is None else x for x in result)


@torch.library.register_fake("sparsediff::attend_blocks")
def _fake_attend_blocks(
    query,
    key,
    value,
    kv_num_blocks,
    kv_indices,
    block_size,
    scale,
    kv_lengths,
    vote_threshold,
    lse_prev,
    want_lse,
    want_mass,
    backend,
):
    batch, seq_q, heads, _ = query.shape
    rows, columns = kv_indices.shape[2:]
    absent = query.new_empty
    return (
        query.new_empty(query.shape),
        query.new_empty((batch, heads, seq_q), dtype=torch.float32) if want_lse else absent(0),
        absent(0)
        if vote_threshold is None
        else query.new_empty((batch, heads, rows, columns), dtype=torch.bool),
        query.new_empty((batch, heads, rows, columns), dtype=torch.float32)
        if want_mass
        else absent(0),
    )
