"""Device code of `quantize.py`: one block of tokens to 8 bits."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_heads", "seq", "num_blocks"])
def quantize_block(
    x_ptr, mean_ptr, out_ptr, scale_ptr, dot_ptr, stride_xb, stride_xs, stride_xh, num_heads, seq, num_blocks,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """`PER_ROW`: a scale a token, and each token's product with the mean.  Else: a scale a block, less the mean."""
    i_block = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // num_heads
    i_h = i_bh % num_heads
    o_s = i_block * BLOCK + tl.arange(0, BLOCK)
    o_d = tl.arange(0, BLOCK_D)
    m_s = o_s < seq
    m_x = m_s[:, None] & (o_d < HEAD_DIM)[None, :]
    p_x = (
        x_ptr
        + i_b * stride_xb
        + i_h * stride_xh
        + o_s[:, None].to(tl.int64) * stride_xs
        + o_d[None, :]
    )
    b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
    b_mean = tl.load(mean_ptr + i_bh * HEAD_DIM + o_d, mask=o_d < HEAD_DIM, other=0.0)
    if PER_ROW:
        tl.store(dot_ptr + i_bh * seq + o_s, tl.sum(b_x * b_mean[None, :], 1), mask=m_s)
        b_scale = tl.maximum(tl.max(tl.abs(b_x), 1), 1e-6) / 127.0
        tl.store(scale_ptr + i_bh * seq + o_s, b_scale, mask=m_s)
        b_y = b_x / b_scale[:, None]
    else:
        b_x = tl.where(m_x, b_x - b_mean[None, :], 0.0)
        scale = tl.maximum(tl.max(tl.max(tl.abs(b_x), 1), 0), 1e-6) / 127.0
        tl.store(scale_ptr + i_bh * num_blocks + i_block, scale)
        b_y = b_x / scale
    b_y = b_y + tl.where(b_y >= 0, 0.5, -0.5)  # conversion truncates: halves go away from zero
    p_out = (
        out_ptr
        + ((i_b * seq + o_s[:, None].to(tl.int64)) * num_heads + i_h) * HEAD_DIM
        + o_d[None, :]
    )
    tl.store(p_out, b_y.to(tl.int8), mask=m_x)
