"""Block-sparse FlashAttention forward for Hopper with 8-bit operands: device code only.

The walk is that of `_block_sparse_sm90.py`.  Logits come from 8-bit queries (a scale a row) and keys (a scale a block),
as in SageAttention (arXiv 2410.02367).  Converting integers to floats would share a pipe with the exponentials, so they
are added to the bits of 1.5 * 2**23, which makes floats of them, exact up to 2**22.

Tiles after the first are exponentiated under the maximum that a row has so far.  Its new maximum is looked for only if
a sum of probabilities tells that the old one is far too low; then the tile is done again.  That leaves out a seventh of a
tile's instructions and the wait between its product and its exponentials.

With `FP8_PV` the second product is in e4m3, as in SageAttention2 (arXiv 2411.10958).  8-bit operands must have the
summed dimension contiguous, so V comes transposed, and its tokens come in the order in which a thread holds its
probabilities (`quantize.PV_ORDER`): no data moves between threads.  A block's scale of V is folded into the exponent of
its probabilities.  The tensor cores keep fewer than 24 bits of an 8-bit sum, so every tile's product is added to the
output in float32, which the rescaling of the output does at no cost.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparsediff.kernels._hopper import (
    LN2,
    LOG2E,
    MASS_WIDTH,
    are_beyond,
    declare_beyond,
    leave_mass,
    leave_norm,
    log2,
    mass_place,
    pack_pairs,
    pass_turn,
    place,
    produce,
    row_list,
    row_sums,
    store_mass,
    store_vote,
    take_over,
    take_turn,
    thread_sums,
    times_rows,
)

MAGIC_BITS = gl.constexpr(0x4B400000)
MAGIC = gl.constexpr(12582912.0)  # 1.5 * 2**23
VOTE_MARGIN = gl.constexpr(6.0)  # standard errors of a logit


@gluon.jit
def _scores(b_q, k_buffer, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, LAYOUT: gl.constexpr):
    """Start S = Q K^T of one tile, in integers."""
    k_smem = k_buffer.reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
    b_start = gl.zeros([64, BLOCK_N], gl.int32, LAYOUT)
    return warpgroup_mma(b_q, k_smem, b_start, use_acc=False, is_async=True)


@gluon.jit
def _as_float(b_s):
    """Integers below 2**22 on top of `MAGIC`."""
    return (b_s + MAGIC_BITS).to(gl.float32, bitcast=True)


@gluon.jit
def _maximum(b_x, b_scale):
    """Row maxima `[64]` of logits.  Integers take half of the instructions: there is one for three of them."""
    return (
        gl.max(b_x.to(gl.int32, bitcast=True), 1).to(gl.float32, bitcast=True) - MAGIC
    ) * b_scale


@gluon.jit
def _probabilities(b_x, b_scale, b_m):
    """`exp2` of logits under `b_m [64]`."""
    b_shift = b_m + MAGIC * b_scale
    return gl.exp2(b_x * b_scale[:, None] - b_shift[:, None])


@gluon.jit
def _pack(b_p, DTYPE: gl.constexpr, FP8_PV: gl.constexpr, LAYOUT: gl.constexpr):
    """Probabilities as left operand of the second product; with `FP8_PV` four of them in an integer.

    Bytes that live across turns of a loop are taken apart and put together again by the compiler; integers are not.
    """
    N: gl.constexpr = b_p.shape[1]
    if FP8_PV:
        b_p = b_p.reshape([64, N // 32, 2, 2, 4, 2]).permute((0, 1, 2, 4, 3, 5)).reshape([64, N])
        b_word = gl.inline_asm_elementwise(
            """{ .reg .b16 a, b;
            cvt.rn.satfinite.e4m3x2.f32 a, $5, $4; cvt.rn.satfinite.e4m3x2.f32 b, $7, $6;
            mov.b32 $0, {a, b}; }""",
            "=r,=r,=r,=r,f,f,f,f",
            [gl.convert_layout(b_p, LAYOUT, assert_trivial=True)],
            dtype=gl.int32,
            is_pure=True,
            pack=4,
        )
        b_even, _ = b_word.reshape([64, N // 4, 2, 2]).split()
        b_first, _ = b_even.split()
        return b_first
    else:
        return gl.convert_layout(pack_pairs(b_p, DTYPE), LAYOUT)


@gluon.jit
def _unpack(b_word, LAYOUT: gl.constexpr):
    """Four e4m3 numbers out of every integer: only a change of names."""
    b_twice = gl.join(b_word, b_word)
    b_word = gl.join(b_twice, b_twice).reshape([64, b_word.shape[1] * 4])
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;",
        "=r,r,r,r,r",
        [gl.convert_layout(b_word, LAYOUT, assert_trivial=True)],
        dtype=gl.float8e4nv,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _start_output(
    b_pd,
    v_buffer,
    b_o,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    FP8_PV: gl.constexpr,
    P_LAYOUT: gl.constexpr,
    O_LAYOUT: gl.constexpr,
):
    """Start P V of one tile: with `FP8_PV` alone, else on top of the output."""
    if FP8_PV:
        v_smem = v_buffer.reshape([BLOCK_D, BLOCK_N]).permute((1, 0))
        b_start = gl.zeros([64, BLOCK_D], gl.float32, O_LAYOUT)
        b_pd = _unpack(b_pd, P_LAYOUT)
        return warpgroup_mma(b_pd, v_smem, b_start, use_acc=False, is_async=True)
    else:
        return warpgroup_mma(b_pd, v_buffer.reshape([BLOCK_N, BLOCK_D]), b_o, is_async=True)


@gluon.jit
def _consumer(
    out_desc,
    q_bufs,
    k_bufs,
    v_bufs,
    out_bufs,
    q_full,
    q_empty,
    full,
    empty,
    work,
    work_full,
    work_empty,
    lse_ptr,
    vote_ptr,
    mass_ptr,
    lse_prev_ptr,
    space_ptr,
    kv_indices_ptr,
    q_scale_ptr,
    k_scale_ptr,
    v_scale_ptr,
    error_ptr,
    stride_ib,
    stride_ih,
    scale,
    vote_threshold,
    num_heads,
    seq_q,
    seq_k,
    q_blocks,
    kv_blocks,
    RING: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    WITH_LSE: gl.constexpr,
    WITH_VOTE: gl.constexpr,
    WITH_MASS: gl.constexpr,
    HAS_LSE_PREV: gl.constexpr,
    FP8_PV: gl.constexpr,
    GROUP: gl.constexpr,
):
    P_DTYPE: gl.constexpr = v_bufs.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 1], [16, BLOCK_D, 32 if FP8_PV else 16]
    )
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 4 if FP8_PV else 2)
    Q_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, S_LAYOUT, 4)
    Q_IN_REGISTERS: gl.constexpr = not (FP8_PV or WITH_VOTE or WITH_MASS)  # else registers spill
    ROW_S: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    ROW_O: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    turn = 0
    rows = 0
    q_smem = q_bufs.index(GROUP).reshape([64, BLOCK_D])
    out_smem = out_bufs.index(GROUP)
    qk_scale = scale * LOG2E
    declare_beyond(GROUP)
    if GROUP == 1:
        pass_turn(GROUP)
    item = take_over(work, work_full, work_empty, 0, 0)
    while item >= 0:
        count = (item >> 32).to(gl.int32)
        i_row = item.to(gl.int32)
        i_b, i_h, i_m = place(i_row, num_heads, q_blocks)
        p_list = row_list(kv_indices_ptr, i_b, i_h, i_m, stride_ib, stride_ih, kv_blocks)
        current = gl.where(count > 0, gl.load(p_list + gl.maximum(count - 1, 0)), 0)
        length = gl.where(count > 0, seq_k, 0)
        i_bh = (i_row // q_blocks).to(gl.int64)
        o_m = i_m * 128 + GROUP * 64 + gl.arange(0, 64, layout=ROW_S)
        b_m = gl.full([64], float("-inf"), gl.float32, ROW_S)
        b_l = gl.zeros([64], gl.float32, ROW_S)
        b_o = gl.zeros([64, BLOCK_D], gl.float32, O_LAYOUT)
        if WITH_VOTE:
            p_vote = (vote_ptr + i_row.to(gl.int64) * kv_blocks).to(gl.int64) + gl.zeros(
                [64], gl.int64, ROW_S
            )
            # Rounding must not cost a block its vote; rows past the end of the sequence never pass.
            b_error = gl.load(error_ptr + i_bh * seq_q + o_m, mask=o_m < seq_q, other=0.0)
            b_least = vote_threshold - VOTE_MARGIN * qk_scale * b_error
            b_threshold = gl.where(o_m < seq_q, b_least, float("inf"))
            if GROUP == 0:
                gl.store(vote_ptr + i_row.to(gl.int64) * kv_blocks + current, 1, mask=count > 0)
        following = gl.where(count > 1, gl.load(p_list + gl.maximum(count - 2, 0)), 0)
        b_row_scale = qk_scale * gl.load(
            q_scale_ptr + i_bh * seq_q + o_m, mask=o_m < seq_q, other=1.0
        )
        p_k_scale = k_scale_ptr + i_bh * kv_blocks
        p_boost = v_scale_ptr + i_bh * (kv_blocks + 1)
        boost = 0.0
        if FP8_PV:
            boost = gl.load(p_boost + current)

        # The first tile, the only one that can be ragged
        mbarrier.wait(q_full.index(GROUP), rows & 1)
        # A product that finds its queries in registers reads a third less of shared memory.
        if Q_IN_REGISTERS:
            b_q = q_smem.load(Q_LAYOUT)
            mbarrier.arrive(q_empty.index(GROUP), count=1)
        else:
            b_q = q_smem
        mbarrier.wait(full.index(turn % RING), (turn // RING) & 1)
        take_turn(GROUP)
        b_s = _scores(b_q, k_bufs.index(turn % RING), BLOCK_N, BLOCK_D, S_LAYOUT)
        pass_turn(GROUP)
        b_s = warpgroup_mma_wait(0, deps=(b_s,))
        mbarrier.arrive(empty.index(turn % RING), count=1)
        b_x = _as_float(b_s)
        b_scale = b_row_scale * gl.load(p_k_scale + current)
        if current * BLOCK_N + BLOCK_N > length:
            o_n = current * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
            b_x = gl.where((o_n < length)[None, :], b_x, float("-inf"))
        b_m = (gl.max(b_x, 1) - MAGIC) * b_scale
        b_best = b_m
        # An empty row leaves the maximum at -inf, and -inf - -inf is NaN.
        b_shift = gl.where(b_m == float("-inf"), 0.0, b_m) + MAGIC * b_scale
        b_p = gl.exp2(b_x * b_scale[:, None] - (b_shift - boost)[:, None])
        if FP8_PV:
            b_sum = gl.sum(b_p, 1) * gl.exp2(-boost)
            b_l = b_sum
            b_alpha = gl.full([64], 1.0, gl.float32, ROW_S)
            boost = gl.load(p_boost + following)
        else:
            b_parts = thread_sums(b_p)
            b_all_parts = b_parts
            if WITH_MASS:
                b_sum = row_sums(b_parts, ROW_S)
        k_scale = gl.load(p_k_scale + following)
        if WITH_MASS:
            i_space = (gl.program_id(0) * 2 + (rows & 1)).to(gl.int64)
            p_space = space_ptr + i_space * (kv_blocks + 1) * MASS_WIDTH
            b_left = mass_place(p_space, GROUP, ROW_S)
            if HAS_LSE_PREV:
                p_norm = lse_prev_ptr + i_bh * seq_q + o_m
                b_norm = gl.load(p_norm, mask=o_m < seq_q, other=0.0) * LOG2E
                b_last = b_left + count.to(gl.int64) * (MASS_WIDTH * 4)
                leave_norm(b_last, b_norm, o_m, seq_q)
            leave_mass(b_left, b_sum, b_m)
        turn += 1
        mbarrier.wait(full.index(turn % RING), (turn // RING) & 1)
        b_pd = _pack(b_p, P_DTYPE, FP8_PV, P_LAYOUT)

        for j in range(1, count):
            stage = turn % RING
            take_turn(GROUP)
            b_s = _scores(b_q, k_bufs.index(stage), BLOCK_N, BLOCK_D, S_LAYOUT)
            b_pv = _start_output(
                b_pd, v_bufs.index(stage), b_o, BLOCK_N, BLOCK_D, FP8_PV, P_LAYOUT, O_LAYOUT
            )
            pass_turn(GROUP)
            b_s = warpgroup_mma_wait(1, deps=(b_s,))
            b_x = _as_float(b_s)
            b_scale = b_row_scale * k_scale
            if FP8_PV:
                b_top = _maximum(b_x, b_scale)
                # e4m3 has no room for probabilities beyond 1.
                b_m_new = gl.maximum(b_m, b_top)
                b_p = _probabilities(b_x, b_scale, b_m_new - boost)
            else:
                b_p = _probabilities(b_x, b_scale, b_m)
                b_parts = thread_sums(b_p)
                # The scores stay for doing it again: there is no room for probabilities in 32 bits beside them.
                b_pd_next = _pack(b_p, P_DTYPE, FP8_PV, P_LAYOUT)
                if WITH_VOTE:
                    b_top = _maximum(b_x, b_scale)
            if WITH_VOTE:
                store_vote(b_top - (b_best + b_threshold), p_vote + following)
                b_best = gl.maximum(b_best, b_top)
            following = gl.load(p_list + gl.maximum(count - 2 - j, 0))
            k_scale = gl.load(p_k_scale + following)
            if FP8_PV:
                b_sum = gl.sum(b_p, 1) * gl.exp2(-boost)
                boost = gl.load(p_boost + following)
                b_alpha_new = gl.exp2(b_m - b_m_new)
                b_l = b_l * b_alpha_new + b_sum
                b_m = b_m_new
            else:
                # Asked here: ptxas sinks exponentials past the next wait if nothing before it needs them.
                beyond = are_beyond(b_parts, GROUP, True)
            turn += 1
            mbarrier.wait(full.index(turn % RING), (turn // RING) & 1)
            b_pv = warpgroup_mma_wait(0, deps=(b_pv,))
            mbarrier.arrive(empty.index(stage), count=1)
            if FP8_PV:
                b_pd = _pack(b_p, P_DTYPE, FP8_PV, P_LAYOUT)
                # The output trails by a tile: it is rescaled to the maximum under which this product was made.
                b_o = b_o * gl.convert_layout(b_alpha, ROW_O)[:, None] + b_pv
                b_alpha = b_alpha_new
            else:
                b_o = b_pv
                b_pd = b_pd_next
                if beyond != 0:  # some warps only: nothing in here meets other warps
                    b_m_new = gl.maximum(b_m, _maximum(b_x, b_scale))
                    b_alpha = gl.exp2(b_m - b_m_new)
                    b_p = _probabilities(b_x, b_scale, b_m_new)
                    b_parts = thread_sums(b_p)
                    b_pd = _pack(b_p, P_DTYPE, FP8_PV, P_LAYOUT)
                    b_o = times_rows(b_o, b_alpha)
                    b_all_parts = times_rows(b_all_parts, b_alpha)
                    b_m = b_m_new
                b_all_parts += b_parts
                if WITH_MASS:
                    b_sum = row_sums(b_parts, ROW_S)
            if WITH_MASS:
                b_left += MASS_WIDTH * 4
                leave_mass(b_left, b_sum, b_m)

        if not Q_IN_REGISTERS:
            mbarrier.arrive(q_empty.index(GROUP), count=1)
        b_pv = _start_output(
            b_pd, v_bufs.index(turn % RING), b_o, BLOCK_N, BLOCK_D, FP8_PV, P_LAYOUT, O_LAYOUT
        )
        b_pv = warpgroup_mma_wait(0, deps=(b_pv,))
        mbarrier.arrive(empty.index(turn % RING), count=1)
        turn += 1
        rows += 1

        if not FP8_PV:
            b_l = row_sums(b_all_parts, ROW_S)
        if WITH_LSE:
            p_lse = lse_ptr + i_bh * seq_q + o_m
            gl.store(p_lse, b_m * LN2 + gl.log(b_l), mask=o_m < seq_q)
        b_factor = 1.0 / b_l
        if FP8_PV:
            b_o = b_o * gl.convert_layout(b_alpha, ROW_O)[:, None] + b_pv
            b_factor *= gl.load(p_boost + kv_blocks)
        else:
            b_o = b_pv
        b_empty = gl.convert_layout(b_l, ROW_O)[:, None] == 0.0
        b_o = gl.where(b_empty, 0.0, b_o * gl.convert_layout(b_factor, ROW_O)[:, None])
        tma.store_wait(0)
        out_smem.reshape([64, BLOCK_D]).store(b_o.to(out_bufs.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [i_b, i_h, i_m * 128 + GROUP * 64, 0], out_smem)
        if WITH_MASS:
            if not HAS_LSE_PREV:
                leave_norm(b_left + MASS_WIDTH * 4, b_m + log2(b_l), o_m, seq_q)
            p_mass = mass_ptr + i_row.to(gl.int64) * kv_blocks
            store_mass(p_space, p_mass, p_list, count, GROUP)
        item = take_over(work, work_full, work_empty, rows & 1, (rows >> 1) & 1)
    tma.store_wait(0)


# Sizes differ from call to call and gain nothing from specialisation: one binary serves every shape.
@gluon.jit(
    do_not_specialize=[
        "stride_ib",
        "stride_ih",
        "scale",
        "vote_threshold",
        "num_heads",
        "seq_q",
        "seq_k",
        "q_blocks",
        "kv_blocks",
        "num_rows",
    ]
)
def block_sparse_fwd_8bit_sm90(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    lse_ptr,
    vote_ptr,
    mass_ptr,
    lse_prev_ptr,
    space_ptr,
    kv_num_blocks_ptr,
    kv_indices_ptr,
    order_ptr,
    draw_ptr,
    q_scale_ptr,
    k_scale_ptr,
    v_scale_ptr,
    error_ptr,
    stride_ib,
    stride_ih,
    scale,
    vote_threshold,
    num_heads,
    seq_q,
    seq_k,
    q_blocks,
    kv_blocks,
    num_rows,
    RING: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    WITH_LSE: gl.constexpr,
    WITH_VOTE: gl.constexpr,
    WITH_MASS: gl.constexpr,
    HAS_LSE_PREV: gl.constexpr,
    FP8_PV: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Attention of query blocks of 128 rows over key blocks of `BLOCK_N`; see `block_sparse_fwd_sm90` for the rest.

    Descriptors of queries and keys are over `int8 [B, H, S, D]`; that of values over `[B, H, S, D]` in 16 bits, or with
    `FP8_PV` over e4m3 `[B, H, D, Nk * BLOCK_N]`.  `q_scale_ptr` and `error_ptr` are `float32 [B, H, Sq]`, `k_scale_ptr`
    `float32 [B, H, Nk]`, and `v_scale_ptr` `float32 [B, H, Nk + 1]`: what a block of V adds to the exponents of its
    probabilities, then what the output is multiplied by.
    """
    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, 64, BLOCK_D], q_desc.layout)
    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [RING, 1, 1, BLOCK_N, BLOCK_D], k_desc.layout)
    V_ROWS: gl.constexpr = BLOCK_D if FP8_PV else BLOCK_N
    V_COLUMNS: gl.constexpr = BLOCK_N if FP8_PV else BLOCK_D
    v_bufs = gl.allocate_shared_memory(v_desc.dtype, [RING, 1, 1, V_ROWS, V_COLUMNS], v_desc.layout)
    out_bufs = gl.allocate_shared_memory(out_desc.dtype, [2, 1, 1, 64, BLOCK_D], out_desc.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [RING, 1], BARRIER)
    work = gl.allocate_shared_memory(gl.int64, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    work_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    work_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
        mbarrier.init(work_full.index(i), count=1)
        mbarrier.init(work_empty.index(i), count=2)
    for i in gl.static_range(RING):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    out_desc, q_bufs, k_bufs, v_bufs, out_bufs, q_full, q_empty, full, empty, work, work_full,
                    work_empty, lse_ptr, vote_ptr, mass_ptr, lse_prev_ptr, space_ptr, kv_indices_ptr, q_scale_ptr,
                    k_scale_ptr, v_scale_ptr, error_ptr, stride_ib, stride_ih, scale, vote_threshold, num_heads, seq_q,
                    seq_k, q_blocks, kv_blocks, RING, BLOCK_N, BLOCK_D, WITH_LSE, WITH_VOTE, WITH_MASS, HAS_LSE_PREV,
                    FP8_PV, 0,
                ),
            ),
            (
                _consumer,
                (
                    out_desc, q_bufs, k_bufs, v_bufs, out_bufs, q_full, q_empty, full, empty, work, work_full,
                    work_empty, lse_ptr, vote_ptr, mass_ptr, lse_prev_ptr, space_ptr, kv_indices_ptr, q_scale_ptr,
                    k_scale_ptr, v_scale_ptr, error_ptr, stride_ib, stride_ih, scale, vote_threshold, num_heads, seq_q,
                    seq_k, q_blocks, kv_blocks, RING, BLOCK_N, BLOCK_D, WITH_LSE, WITH_VOTE, WITH_MASS, HAS_LSE_PREV,
                    FP8_PV, 1,
                ),
            ),
            (
                produce,
                (
                    q_desc, k_desc, v_desc, q_bufs, k_bufs, v_bufs, q_full, q_empty, full, empty, work, work_full,
                    work_empty, kv_num_blocks_ptr, kv_indices_ptr, order_ptr, draw_ptr, stride_ib, stride_ih,
                    num_heads, q_blocks, kv_blocks, num_rows, RING, BLOCK_N, FP8_PV,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
