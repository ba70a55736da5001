"""Device code of `token_order.py`: copies one token of one head a row, from where an index says."""

import triton
import triton.language as tl


@triton.jit
def _load_rows(
    x_ptr,
    stride_b,
    stride_s,
    stride_h,
    i_b,
    o_s,
    o_h,
    m_r,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_d = tl.arange(0, BLOCK_D)
    # Token offsets pass 2^31 elements at 700,000 tokens of 24 heads.
    p_x = x_ptr + i_b * stride_b + o_s.to(tl.int64) * stride_s + o_h * stride_h
    return tl.load(p_x[:, None] + o_d[None, :], mask=m_r[:, None] & (o_d < HEAD_DIM)[None, :])


@triton.jit
def _store_rows(y_ptr, b_x, o_y, m_r, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    p_y = y_ptr + o_y[:, None] * HEAD_DIM + o_d[None, :]
    tl.store(p_y, b_x, mask=m_r[:, None] & (o_d < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=["seq", "num_heads", "stride_heads"])
def gather_rows(
    x0_ptr, x1_ptr, x2_ptr, y0_ptr, y1_ptr, y2_ptr, index_ptr, heads_ptr,
    stride_x0b, stride_x0s, stride_x0h,
    stride_x1b, stride_x1s, stride_x1h,
    stride_x2b, stride_x2s, stride_x2h,
    seq, num_heads, stride_heads,
    COUNT: tl.constexpr, PER_HEAD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`y[b, i, h] = x[b, index[heads[b, h], i], h]` for the first `COUNT` pairs; `y` is contiguous `[B, S, H, D]`.

    `index_ptr` is `int32 [orders, S]`, `heads_ptr` `int32 [B, H]` (a stride of 0 serves all batch rows), read where
    orders differ by head (`PER_HEAD`).
    """
    # 2^31 rows are hundreds of gigabytes, and 64-bit division is slow.
    o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < seq * num_heads
    o_i = o_r // num_heads
    o_h = (o_r % num_heads).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    p_index = index_ptr + o_i
    if PER_HEAD:
        p_index += tl.load(heads_ptr + i_b * stride_heads + o_h) * seq
    o_s = tl.load(p_index, mask=m_r, other=0)
    o_y = i_b * seq * num_heads + o_r
    # All loads before the first store: nothing tells the compiler that they do not overlap.
    b_x0 = _load_rows(
        x0_ptr, stride_x0b, stride_x0s, stride_x0h, i_b, o_s, o_h, m_r, HEAD_DIM, BLOCK_D
    )
    if COUNT > 1:
        b_x1 = _load_rows(
            x1_ptr, stride_x1b, stride_x1s, stride_x1h, i_b, o_s, o_h, m_r, HEAD_DIM, BLOCK_D
        )
    if COUNT > 2:
        b_x2 = _load_rows(
            x2_ptr, stride_x2b, stride_x2s, stride_x2h, i_b, o_s, o_h, m_r, HEAD_DIM, BLOCK_D
        )
    _store_rows(y0_ptr, b_x0, o_y, m_r, HEAD_DIM, BLOCK_D)
    if COUNT > 1:
        _store_rows(y1_ptr, b_x1, o_y, m_r, HEAD_DIM, BLOCK_D)
    if COUNT > 2:
        _store_rows(y2_ptr, b_x2, o_y, m_r, HEAD_DIM, BLOCK_D)
