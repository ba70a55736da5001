"""Block-sparse FlashAttention forward for Hopper in Gluon: device code only (`_block_sparse_gluon.py` launches it).

One producer warp follows the lists with TMA; two consumer warpgroups of 64 query rows each take turns on the tensor
cores, so that one's softmax hides under the other's products (FlashAttention-3, arXiv 2407.08608).  The grid is
persistent: a program that finishes a query block draws the next one in the order it is given, and its producer hands
the draw to the consumers.  Who computes a row does not change its bits.

Stage j of the one ring holds K[j] and V[j-1], which the same turn reads (S_j = Q K_j^T beside O += P_{j-1} V_{j-1})
and frees together: one wait and one arrival a tile.

Tiles after the first are exponentiated under the maximum that a row has so far, which is never above the true one.  Its
new maximum is looked for only if a sum of probabilities tells that the old one is far too low (`are_beyond`); then the
tile is done again, after PV, by every warp that needs it: the scores are kept.  So nothing stands between scores and
exponentials, and most tiles rescale nothing.  The question stands before the wait for PV: without it ptxas sinks the
exponentials past the wait and nothing overlaps PV.  `tests/kernels/test_aot.py` reads the machine code to keep it so.
At a head size of 128 with key blocks of 128, scores, output and two sets of probabilities leave no registers for the
queries, which products then read from shared memory.

What by-products need beside sums and maxima stands under the next tile's first product: the shuffles of mass, votes.
The vote is held against the true running maximum.  Votes gather as bits of a register, a bit a tile.

With `WITH_MASS` every row of every tile leaves the logarithm of its sum in a workspace that belongs to the program, and
the finished row of blocks turns them into mass: `exp(log sum - log-sum-exp)`, summed over rows in a fixed order.

`_block_sparse_8bit_sm90.py` is the same walk with 8-bit operands.
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
    clear_past,
    declare_beyond,
    gather_votes,
    leave_mass,
    leave_norm,
    load_entries,
    log2,
    mass_place,
    pack_pairs,
    pass_turn,
    place,
    produce,
    row_list,
    row_sums,
    store_mass,
    store_votes,
    take_over,
    take_turn,
    thread_maxima,
    thread_sums,
    times_rows,
    visible_keys,
)


@gluon.jit
def _scores(b_q, k_buffer, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, LAYOUT: gl.constexpr):
    """Start S = Q K^T of one tile."""
    k_smem = k_buffer.reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
    b_start = gl.zeros([64, BLOCK_N], gl.float32, LAYOUT)
    return warpgroup_mma(b_q, k_smem, b_start, use_acc=False, is_async=True)


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
    kv_lengths_ptr,
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
    ALIAS: gl.constexpr,
    HAS_LENGTHS: gl.constexpr,
    WITH_LSE: gl.constexpr,
    WITH_VOTE: gl.constexpr,
    WITH_MASS: gl.constexpr,
    HAS_LSE_PREV: gl.constexpr,
    GROUP: gl.constexpr,
):
    DTYPE: gl.constexpr = v_bufs.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    # Else registers spill.
    Q_IN_REGISTERS: gl.constexpr = BLOCK_N * BLOCK_D < 128 * 128
    ROW_S: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    ROW_O: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    turn = 0
    rows = 0
    q_smem = q_bufs.index(GROUP).reshape([64, BLOCK_D])
    Q_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, S_LAYOUT, 2)
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
        length = visible_keys(kv_lengths_ptr, i_b, seq_k, HAS_LENGTHS)
        length = gl.where(count > 0, length, 0)
        o_m = i_m * 128 + GROUP * 64 + gl.arange(0, 64, layout=ROW_S)
        b_m = gl.full([64], float("-inf"), gl.float32, ROW_S)
        b_o = gl.zeros([64, BLOCK_D], gl.float32, O_LAYOUT)
        b_votes = gl.zeros([64], gl.int32, ROW_S)
        if WITH_VOTE:
            vote_row = vote_ptr + i_row.to(gl.int64) * kv_blocks
            # Like probabilities, under the row's maximum; two bits more, for equal is not beyond.  Rows past the end of the
            # sequence never pass.
            least = gl.exp2(vote_threshold) * (1 + 2**-22)
            b_least = gl.where((o_m < seq_q) & (count > 0), least, float("inf"))
            b_bar = b_least
            b_entries = load_entries(p_list, count - 1, ROW_S)
            # The first block stays.
            b_votes += (count > 0).to(gl.int32)
        if HAS_LSE_PREV:
            p_norm = lse_prev_ptr + (i_row // q_blocks).to(gl.int64) * seq_q + o_m
            b_norm = gl.load(p_norm, mask=o_m < seq_q, other=0.0)

        # The first tile, the only one that can be ragged
        mbarrier.wait(q_full.index(GROUP), rows & 1)
        b_q = q_smem
        if Q_IN_REGISTERS:
            b_q = q_smem.load(Q_LAYOUT)
            if not ALIAS:
                mbarrier.arrive(q_empty.index(GROUP), count=1)
        mbarrier.wait(full.index(turn % RING), (turn // RING) & 1)
        take_turn(GROUP)
        b_s = _scores(b_q, k_bufs.index(turn % RING), BLOCK_N, BLOCK_D, S_LAYOUT)
        pass_turn(GROUP)
        b_s = warpgroup_mma_wait(0, deps=(b_s,))
        mbarrier.arrive(empty.index(turn % RING), count=1)
        if current * BLOCK_N + BLOCK_N > length:
            o_n = current * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
            b_s = gl.where((o_n < length)[None, :], b_s, float("-inf"))
        b_m = gl.max(b_s, 1) * qk_scale
        # An empty row leaves the maximum at -inf, and -inf - -inf is NaN.
        b_shift = gl.where(b_m == float("-inf"), 0.0, b_m)
        b_p = gl.exp2(b_s * qk_scale - b_shift[:, None])
        b_parts = thread_sums(b_p)
        b_all_parts = b_parts
        if WITH_VOTE:
            b_tops = thread_maxima(b_p)
        if WITH_MASS:
            i_space = (gl.program_id(0) * 2 + (rows & 1)).to(gl.int64)
            p_space = space_ptr + i_space * (kv_blocks + 1) * MASS_WIDTH
            b_left = mass_place(p_space, GROUP, ROW_S)
            if HAS_LSE_PREV:
                b_last = b_left + count.to(gl.int64) * (MASS_WIDTH * 4)
                leave_norm(b_last, b_norm * LOG2E, o_m, seq_q)
        turn += 1
        mbarrier.wait(full.index(turn % RING), (turn // RING) & 1)
        if HAS_LENGTHS and current * BLOCK_N + BLOCK_N > length:
            clear_past(v_bufs.index(turn % RING), length - current * BLOCK_N, BLOCK_N, BLOCK_D)
        b_pd = gl.convert_layout(b_p.to(DTYPE), P_LAYOUT)

        for j in range(1, count):
            stage = turn % RING
            take_turn(GROUP)
            b_s = _scores(b_q, k_bufs.index(stage), BLOCK_N, BLOCK_D, S_LAYOUT)
            if WITH_MASS:
                leave_mass(b_left, row_sums(b_parts, ROW_S), b_m)
                b_left += MASS_WIDTH * 4
            if WITH_VOTE:
                b_top = gl.convert_layout(gl.max(b_tops, 1), ROW_S)
                b_votes = gather_votes(b_votes, b_top, b_bar, j - 1)
                b_bar = gl.maximum(b_bar, b_top * b_least)
                if (j & 31) == 0:
                    store_votes(b_votes, b_entries, vote_row)
                    b_entries = load_entries(p_list, count - 1 - j, ROW_S)
                    b_votes = gl.zeros([64], gl.int32, ROW_S)
            b_o = warpgroup_mma(
                b_pd, v_bufs.index(stage).reshape([BLOCK_N, BLOCK_D]), b_o, is_async=True
            )
            pass_turn(GROUP)
            b_s = warpgroup_mma_wait(1, deps=(b_s,))
            b_p = gl.exp2(b_s * qk_scale - b_m[:, None])
            b_parts = thread_sums(b_p)
            # The scores stay for doing it again: there is no room for probabilities in 32 bits beside them.
            b_pd_next = gl.convert_layout(pack_pairs(b_p, DTYPE), P_LAYOUT)
            if WITH_VOTE:
                b_tops = thread_maxima(b_p)
            # Asked here: ptxas sinks exponentials past the next wait if nothing before it needs them.
            beyond = are_beyond(b_parts, GROUP, True, b_tops if WITH_VOTE else None)
            turn += 1
            mbarrier.wait(full.index(turn % RING), (turn // RING) & 1)
            b_o = warpgroup_mma_wait(0, deps=(b_o,))
            mbarrier.arrive(empty.index(stage), count=1)
            b_pd = b_pd_next
            if beyond != 0:  # some warps only: nothing in here meets other warps
                b_m_new = gl.maximum(b_m, gl.max(b_s, 1) * qk_scale)
                b_p = gl.exp2(b_s * qk_scale - b_m_new[:, None])
                b_parts = thread_sums(b_p)
                b_alpha = gl.exp2(b_m - b_m_new)
                if WITH_VOTE:
                    b_tops = thread_maxima(b_p)
                    b_bar *= b_alpha
                b_o = times_rows(b_o, b_alpha)
                b_all_parts = times_rows(b_all_parts, b_alpha)
                b_m = b_m_new
                b_pd = gl.convert_layout(pack_pairs(b_p, DTYPE), P_LAYOUT)
            b_all_parts += b_parts

        if not (Q_IN_REGISTERS or ALIAS):
            mbarrier.arrive(q_empty.index(GROUP), count=1)
        if WITH_VOTE:
            b_top = gl.convert_layout(gl.max(b_tops, 1), ROW_S)
            b_votes = gather_votes(b_votes, b_top, b_bar, count - 1)
            store_votes(b_votes, b_entries, vote_row)
        b_l = row_sums(b_all_parts, ROW_S)
        b_o = warpgroup_mma(
            b_pd, v_bufs.index(turn % RING).reshape([BLOCK_N, BLOCK_D]), b_o, is_async=True
        )
        b_o = warpgroup_mma_wait(0, deps=(b_o,))
        mbarrier.arrive(empty.index(turn % RING), count=1)
        turn += 1
        rows += 1

        if WITH_LSE:
            p_lse = lse_ptr + (i_row // q_blocks).to(gl.int64) * seq_q + o_m
            gl.store(p_lse, b_m * LN2 + gl.log(b_l), mask=o_m < seq_q)
        b_empty = gl.convert_layout(b_l, ROW_O)[:, None] == 0.0
        b_o = gl.where(b_empty, 0.0, b_o * gl.convert_layout(1.0 / b_l, ROW_O)[:, None])
        tma.store_wait(0)
        out_smem.reshape([64, BLOCK_D]).store(b_o.to(DTYPE))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [i_b, i_h, i_m * 128 + GROUP * 64, 0], out_smem)
        if ALIAS:
            # The output leaves through Q's buffer: the next Q may only land once it has been read.
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(GROUP), count=1)
        if WITH_MASS:
            leave_mass(b_left, row_sums(b_parts, ROW_S), b_m)
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
def block_sparse_fwd_sm90(
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
    kv_lengths_ptr,
    order_ptr,
    draw_ptr,
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
    ALIAS: gl.constexpr,
    HAS_LENGTHS: gl.constexpr,
    WITH_LSE: gl.constexpr,
    WITH_VOTE: gl.constexpr,
    WITH_MASS: gl.constexpr,
    HAS_LSE_PREV: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Attention of query blocks of 128 rows over key blocks of `BLOCK_N`.

    Descriptors are over `[B, H, S, D]` views: `[1, 1, 64, BLOCK_D]` boxes of queries and output, `[1, 1, BLOCK_N,
    BLOCK_D]` of keys and values.  `kv_num_blocks_ptr` and `order_ptr` are `int32 [B * H * Mq]`, counts of blocks that
    begin before the key length; `draw_ptr` `int32 [1]`, `vote_ptr` `uint8 [B, H, Mq, Nk]` and `mass_ptr` `float32
    [B, H, Mq, Nk]` start as zeros; `space_ptr` is `float32 [programs, 2, Nk + 1, MASS_WIDTH]`.
    `ALIAS`: the output shares Q's buffers, which makes room for a third stage.
    """
    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, 64, BLOCK_D], q_desc.layout)
    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [RING, 1, 1, BLOCK_N, BLOCK_D], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(v_desc.dtype, [RING, 1, 1, BLOCK_N, BLOCK_D], v_desc.layout)
    if ALIAS:
        out_bufs = q_bufs
    else:
        out_bufs = gl.allocate_shared_memory(
            out_desc.dtype, [2, 1, 1, 64, BLOCK_D], out_desc.layout
        )
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
                    work_empty, lse_ptr, vote_ptr, mass_ptr, lse_prev_ptr, space_ptr, kv_indices_ptr, kv_lengths_ptr,
                    stride_ib, stride_ih, scale, vote_threshold, num_heads, seq_q, seq_k, q_blocks, kv_blocks, RING,
                    BLOCK_N, BLOCK_D, ALIAS, HAS_LENGTHS, WITH_LSE, WITH_VOTE, WITH_MASS, HAS_LSE_PREV, 0,
                ),
            ),
            (
                _consumer,
                (
                    out_desc, q_bufs, k_bufs, v_bufs, out_bufs, q_full, q_empty, full, empty, work, work_full,
                    work_empty, lse_ptr, vote_ptr, mass_ptr, lse_prev_ptr, space_ptr, kv_indices_ptr, kv_lengths_ptr,
                    stride_ib, stride_ih, scale, vote_threshold, num_heads, seq_q, seq_k, q_blocks, kv_blocks, RING,
                    BLOCK_N, BLOCK_D, ALIAS, HAS_LENGTHS, WITH_LSE, WITH_VOTE, WITH_MASS, HAS_LSE_PREV, 1,
                ),
            ),
            (
                produce,
                (
                    q_desc, k_desc, v_desc, q_bufs, k_bufs, v_bufs, q_full, q_empty, full, empty, work, work_full,
                    work_empty, kv_num_blocks_ptr, kv_indices_ptr, order_ptr, draw_ptr, stride_ib, stride_ih,
                    num_heads, q_blocks, kv_blocks, num_rows, RING, BLOCK_N, False,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
