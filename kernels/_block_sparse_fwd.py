"""Block-sparse FlashAttention forward in portable Triton: device code only (`_block_sparse_triton.py` launches it).

One program owns `BLOCK_M` query rows and walks its list of key blocks from the end.  A ragged block stands last in its
list, and with key lengths lists ascend, so only the first block it meets can reach past the end: that one is peeled off
and masked, the loop is not.

Tiles of queries, keys and values come through pointers, or with `TMA` through host-made tensor descriptors `[B, H, S, D]`,
which read zeros past every end: head sizes need no masks, and rows past a ragged end score zero until they are masked.
Where key lengths end, TMA reads on: values there may be NaN or infinite and are set to zero before they meet their
weights of zero.

Softmax runs in base 2 and online (FlashAttention-2, arXiv 2307.08691); the vote is LiteAttention's
(arXiv 2511.11062).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) == exp2(x * LOG2E)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_keys(
    k, i_b, i_h, start, m_n, m_d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, PAD_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """`[D, BLOCK_N]` through a descriptor or pointers."""
    if TMA:
        b_k = k.load([i_b, i_h, start, 0]).reshape([BLOCK_N, BLOCK_D]).trans()
    elif MASKED:
        b_k = tl.load(k, mask=m_n[None, :] & m_d[:, None], other=0.0)
    elif PAD_D:
        b_k = tl.load(k, mask=m_d[:, None], other=0.0)
    else:
        b_k = tl.load(k)
    return b_k


@triton.jit
def _load_values(
    v, i_b, i_h, start, m_n, m_d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, PAD_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """`[BLOCK_N, D]`, zero in rows that are masked."""
    if TMA:
        b_v = v.load([i_b, i_h, start, 0]).reshape([BLOCK_N, BLOCK_D])
        if MASKED:
            b_v = tl.where(m_n[:, None], b_v, 0.0)
    elif MASKED:
        b_v = tl.load(v, mask=m_n[:, None] & m_d[None, :], other=0.0)
    elif PAD_D:
        b_v = tl.load(v, mask=m_d[None, :], other=0.0)
    else:
        b_v = tl.load(v)
    return b_v


@triton.jit
def _visit(
    b_q,
    k,
    v,
    stride_ks,
    stride_vs,
    i_b,
    i_h,
    start,
    length,
    b_m,
    b_l,
    b_acc,
    qk_scale,
    m_d,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    PAD_D: tl.constexpr,
    TMA: tl.constexpr,
    WITH_PV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile: `BLOCK_N` keys from `start` on.  Also returns the tile's row maxima, row sums and their exponent."""
    m_n = start + tl.arange(0, BLOCK_N) < length
    if not TMA:
        # Token offsets pass 2^31 elements at 700,000 tokens of 24 heads.
        k += start.to(tl.int64) * stride_ks
        v += start.to(tl.int64) * stride_vs
    b_k = _load_keys(k, i_b, i_h, start, m_n, m_d, BLOCK_N, BLOCK_D, MASKED, PAD_D, TMA)
    b_s = tl.dot(b_q, b_k, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if MASKED:
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
    b_top = tl.max(b_s, 1) * qk_scale
    b_m_new = tl.maximum(b_m, b_top)
    b_shift = b_m_new
    if MASKED:
        # A tile wholly past the length leaves the maximum at -inf, and -inf - -inf is NaN.
        b_shift = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
    b_p = tl.math.exp2(b_s * qk_scale - b_shift[:, None])
    b_alpha = tl.math.exp2(b_m - b_shift)
    b_sum = tl.sum(b_p, 1)
    b_l = b_l * b_alpha + b_sum
    if WITH_PV:
        b_v = _load_values(v, i_b, i_h, start, m_n, m_d, BLOCK_N, BLOCK_D, MASKED, PAD_D, TMA)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision=PRECISION)
    return b_acc, b_m_new, b_l, b_top, b_sum, b_shift


@triton.jit
def _total(b_x):
    """Sum over rows, as a tensor of one element: Triton 3.7 cannot lay out a reduction to a scalar on sm_100."""
    return tl.sum(b_x[:, None], 0)


