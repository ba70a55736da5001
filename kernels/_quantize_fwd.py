"""Device code of `quantize.py`: one block of tokens of one head to 8 bits.

Programs of neighbouring heads are neighbours: tokens are contiguous over heads, and so is what they read.
"""

import triton
import triton.language as tl

MAGIC = tl.constexpr(
    12582912.0
)  # 1.5 * 2**23: adding it rounds to an integer, which the low bits then hold


@triton.jit
def _load_block(
    x_ptr, o_s, m_s, o_d, i_b, i_h, stride_xb, stride_xs, stride_xh, HEAD_DIM: tl.constexpr
):
    p_x = x_ptr + i_b * stride_xb + i_h * stride_xh + o_s[:, None].to(tl.int64) * stride_xs
    m_x = m_s[:, None] & (o_d < HEAD_DIM)[None, :]
    return tl.load(p_x + o_d[None, :], mask=m_x, other=0.0).to(tl.float32), m_x


@triton.jit
def _store_bytes(out_ptr, b_y, o_s, m_x, o_d, i_b, i_h, seq, num_heads, HEAD_DIM: tl.constexpr):
    b_byte = (b_y + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
    p_out = out_ptr + ((i_b * seq + o_s[:, None].to(tl.int64)) * num_heads + i_h) * HEAD_DIM
    tl.store(p_out + o_d[None, :], b_byte, mask=m_x)


@triton.jit
def _largest(top, squares):
    """The largest magnitude, above 0; NaN where one of the numbers is: a maximum drops it, their sum of squares does not.

    No byte can be NaN, so the scale has to tell.
    """
    return tl.where(squares == squares, tl.maximum(top, 1e-6), squares)


@triton.jit(do_not_specialize=["num_heads", "seq", "num_blocks"])
def quantize_keys(
    x_ptr, mean_ptr, out_ptr, scale_ptr, norm_ptr, stride_xb, stride_xs, stride_xh, num_heads, seq, num_blocks,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keys less their mean, with a scale a block; and the largest norm of a block's tokens."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_block = tl.program_id(1)
    i_b = i_bh // num_heads
    i_h = i_bh % num_heads
    o_s = i_block * BLOCK + tl.arange(0, BLOCK)
    o_d = tl.arange(0, BLOCK_D)
    b_x, m_x = _load_block(
        x_ptr, o_s, o_s < seq, o_d, i_b, i_h, stride_xb, stride_xs, stride_xh, HEAD_DIM
    )
    b_mean = tl.load(mean_ptr + i_bh * HEAD_DIM + o_d, mask=o_d < HEAD_DIM, other=0.0)
    b_x = tl.where(m_x, b_x - b_mean[None, :], 0.0)
    b_squares = tl.sum(b_x * b_x, 1)
    top = _largest(tl.max(tl.max(tl.abs(b_x), 1), 0), tl.sum(b_squares, 0))
    tl.store(scale_ptr + i_bh * num_blocks + i_block, top / 127.0)
    tl.store(norm_ptr + i_bh * num_blocks + i_block, tl.sqrt(tl.max(b_squares, 0)))
    b_y = b_x * (127.0 / top)
    _store_bytes(out_ptr, b_y, o_s, m_x, o_d, i_b, i_h, seq, num_heads, HEAD_DIM)


@triton.jit(do_not_specialize=["num_heads", "seq"])
def quantize_queries(
    x_ptr, mean_ptr, key_norm_ptr, key_scale_ptr, out_ptr, scale_ptr, shift_ptr, error_ptr,
    stride_xb, stride_xs, stride_xh, num_heads, seq,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Queries with a scale a token; each token's product with the mean key and the standard error of its logits."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_b = i_bh // num_heads
    i_h = i_bh % num_heads
    o_s = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_s = o_s < seq
    o_d = tl.arange(0, BLOCK_D)
    b_x, m_x = _load_block(
        x_ptr, o_s, m_s, o_d, i_b, i_h, stride_xb, stride_xs, stride_xh, HEAD_DIM
    )
    b_mean = tl.load(mean_ptr + i_bh * HEAD_DIM + o_d, mask=o_d < HEAD_DIM, other=0.0)
    b_squares = tl.sum(b_x * b_x, 1)
    b_top = _largest(tl.max(tl.abs(b_x), 1), b_squares)
    b_scale = b_top / 127.0
    b_from_query = b_scale * tl.load(key_norm_ptr + i_bh)
    key_scale = tl.load(key_scale_ptr + i_bh)
    b_square = b_from_query * b_from_query + key_scale * key_scale * b_squares
    o_row = i_bh * seq + o_s
    tl.store(scale_ptr + o_row, b_scale, mask=m_s)
    tl.store(shift_ptr + o_row, tl.sum(b_x * b_mean[None, :], 1), mask=m_s)
    tl.store(error_ptr + o_row, tl.sqrt(b_square / 12.0), mask=m_s)
    b_y = b_x * (127.0 / b_top)[:, None]
    _store_bytes(out_ptr, b_y, o_s, m_x, o_d, i_b, i_h, seq, num_heads, HEAD_DIM)


@triton.jit(do_not_specialize=["num_heads", "seq", "num_blocks"])
def quantize_values(
    x_ptr, out_ptr, top_ptr, stride_xb, stride_xs, stride_xh, num_heads, seq, num_blocks,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Values transposed, in e4m3 with a scale a block, their tokens in `quantize.PV_ORDER`."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_block = tl.program_id(1)
    o_n = tl.arange(0, BLOCK)
    # Position 16 h + 4 t + 2 i + e of every 32 holds token 16 h + 8 i + 2 t + e.
    o_token = (o_n & ~15) | ((o_n & 2) << 2) | ((o_n & 12) >> 1) | (o_n & 1)
    o_s = i_block * BLOCK + o_token
    o_d = tl.arange(0, HEAD_DIM)
    b_x, _ = _load_block(
        x_ptr, o_s, o_s < seq, o_d, i_bh // num_heads, i_bh % num_heads,
        stride_xb, stride_xs, stride_xh, HEAD_DIM,
    )  # fmt: skip
    top = tl.maximum(tl.max(tl.max(tl.abs(b_x), 1), 0), 1e-20)
    tl.store(top_ptr + i_bh * num_blocks + i_block, top)
    b_y = tl.trans((b_x * (448.0 / top)).to(tl.float8e4nv))
    p_out = out_ptr + (i_bh * HEAD_DIM + o_d[:, None]) * num_blocks * BLOCK + i_block * BLOCK
    tl.store(p_out + o_n[None, :], b_y)
