"""Device code of `token_order.py`: copies one token of one head a row, from where an index says."""

import triton
import triton.language as tl


@triton.jit
def _copy_rows(
    x_ptr, y_ptr, stride_xb, stride_xs, stride_xh, i_b, o_from, o_to, o_h, seq, num_heads, m_r,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_d = tl.arange(0, BLOCK_D)
    m_x = m_r[:, None] & (o_d < HEAD_DIM)[None, :]
    # Token offsets pass 2^31 elements at 700,000 tokens of 24 heads.
    p_x = x_ptr + i_b * stride_xb + o_from.to(tl.int64) * stride_xs + o_h * stride_xh
    p_y = y_ptr + ((i_b * seq + o_to) * num_heads + o_h) * HEAD_DIM
    # Each byte is used once: it should not push anything else out of the cache.
    b_x = tl.load(p_x[:, None] + o_d[None, :], mask=m_x, eviction_policy="evict_first")
    tl.store(p_y[:, None] + o_d[None, :], b_x, mask=m_x)


@triton.jit(do_not_specialize=["seq", "num_heads"])
def gather_rows(
    x0_ptr, x1_ptr, x2_ptr, y0_ptr, y1_ptr, y2_ptr, index_ptr, heads_ptr,
    stride_x0b, stride_x0s, stride_x0h,
    stride_x1b, stride_x1s, stride_x1h,
    stride_x2b, stride_x2s, stride_x2h,
    seq, num_heads,
    COUNT: tl.constexpr, PER_HEAD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`y[b, i, h] = x[b, index[heads[h], i], h]` for the first `COUNT` pairs; `y` is contiguous `[B, S, H, D]`.

    `index_ptr` is `int32 [orders, S]`, `heads_ptr` `int32 [H]`, read where orders differ by head (`PER_HEAD`).
    """
    # 2^31 rows are hundreds of gigabytes, and 64-bit division is slow.
    o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < seq * num_heads
    o_to = o_r // num_heads
    o_h = (o_r % num_heads).to(tl.int64)
    p_index = index_ptr + o_to
    if PER_HEAD:
        p_index += tl.load(heads_ptr + o_h) * seq
    o_from = tl.load(p_index, mask=m_r, other=0)
    i_b = tl.program_id(1).to(tl.int64)
    _copy_rows(
        x0_ptr, y0_ptr, stride_x0b, stride_x0s, stride_x0h, i_b, o_from, o_to, o_h, seq, num_heads, m_r,
        HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    if COUNT > 1:
        _copy_rows(
            x1_ptr, y1_ptr, stride_x1b, stride_x1s, stride_x1h, i_b, o_from, o_to, o_h, seq, num_heads, m_r,
            HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    if COUNT > 2:
        _copy_rows(
            x2_ptr, y2_ptr, stride_x2b, stride_x2s, stride_x2h, i_b, o_from, o_to, o_h, seq, num_heads, m_r,
            HEAD_DIM, BLOCK_D,
        )  # fmt: skip