@triton.jit
def _visible_blocks(p_list, count, length, KV_BLOCK: tl.constexpr):
    """How many entries of an ascending list start before `length`: a binary search."""
    low = tl.zeros_like(count)
    high = count
    while low < high:
        middle = (low + high) // 2
        inside = tl.load(p_list + middle) * KV_BLOCK < length
        low = tl.where(inside, middle + 1, low)
        high = tl.where(inside, high, middle)
    return low


# Sizes differ from call to call and gain nothing from specialisation: one binary serves every shape.
@triton.jit(
    do_not_specialize=[
        "stride_cb",
        "stride_ch",
        "stride_ib",
        "stride_ih",
        "scale",
        "vote_threshold",
        "num_heads",
        "seq_q",
        "seq_k",
        "q_blocks",
        "kv_blocks",
        "mass_stride",
    ]
)
def block_sparse_fwd(
    q,
    k,
    v,
    out_ptr,
    lse_ptr,
    vote_ptr,
    mass_ptr,
    lse_prev_ptr,
    kv_num_blocks_ptr,
    kv_indices_ptr,
    kv_lengths_ptr,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_ob,
    stride_os,
    stride_oh,
    stride_cb,
    stride_ch,
    stride_ib,
    stride_ih,
    scale,
    vote_threshold,
    num_heads,
    seq_q,
    seq_k,
    q_blocks,
    kv_blocks,
    mass_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    WITH_PV: tl.constexpr,
    WITH_LSE: tl.constexpr,
    WITH_VOTE: tl.constexpr,
    WITH_MASS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,
):
    """Attention of one tile of query rows; what is not asked for is neither computed nor stored.

    `q`, `k` and `v` are pointers, or with `TMA` descriptors in boxes of `[1, 1, BLOCK_M or BLOCK_N, BLOCK_D]`.
    `vote_ptr` `uint8 [B, H, Mq, Nk]` starts as zeros; `mass_ptr` `float32 [Q_BLOCK / BLOCK_M, B, H, Mq, Nk]` too,
    one plane for each tile of a query block (`mass_stride` apart), so that no two programs write one element.
    """
    SUB_M: tl.constexpr = Q_BLOCK // BLOCK_M
    SUB_N: tl.constexpr = KV_BLOCK // BLOCK_N
    PAD_D: tl.constexpr = BLOCK_D != HEAD_DIM
    # Query tiles of one head are neighbours: they sweep the same keys and values through the cache together.
    i_tile = tl.program_id(0)
    i_bh = i_tile // (q_blocks * SUB_M)
    i_m = i_tile % (q_blocks * SUB_M)
    i_b = (i_bh // num_heads).to(tl.int64)
    i_h = (i_bh % num_heads).to(tl.int64)
    i_row = i_m // SUB_M

    p_list = kv_indices_ptr + i_b * stride_ib + i_h * stride_ih + i_row.to(tl.int64) * kv_blocks
    count = tl.load(kv_num_blocks_ptr + i_b * stride_cb + i_h * stride_ch + i_row)
    length = seq_k
    if HAS_LENGTHS:
        length = tl.minimum(tl.load(kv_lengths_ptr + i_b), seq_k)
        count = _visible_blocks(p_list, count, length, KV_BLOCK)
    # An empty row masks its peeled block whole: no branch, and nothing is read.
    length = tl.where(count > 0, length, 0)

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_m = o_m < seq_q
    m_d = o_d < HEAD_DIM
    t_b, t_h = i_b.to(tl.int32), i_h.to(tl.int32)  # TMA's coordinates have 32 bits
    if TMA:
        b_q = q.load([t_b, t_h, i_m * BLOCK_M, 0]).reshape([BLOCK_M, BLOCK_D])
    else:
        p_q = (
            q
            + i_b * stride_qb
            + i_h * stride_qh
            + o_m[:, None].to(tl.int64) * stride_qs
            + o_d[None, :]
        )
        b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)  # [BLOCK_M, D]
        # Not `+=`: strides would be summed in a tensor of 64-bit offsets before they meet the pointer.
        k = k + i_b * stride_kb + i_h * stride_kh + o_n[None, :] * stride_ks + o_d[:, None]
        v = v + i_b * stride_vb + i_h * stride_vh + o_n[:, None] * stride_vs + o_d[None, :]
    o_row = (i_bh.to(tl.int64) * q_blocks + i_row) * kv_blocks
    p_mass = mass_ptr + (i_m % SUB_M).to(tl.int64) * mass_stride + o_row

    qk_scale = scale * LOG2E
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if WITH_MASS:
        b_norm = tl.load(
            lse_prev_ptr + i_bh.to(tl.int64) * seq_q + o_m, mask=m_m, other=float("-inf")
        )
        # No softmax, no mass: exp2(x - inf) is 0.
        b_norm = tl.where(b_norm == float("-inf"), float("inf"), b_norm * LOG2E)

    # What an empty row's list holds is arbitrary, and may overflow into something that looks like a block.
    i_kv = tl.where(count > 0, tl.load(p_list + tl.maximum(count - 1, 0)), 0)
    b_mass = tl.zeros([1], tl.float32)
    o_one = tl.arange(0, 1)
    # Not unrolled and not pipelined: it would take registers and shared memory from the loop that matters.
    for i_sub in tl.range(0, SUB_N, num_stages=1):
        start = i_kv * KV_BLOCK + (SUB_N - 1 - i_sub) * BLOCK_N
        b_acc, b_m, b_l, b_top, b_sum, b_shift = _visit(
            b_q, k, v, stride_ks, stride_vs, t_b, t_h, start, length, b_m, b_l, b_acc, qk_scale, m_d,
            BLOCK_N, BLOCK_D, True, PAD_D, TMA, WITH_PV, PRECISION,
        )  # fmt: skip
        if WITH_MASS:
            b_mass += _total(b_sum * tl.math.exp2(b_shift - b_norm))
    if WITH_MASS:
        tl.store(p_mass + i_kv + o_one, b_mass, mask=(count > 0) & (o_one == 0))
    if WITH_VOTE:
        tl.store(vote_ptr + o_row + i_kv, 1, mask=count > 0)

    b_before = b_m
    for i in tl.range(SUB_N, count * SUB_N, num_stages=STAGES):
        i_kv = tl.load(p_list + (count - 1 - i // SUB_N))
        start = i_kv * KV_BLOCK + (SUB_N - 1 - i % SUB_N) * BLOCK_N
        b_before = b_m if SUB_N == 1 else tl.where(i % SUB_N == 0, b_m, b_before)
        b_acc, b_m, b_l, b_top, b_sum, b_shift = _visit(
            b_q, k, v, stride_ks, stride_vs, t_b, t_h, start, length, b_m, b_l, b_acc, qk_scale, m_d,
            BLOCK_N, BLOCK_D, False, PAD_D, TMA, WITH_PV, PRECISION,
        )  # fmt: skip
        if WITH_VOTE:
            # Every row that wants the block writes the same 1: no reduction over rows, and the result is the same
            # in whatever order they come.
            m_vote = (b_top - b_before > vote_threshold) & m_m
            tl.store(vote_ptr + o_row + i_kv + tl.zeros([BLOCK_M], tl.int32), 1, mask=m_vote)
        if WITH_MASS:
            b_tile_mass = _total(b_sum * tl.math.exp2(b_shift - b_norm))
            b_mass = tl.where(i % SUB_N == 0, 0.0, b_mass) + b_tile_mass
            tl.store(p_mass + i_kv + o_one, b_mass)

    # Rows that attended to nothing: maximum -inf, sum 0.
    b_l = tl.where(b_l == 0.0, 1.0, b_l)
    if WITH_LSE:
        p_lse = lse_ptr + i_bh.to(tl.int64) * seq_q + o_m
        tl.store(p_lse, b_m * LN2 + tl.log(b_l), mask=m_m)
    if WITH_PV:
        b_acc = b_acc / b_l[:, None]
        p_out = (
            out_ptr
            + i_b * stride_ob
            + i_h * stride_oh
            + o_m[:, None].to(tl.int64) * stride_os
            + o_d[None, :]
        )
        tl.store(p_out, b_acc.to(out_ptr.dtype.element_ty), mask=m_m[:, None] & m_d[None, :])
