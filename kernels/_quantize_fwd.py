"""Device code of `quantize.py`: one block of tokens of one head to 8 bits.

Programs of neighbouring heads are neighbours: tokens are contiguous over heads, and so is what they read.
"""

import triton
import triton.language as tl

MAGIC = tl.constexpr(
    12582912.0
)  # 1.5 * 2**23: adding it rounds to an integer, which the low bits then hold
SMALLEST_BITS = tl.constexpr(0x358637BD)  # of 1e-6


@triton.jit
def _load_block(x_ptr, start, o_s, o_d, m_x, i_b, i_h, stride_xb, stride_xs, stride_xh):
    """Tokens `start + o_s` in float32; only the first of them is so far away that it takes 64 bits."""
    p_x = x_ptr + i_b * stride_xb + i_h * stride_xh + start.to(tl.int64) * stride_xs
    return tl.load(p_x + (o_s[:, None] * stride_xs + o_d[None, :]), mask=m_x, other=0.0).to(
        tl.float32
    )


@triton.jit
def _store_bytes(out_ptr, b_y, start, o_s, o_d, i_b, i_h, seq, num_heads, HEAD_DIM: tl.constexpr):
    b_byte = (b_y + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
    p_out = out_ptr + ((i_b * seq + start) * num_heads + i_h) * HEAD_DIM
    m_x = (start + o_s < seq)[:, None] & (o_d < HEAD_DIM)[None, :]
    tl.store(p_out + (o_s[:, None] * (num_heads * HEAD_DIM) + o_d[None, :]), b_byte, mask=m_x)


@triton.jit
def _largest_bits(b_x):
    """Bits of the largest magnitude of every row.

    They are in the order of the magnitudes, with NaN above all, which a maximum of floats drops: no byte can be NaN, so
    the scale has to tell.
    """
    return tl.max(tl.abs(b_x).to(tl.int32, bitcast=True), 1)


@triton.jit
def _above_zero(b_bits):
    """Magnitudes from their bits; where all is 0, a small one, for no scale may be 0."""
    return tl.maximum(b_bits, SMALLEST_BITS).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_heads", "seq_q", "seq_k", "key_blocks"])
def quantize_pair(
    q_ptr, k_ptr, mean_ptr, q8_ptr, k8_ptr, q_scale_ptr, k_scale_ptr, shift_ptr, q_norm_ptr, k_norm_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, num_heads, seq_q, seq_k, key_blocks,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    WITH_SHIFT: tl.constexpr, WITH_NORMS: tl.constexpr,
):  # fmt: skip
    """The first `key_blocks` programs of a head: keys less their mean, a scale a block.  Others: queries, a scale a token.

    With shift: each query's product with the mean key.  With norms: of each query, and the largest of a key block.
    Tokens past the end are the last one again, which changes no maximum.
    """
    i_bh = tl.program_id(0).to(tl.int64)
    i_block = tl.program_id(1)
    i_b = i_bh // num_heads
    i_h = i_bh % num_heads
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    b_mean = tl.load(mean_ptr + i_bh * HEAD_DIM + o_d, mask=m_d, other=0.0)
    if i_block < key_blocks:
        start_k = i_block * K_BLOCK
        o_k = tl.arange(0, K_BLOCK)
        b_k = _load_block(
            k_ptr, start_k, tl.minimum(o_k, seq_k - 1 - start_k), o_d, m_d[None, :], i_b, i_h,
            stride_kb, stride_ks, stride_kh,
        )  # fmt: skip
        b_k -= b_mean[None, :]
        top = _above_zero(tl.max(_largest_bits(b_k), 0))
        o_scale = i_bh * key_blocks + i_block
        tl.store(k_scale_ptr + o_scale, top / 127.0)
        if WITH_NORMS:
            tl.store(k_norm_ptr + o_scale, tl.sqrt(tl.max(tl.sum(b_k * b_k, 1), 0)))
        b_k *= 127.0 / top
        _store_bytes(k8_ptr, b_k, start_k, o_k, o_d, i_b, i_h, seq_k, num_heads, HEAD_DIM)
    else:
        start_q = (i_block - key_blocks) * Q_BLOCK
        o_q = tl.arange(0, Q_BLOCK)
        m_q = start_q + o_q < seq_q
        b_q = _load_block(
            q_ptr, start_q, tl.minimum(o_q, seq_q - 1 - start_q), o_d, m_d[None, :], i_b, i_h,
            stride_qb, stride_qs, stride_qh,
        )  # fmt: skip
        b_top = _above_zero(_largest_bits(b_q))
        o_row = i_bh * seq_q + start_q + o_q
        tl.store(q_scale_ptr + o_row, b_top / 127.0, mask=m_q)
        if WITH_SHIFT:
            tl.store(shift_ptr + o_row, tl.sum(b_q * b_mean[None, :], 1), mask=m_q)
        if WITH_NORMS:
            tl.store(q_norm_ptr + o_row, tl.sqrt(tl.sum(b_q * b_q, 1)), mask=m_q)
        b_q *= (127.0 / b_top)[:, None]
        _store_bytes(q8_ptr, b_q, start_q, o_q, o_d, i_b, i_h, seq_q, num_heads, HEAD_DIM)


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
    start = i_block * BLOCK
    o_d = tl.arange(0, HEAD_DIM)
    b_x = _load_block(
        x_ptr, start, o_token, o_d, (start + o_token < seq)[:, None],
        i_bh // num_heads, i_bh % num_heads, stride_xb, stride_xs, stride_xh,
    )  # fmt: skip
    top = tl.maximum(tl.max(tl.max(tl.abs(b_x), 1), 0), 1e-20)
    tl.store(top_ptr + i_bh * num_blocks + i_block, top)
    b_y = tl.trans((b_x * (448.0 / top)).to(tl.float8e4nv))
    p_out = out_ptr + (i_bh * HEAD_DIM + o_d[:, None]) * num_blocks * BLOCK + start
    tl.store(p_out + o_n[None, :], b_y)
