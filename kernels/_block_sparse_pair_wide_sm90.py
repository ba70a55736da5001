"""The Hopper kernel for pairs of 64-row blocks in tiles of two key blocks: device code only.

What `_block_sparse_pair_sm90.py` does, by the same walks, with fewer instructions and turns a key: the blocks that both
rows want are taken two at a time, as `_block_sparse_sm90.py` takes its blocks of 128.  Stage j of that run holds K of
its tile j and V of tile j - 1, so that one wait and one arrival serve four loads.  A tile that lacks its second block
comes first, where scores are masked anyhow; a load from past the end of the sequence fills the gap with zeros.

Blocks of one row alone have a stage each, with K and V in the first halves, and are multiplied one after the other
without overlap: they cost two rows' loads for one row's products, so loads are what they wait for.

A consumer frees every stage, its own or not, in order.  In the run it waits for the next stage before it frees one, and
elsewhere holds none while it waits: two stages always suffice.
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
    are_beyond,
    clear_past,
    declare_beyond,
    lazy_maximum,
    pass_turn,
    place,
    rescale,
    row_sums,
    take_turn,
    thread_sums,
    times_rows,
)
from sparsediff.kernels._hopper_pairs import (
    FIELD,
    draw_pair,
    field,
    hand_over_pair,
    let_pass,
    take_over_pair,
)


@gluon.jit
def _scores(b_q, k_buffer, BLOCK_D: gl.constexpr, LAYOUT: gl.constexpr):
    """Start S = Q K^T of one block."""
    k_smem = k_buffer.reshape([64, BLOCK_D]).permute((1, 0))
    b_start = gl.zeros([64, 64], gl.float32, LAYOUT)
    return warpgroup_mma(b_q, k_smem, b_start, use_acc=False, is_async=True)


@gluon.jit
def _add(b_o, b_p, v_buffer, BLOCK_D: gl.constexpr):
    """Start O += P V of one block."""
    return warpgroup_mma(b_p, v_buffer.reshape([64, BLOCK_D]), b_o, is_async=True)


@gluon.jit
def _weights(b_s, b_shift, qk_scale):
    """Probabilities under the maxima `b_shift`."""
    return gl.exp2(b_s * qk_scale - b_shift[:, None])


@gluon.jit
def _lone_block(
    b_q,
    b_o,
    b_m,
    b_l,
    k_bufs,
    v_bufs,
    full,
    empty,
    turn,
    visible,
    qk_scale,
    RING: gl.constexpr,
    BLOCK_D: gl.constexpr,
    HAS_LENGTHS: gl.constexpr,
    S_LAYOUT: gl.constexpr,
    P_LAYOUT: gl.constexpr,
):
    """A block that this row alone wants, from beginning to end."""
    stage = turn % RING
    mbarrier.wait(full.index(stage), (turn // RING) & 1)
    b_s = _scores(b_q, k_bufs.index(2 * stage), BLOCK_D, S_LAYOUT)
    b_s = warpgroup_mma_wait(0, deps=(b_s,))
    if visible < 64:
        o_n = gl.arange(0, 64, layout=gl.SliceLayout(0, S_LAYOUT))
        b_s = gl.where((o_n < visible)[None, :], b_s, float("-inf"))
        if HAS_LENGTHS:
            clear_past(v_bufs.index(2 * stage), visible, 64, BLOCK_D)
    b_m_new = lazy_maximum(b_m, gl.max(b_s, 1) * qk_scale)
    b_p = _weights(b_s, b_m_new, qk_scale)
    b_alpha = gl.exp2(b_m - b_m_new)
    b_l = b_l * b_alpha + gl.sum(b_p, 1)
    b_pd = gl.convert_layout(b_p.to(v_bufs.dtype), P_LAYOUT)
    b_o = rescale(b_o, b_alpha)
    b_o = _add(b_o, b_pd, v_bufs.index(2 * stage), BLOCK_D)
    b_o = warpgroup_mma_wait(0, deps=(b_o,))
    mbarrier.arrive(empty.index(stage), count=1)
    return b_o, b_m_new, b_l


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
    scale,
    num_heads,
    seq_q,
    pairs,
    RING: gl.constexpr,
    BLOCK_D: gl.constexpr,
    ALIAS: gl.constexpr,
    HAS_LENGTHS: gl.constexpr,
    WITH_LSE: gl.constexpr,
    GROUP: gl.constexpr,
):
    DTYPE: gl.constexpr = v_bufs.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    Q_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, S_LAYOUT, 2)
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
    item, word = take_over_pair(work, work_full, work_empty, rows, GROUP)
    while item >= 0:
        total = (item >> 32).to(gl.int32)
        i_row = item.to(gl.int32)
        i_b, i_h, i_p = place(i_row, num_heads, pairs)
        count = field(word, 0, FIELD)
        before = field(word, FIELD, FIELD)
        turns = field(word, 2 * FIELD, FIELD)
        visible = field(word, 3 * FIELD, 7)
        start = field(word, 3 * FIELD + 7, 1)
        lead = field(word, 3 * FIELD + 8, 1)
        idle = field(word, 3 * FIELD + 9, 1)
        common = before - lead
        o_m = i_p * 128 + GROUP * 64 + gl.arange(0, 64, layout=ROW_S)
        b_m = gl.full([64], float("-inf"), gl.float32, ROW_S)
        b_l = gl.zeros([64], gl.float32, ROW_S)
        b_o = gl.zeros([64, BLOCK_D], gl.float32, O_LAYOUT)
        mbarrier.wait(q_full.index(GROUP), rows & 1)
        b_q = q_smem.load(Q_LAYOUT)
        if not ALIAS:
            mbarrier.arrive(q_empty.index(GROUP), count=1)

        # A ragged block of one row alone
        if lead > 0:
            b_o, b_m, b_l = _lone_block(
                b_q, b_o, b_m, b_l, k_bufs, v_bufs, full, empty, turn, visible, qk_scale, RING, BLOCK_D, HAS_LENGTHS,
                S_LAYOUT, P_LAYOUT,
            )  # fmt: skip
        if start > 0:
            let_pass(turn, full, empty, RING)
        turn += lead + start

        # The run of both rows; its first tile may be ragged, and lacks its second block where their number is odd.
        if common > 0:
            edge = gl.where(lead > 0, 64, visible)
            stage = turn % RING
            mbarrier.wait(full.index(stage), (turn // RING) & 1)
            take_turn(GROUP)
            b_s0 = _scores(b_q, k_bufs.index(2 * stage), BLOCK_D, S_LAYOUT)
            b_s1 = _scores(b_q, k_bufs.index(2 * stage + 1), BLOCK_D, S_LAYOUT)
            pass_turn(GROUP)
            b_s0, b_s1 = warpgroup_mma_wait(0, deps=(b_s0, b_s1))
            mbarrier.arrive(empty.index(stage), count=1)
            o_n = gl.arange(0, 64, layout=gl.SliceLayout(0, S_LAYOUT))
            seen_0 = gl.where(idle > 0, 0, edge)
            seen_1 = gl.where(common % 2 == 0, 64, 0)
            b_s0 = gl.where((o_n < seen_0)[None, :], b_s0, float("-inf"))
            b_s1 = gl.where((o_n < seen_1)[None, :], b_s1, float("-inf"))
            b_m_new = lazy_maximum(b_m, gl.max(gl.maximum(b_s0, b_s1), 1) * qk_scale)
            # An idle row leaves the maximum at -inf, and -inf - -inf is NaN.
            b_shift = gl.where(b_m_new == float("-inf"), 0.0, b_m_new)
            b_p0 = _weights(b_s0, b_shift, qk_scale)
            b_p1 = _weights(b_s1, b_shift, qk_scale)
            b_alpha = gl.exp2(b_m - b_shift)
            b_o = rescale(b_o, b_alpha)
            b_l = b_l * b_alpha
            b_all_parts = thread_sums(b_p0) + thread_sums(b_p1)
            b_m = b_m_new
            turn += 1
            mbarrier.wait(full.index(turn % RING), (turn // RING) & 1)
            if HAS_LENGTHS and edge < 64:
                clear_past(v_bufs.index(2 * (turn % RING)), edge, 64, BLOCK_D)
            b_pd0 = gl.convert_layout(b_p0.to(DTYPE), P_LAYOUT)
            b_pd1 = gl.convert_layout(b_p1.to(DTYPE), P_LAYOUT)

            for _ in range(1, (common + 1) // 2):
                stage = turn % RING
                take_turn(GROUP)
                b_s0 = _scores(b_q, k_bufs.index(2 * stage), BLOCK_D, S_LAYOUT)
                b_s1 = _scores(b_q, k_bufs.index(2 * stage + 1), BLOCK_D, S_LAYOUT)
                b_o = _add(b_o, b_pd0, v_bufs.index(2 * stage), BLOCK_D)
                b_o = _add(b_o, b_pd1, v_bufs.index(2 * stage + 1), BLOCK_D)
                pass_turn(GROUP)
                b_s0, b_s1 = warpgroup_mma_wait(2, deps=(b_s0, b_s1))
                b_p0 = _weights(b_s0, b_m, qk_scale)
                b_p1 = _weights(b_s1, b_m, qk_scale)
                b_parts = thread_sums(b_p0) + thread_sums(b_p1)
                beyond = are_beyond(b_parts, GROUP, False)
                turn += 1
                # It keeps the exponentials before the wait for PV, too.
                mbarrier.wait(full.index(turn % RING), (turn // RING) & 1)
                b_o = warpgroup_mma_wait(0, deps=(b_o,))
                if beyond != 0:
                    b_s0 = _scores(b_q, k_bufs.index(2 * stage), BLOCK_D, S_LAYOUT)
                    b_s1 = _scores(b_q, k_bufs.index(2 * stage + 1), BLOCK_D, S_LAYOUT)
                    b_s0, b_s1 = warpgroup_mma_wait(0, deps=(b_s0, b_s1))
                    b_m_new = gl.maximum(b_m, gl.max(gl.maximum(b_s0, b_s1), 1) * qk_scale)
                    b_p0 = _weights(b_s0, b_m_new, qk_scale)
                    b_p1 = _weights(b_s1, b_m_new, qk_scale)
                    b_parts = thread_sums(b_p0) + thread_sums(b_p1)
                    b_alpha = gl.exp2(b_m - b_m_new)
                    b_o = times_rows(b_o, b_alpha)
                    b_all_parts = times_rows(b_all_parts, b_alpha)
                    b_l = b_l * b_alpha
                    b_m = b_m_new
                b_all_parts += b_parts
                mbarrier.arrive(empty.index(stage), count=1)
                b_pd0 = gl.convert_layout(b_p0.to(DTYPE), P_LAYOUT)
                b_pd1 = gl.convert_layout(b_p1.to(DTYPE), P_LAYOUT)

            stage = turn % RING
            b_l += row_sums(b_all_parts, ROW_S)
            b_o = _add(b_o, b_pd0, v_bufs.index(2 * stage), BLOCK_D)
            b_o = _add(b_o, b_pd1, v_bufs.index(2 * stage + 1), BLOCK_D)
            b_o = warpgroup_mma_wait(0, deps=(b_o,))
            mbarrier.arrive(empty.index(stage), count=1)
            turn += 1

        # Blocks of one row alone, in turns
        own = count - before
        for k in range(0, own):
            if (k + GROUP >= 1) & (k + GROUP <= turns):
                let_pass(turn, full, empty, RING)
                turn += 1
            b_o, b_m, b_l = _lone_block(
                b_q, b_o, b_m, b_l, k_bufs, v_bufs, full, empty, turn, 64, qk_scale, RING, BLOCK_D, HAS_LENGTHS,
                S_LAYOUT, P_LAYOUT,
            )  # fmt: skip
            turn += 1
        # What only the other row still wants
        others = total - lead - start - common - own
        passed = gl.minimum(gl.maximum(own - 1 + GROUP, 0), turns)
        for _ in range(passed, others):
            let_pass(turn, full, empty, RING)
            turn += 1

        if WITH_LSE:
            p_lse = lse_ptr + (i_row // pairs).to(gl.int64) * seq_q + o_m
            gl.store(p_lse, b_m * LN2 + gl.log(b_l), mask=o_m < seq_q)
        b_empty = gl.convert_layout(b_l, ROW_O)[:, None] == 0.0
        b_o = gl.where(b_empty, 0.0, b_o * gl.convert_layout(1.0 / b_l, ROW_O)[:, None])
        tma.store_wait(0)
        out_smem.reshape([64, BLOCK_D]).store(b_o.to(DTYPE))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [i_b, i_h, i_p * 128 + GROUP * 64, 0], out_smem)
        if ALIAS:
            # The output leaves through Q's buffer: the next Q may only land once it has been read.
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(GROUP), count=1)
        rows += 1
        item, word = take_over_pair(work, work_full, work_empty, rows, GROUP)
    tma.store_wait(0)


@gluon.jit
def _load(desc, buffers, full, stage, HALF: gl.constexpr, i_b, i_h, block):
    """One block into one half of a stage."""
    tma.async_copy_global_to_shared(
        desc, [i_b, i_h, block * 64, 0], full.index(stage), buffers.index(2 * stage + HALF)
    )


@gluon.jit
def _load_lone(
    k_desc, v_desc, k_bufs, v_bufs, full, empty, turn, i_b, i_h, block, RING: gl.constexpr
):
    """K and V of a block that one row alone wants."""
    stage = turn % RING
    mbarrier.wait(empty.index(stage), ((turn // RING) & 1) ^ 1)
    mbarrier.expect(full.index(stage), 2 * k_desc.block_type.nbytes)
    _load(k_desc, k_bufs, full, stage, 0, i_b, i_h, block)
    _load(v_desc, v_bufs, full, stage, 0, i_b, i_h, block)


@gluon.jit
def _produce(
    q_desc,
    k_desc,
    v_desc,
    q_bufs,
    k_bufs,
    v_bufs,
    q_full,
    q_empty,
    full,
    empty,
    work,
    work_full,
    work_empty,
    totals_ptr,
    rows_ptr,
    walk_ptr,
    order_ptr,
    draw_ptr,
    stride_b,
    stride_h,
    num_heads,
    pairs,
    kv_blocks,
    num_draws,
    RING: gl.constexpr,
):
    """Follow the walks with TMA: the run of both rows in tiles, everything else block by block."""
    BOX: gl.constexpr = k_desc.block_type.nbytes
    turn = 0
    rows = 0
    item, walk, word_0, word_1 = draw_pair(
        gl.program_id(0), order_ptr, totals_ptr, rows_ptr, stride_b, stride_h, num_heads, pairs, num_draws
    )  # fmt: skip
    while item >= 0:
        hand_over_pair(item, word_0, word_1, work, work_full, work_empty, rows)
        total = (item >> 32).to(gl.int32)
        i_b, i_h, i_p = place(item.to(gl.int32), num_heads, pairs)
        p_walk = walk_ptr + walk * kv_blocks
        leads = field(word_0, 3 * FIELD + 7, 1) + field(word_0, 3 * FIELD + 8, 1)
        common = field(word_0, FIELD, FIELD) - field(word_0, 3 * FIELD + 8, 1)
        # On its way while the rows before are finished
        t = gl.num_programs(0) + gl.atomic_add(draw_ptr, 1)
        item, walk, word_0, word_1 = draw_pair(
            t, order_ptr, totals_ptr, rows_ptr, stride_b, stride_h, num_heads, pairs, num_draws
        )
        for w in gl.static_range(2):
            mbarrier.wait(q_empty.index(w), (rows & 1) ^ 1)
            mbarrier.expect(q_full.index(w), q_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                q_desc, [i_b, i_h, i_p * 128 + w * 64, 0], q_full.index(w), q_bufs.index(w)
            )
        for _ in range(0, leads):
            _load_lone(
                k_desc, v_desc, k_bufs, v_bufs, full, empty, turn, i_b, i_h, gl.load(p_walk), RING
            )
            turn += 1
        # Tile t of the run has its blocks 2t - odd and 2t + 1 - odd, the first one only block 0 where their number is odd:
        # in place of the other come zeros from past the end.
        odd = common % 2
        p_run = p_walk + leads
        value_0 = 0
        value_1 = 0
        key_0 = gl.load(p_run)
        key_1 = gl.where(odd > 0, kv_blocks, gl.load(p_run + gl.minimum(1, total - leads - 1)))
        tiles = (common + 1) // 2
        stages = gl.where(common > 0, tiles + 1, 0)
        for t in range(0, stages):
            after = gl.minimum(2 * t + 2 - odd, total - leads - 1)
            after_0 = gl.load(p_run + after)
            after_1 = gl.load(p_run + gl.minimum(after + 1, total - leads - 1))
            stage = turn % RING
            mbarrier.wait(empty.index(stage), ((turn // RING) & 1) ^ 1)
            boxes = gl.where(t < tiles, 2, 0) + gl.where(t > 0, 2, 0)
            if boxes == 4:
                mbarrier.expect(full.index(stage), 4 * BOX)
            else:
                mbarrier.expect(full.index(stage), 2 * BOX)
            if t < tiles:
                _load(k_desc, k_bufs, full, stage, 0, i_b, i_h, key_0)
                _load(k_desc, k_bufs, full, stage, 1, i_b, i_h, key_1)
            if t > 0:
                _load(v_desc, v_bufs, full, stage, 0, i_b, i_h, value_0)
                _load(v_desc, v_bufs, full, stage, 1, i_b, i_h, value_1)
            value_0 = key_0
            value_1 = key_1
            key_0 = after_0
            key_1 = after_1
            turn += 1
        begin = leads + common
        following = gl.load(p_walk + gl.minimum(begin, total - 1))
        for u in range(begin, total):
            current = following
            following = gl.load(p_walk + gl.minimum(u + 1, total - 1))
            _load_lone(k_desc, v_desc, k_bufs, v_bufs, full, empty, turn, i_b, i_h, current, RING)
            turn += 1
        rows += 1
    hand_over_pair(item, word_0, word_1, work, work_full, work_empty, rows)


# Sizes differ from call to call and gain nothing from specialisation: one binary serves every shape.
@gluon.jit(
    do_not_specialize=[
        "stride_b",
        "stride_h",
        "scale",
        "num_heads",
        "seq_q",
        "pairs",
        "kv_blocks",
        "num_draws",
    ]
)
def block_sparse_wide_pairs_sm90(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    lse_ptr,
    totals_ptr,
    rows_ptr,
    walk_ptr,
    order_ptr,
    draw_ptr,
    stride_b,
    stride_h,
    scale,
    num_heads,
    seq_q,
    pairs,
    kv_blocks,
    num_draws,
    RING: gl.constexpr,
    BLOCK_D: gl.constexpr,
    ALIAS: gl.constexpr,
    HAS_LENGTHS: gl.constexpr,
    WITH_LSE: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Attention of pairs of 64-row query blocks over 64-row key blocks; arguments of `block_sparse_pairs_sm90`."""
    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, 64, BLOCK_D], q_desc.layout)
    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [2 * RING, 1, 1, 64, BLOCK_D], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(v_desc.dtype, [2 * RING, 1, 1, 64, BLOCK_D], v_desc.layout)
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
    # Two draws of three words: the pair, and the numbers of each of its rows
    work = gl.allocate_shared_memory(gl.int64, [6, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
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
                    work_empty, lse_ptr, scale, num_heads, seq_q, pairs, RING, BLOCK_D, ALIAS, HAS_LENGTHS,
                    WITH_LSE, 0,
                ),
            ),
            (
                _consumer,
                (
                    out_desc, q_bufs, k_bufs, v_bufs, out_bufs, q_full, q_empty, full, empty, work, work_full,
                    work_empty, lse_ptr, scale, num_heads, seq_q, pairs, RING, BLOCK_D, ALIAS, HAS_LENGTHS,
                    WITH_LSE, 1,
                ),
            ),
            (
                _produce,
                (
                    q_desc, k_desc, v_desc, q_bufs, k_bufs, v_bufs, q_full, q_empty, full, empty, work, work_full,
                    work_empty, totals_ptr, rows_ptr, walk_ptr, order_ptr, draw_ptr, stride_b, stride_h, num_heads,
                    pairs, kv_blocks, num_draws, RING,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
