"""Block-sparse FlashAttention forward for Hopper, two rows of 64-token query blocks a program: device code only.

`_block_sparse_pair_gluon.py` launches it.  A row of 64 queries with a list of its own reads as many bytes a product as
the L2 cache can deliver.  So each consumer warpgroup takes one of two neighbouring rows, and the producer follows what
`_block_pairs_fwd.pair_rows` makes of their lists: every block once, those of both rows first, then those of one row
alone, the rows in turns.  A block that one row alone wants is loaded for it alone; the other consumer lets it pass.

Stage u of the ring holds K and V of block u of that walk.  A consumer multiplies S = Q K^T of one of its blocks beside
O += P V of the one before, and frees a stage once both products of it are done.  It waits for and frees every stage,
its own or not, and in order: so the ring is never more than a lap ahead of either consumer, and one phase bit tells
laps apart.  A consumer that waits for a stage holds one other at most, and between two of its stages there is one of
somebody else's at most, except before its first and after its last, when it holds none: three stages always suffice.
`tests/kernels/test_pair_kernel.py` runs this source under random interleavings.

With `OVERLAP` off, for two programs on a multiprocessor at head size 64, a consumer ends a block's products before it
begins the next block's: its registers have no room for both, and three other consumers fill its waits.

Where its own blocks are, a consumer knows from four numbers (`_position`); no list is read but by the producer.  The
warpgroups take turns on the tensor cores only over the blocks of both rows, which are as many for either.

Nothing else differs from `_block_sparse_sm90.py`: no running maximum in most blocks, a persistent grid that draws pairs,
the wait that keeps the exponentials before the wait for PV.
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
    assembly,
    clear_past,
    declare_beyond,
    pack_pairs,
    place,
    row_sums,
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
def _turn(on, CODE: gl.constexpr):
    """Run a named barrier's instruction where `on` is not 0; the whole warp agrees on it."""
    gl.inline_asm_elementwise(
        CODE, "=r,r", [on.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1
    )


TAKE_0, TAKE_1, PASS_0, PASS_1 = (
    gl.constexpr(
        "{ .reg .pred p; setp.ne.s32 p, $1, 0; " + f"@p {code}, 256; mov.u32 $0, 0; " + "}"
    )
    for code in ("bar.sync 9", "bar.sync 10", "bar.arrive 10", "bar.arrive 9")
)


@gluon.jit
def take_turn(on, TURNS: gl.constexpr, GROUP: gl.constexpr):
    """Where both consumers have the block: wait until the other one has issued its products."""
    if TURNS:
        if GROUP == 0:
            _turn(on, TAKE_0)
        else:
            _turn(on, TAKE_1)


@gluon.jit
def pass_turn(on, TURNS: gl.constexpr, GROUP: gl.constexpr):
    if TURNS:
        if GROUP == 0:
            _turn(on, PASS_0)
        else:
            _turn(on, PASS_1)


@gluon.jit
def _position(i, start, before, turns, GROUP: gl.constexpr):
    """Where in the walk of a pair a row's own block `i` is: one of the other row stands before each of the `turns`."""
    return start + i + gl.minimum(gl.maximum(i - before + GROUP, 0), turns)


@gluon.jit
def _scores(b_q, k_buffer, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, LAYOUT: gl.constexpr):
    """Start S = Q K^T of one block."""
    k_smem = k_buffer.reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
    b_start = gl.zeros([64, BLOCK_N], gl.float32, LAYOUT)
    return warpgroup_mma(b_q, k_smem, b_start, use_acc=False, is_async=True)


@gluon.jit
def _add_values(b_o, b_pd, v_bufs, empty, stage, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr):
    """O += P V of one block, from beginning to end; frees its stage."""
    v_smem = v_bufs.index(stage).reshape([BLOCK_N, BLOCK_D])
    b_o = warpgroup_mma(b_pd, v_smem, b_o, is_async=True)
    b_o = warpgroup_mma_wait(0, deps=(b_o,))
    mbarrier.arrive(empty.index(stage), count=1)
    return b_o


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
    TURNS: gl.constexpr,
    SHARED_Q: gl.constexpr,
    OVERLAP: gl.constexpr,
    HAS_LENGTHS: gl.constexpr,
    WITH_LSE: gl.constexpr,
    GROUP: gl.constexpr,
):
    BLOCK_N: gl.constexpr = 64
    DTYPE: gl.constexpr = v_bufs.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    Q_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, S_LAYOUT, 2)
    ROW_S: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    ROW_O: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    first = 0  # where the walk of the pair begins in the ring
    rows = 0
    q_smem = q_bufs.index(GROUP).reshape([64, BLOCK_D])
    out_smem = out_bufs.index(GROUP)
    qk_scale = scale * LOG2E
    declare_beyond(GROUP)
    if TURNS and GROUP == 1:
        assembly("bar.arrive 9, 256; mov.u32 $0, 0;")
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
        o_m = i_p * 128 + GROUP * 64 + gl.arange(0, 64, layout=ROW_S)
        b_o = gl.zeros([64, BLOCK_D], gl.float32, O_LAYOUT)

        # The first block, the only one that can be ragged
        mbarrier.wait(q_full.index(GROUP), rows & 1)
        b_q = q_smem if SHARED_Q else q_smem.load(Q_LAYOUT)
        if not ALIAS:
            mbarrier.arrive(q_empty.index(GROUP), count=1)
        turn = first + _position(0, start, before, turns, GROUP)
        for other in range(first, turn):
            let_pass(other, full, empty, RING)
        mbarrier.wait(full.index(turn % RING), (turn // RING) & 1)
        both = (before > lead) & (lead == 0)
        take_turn(both, TURNS, GROUP)
        b_s = _scores(b_q, k_bufs.index(turn % RING), BLOCK_N, BLOCK_D, S_LAYOUT)
        pass_turn(both, TURNS, GROUP)
        b_s = warpgroup_mma_wait(0, deps=(b_s,))
        seen = gl.where(idle > 0, 0, visible)
        if seen < BLOCK_N:
            o_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
            b_s = gl.where((o_n < seen)[None, :], b_s, float("-inf"))
        b_m = gl.max(b_s, 1) * qk_scale
        # A row that attends to nothing leaves the maximum at -inf, and -inf - -inf is NaN.
        b_shift = gl.where(b_m == float("-inf"), 0.0, b_m)
        b_p = gl.exp2(b_s * qk_scale - b_shift[:, None])
        b_all_parts = thread_sums(b_p)
        if HAS_LENGTHS and visible < BLOCK_N:
            clear_past(v_bufs.index(turn % RING), visible, BLOCK_N, BLOCK_D)
        b_pd = gl.convert_layout(b_p.to(DTYPE), P_LAYOUT)
        if not OVERLAP:
            b_o = _add_values(b_o, b_pd, v_bufs, empty, turn % RING, BLOCK_N, BLOCK_D)

        for i in range(1, count):
            held = turn % RING
            following = first + _position(i, start, before, turns, GROUP)
            if following > turn + 1:
                let_pass(turn + 1, full, empty, RING)
            turn = following
            stage = turn % RING
            phase = (turn // RING) & 1
            both = i < before
            mbarrier.wait(full.index(stage), phase)
            take_turn(both, TURNS, GROUP)
            b_s = _scores(b_q, k_bufs.index(stage), BLOCK_N, BLOCK_D, S_LAYOUT)
            if OVERLAP:
                b_o = warpgroup_mma(
                    b_pd, v_bufs.index(held).reshape([BLOCK_N, BLOCK_D]), b_o, is_async=True
                )
                pass_turn(both, TURNS, GROUP)
                b_s = warpgroup_mma_wait(1, deps=(b_s,))
            else:
                pass_turn(both, TURNS, GROUP)
                b_s = warpgroup_mma_wait(0, deps=(b_s,))
            b_p = gl.exp2(b_s * qk_scale - b_m[:, None])
            b_parts = thread_sums(b_p)
            if OVERLAP:
                b_pd_next = gl.convert_layout(pack_pairs(b_p, DTYPE), P_LAYOUT)
            # Asked here: ptxas sinks exponentials past the wait for PV if nothing before it needs them.
            beyond = are_beyond(b_parts, GROUP, OVERLAP)
            if OVERLAP:
                # Over as well: it keeps the exponentials before the wait for PV.
                mbarrier.wait(full.index(stage), phase)
                b_o = warpgroup_mma_wait(0, deps=(b_o,))
                mbarrier.arrive(empty.index(held), count=1)
                b_pd = b_pd_next
            if beyond != 0:
                if not OVERLAP:  # few registers: scores are made again
                    b_s = _scores(b_q, k_bufs.index(stage), BLOCK_N, BLOCK_D, S_LAYOUT)
                    b_s = warpgroup_mma_wait(0, deps=(b_s,))
                b_m_new = gl.maximum(b_m, gl.max(b_s, 1) * qk_scale)
                b_p = gl.exp2(b_s * qk_scale - b_m_new[:, None])
                b_parts = thread_sums(b_p)
                if OVERLAP:
                    b_pd = gl.convert_layout(pack_pairs(b_p, DTYPE), P_LAYOUT)
                b_alpha = gl.exp2(b_m - b_m_new)
                b_o = times_rows(b_o, b_alpha)
                b_all_parts = times_rows(b_all_parts, b_alpha)
                b_m = b_m_new
            b_all_parts += b_parts
            if not OVERLAP:
                b_pd = gl.convert_layout(b_p.to(DTYPE), P_LAYOUT)
                b_o = _add_values(b_o, b_pd, v_bufs, empty, stage, BLOCK_N, BLOCK_D)

        if OVERLAP:
            b_o = _add_values(b_o, b_pd, v_bufs, empty, turn % RING, BLOCK_N, BLOCK_D)

        b_l = row_sums(b_all_parts, ROW_S)
        if WITH_LSE:
            p_lse = lse_ptr + (i_row // pairs).to(gl.int64) * seq_q + o_m
            gl.store(p_lse, b_m * LN2 + gl.log(b_l), mask=o_m < seq_q)
        b_empty = gl.convert_layout(b_l, ROW_O)[:, None] == 0.0
        b_o = gl.where(b_empty, 0.0, b_o * gl.convert_layout(1.0 / b_l, ROW_O)[:, None])
        tma.store_wait(0)
        out_smem.reshape([64, BLOCK_D]).store(b_o.to(DTYPE))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [i_b, i_h, i_p * 128 + GROUP * 64, 0], out_smem)
        # What only the other row still wants
        for other in range(turn + 1, first + total):
            let_pass(other, full, empty, RING)
        if ALIAS:
            # The output leaves through Q's buffer: the next Q may only land once it has been read.
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(GROUP), count=1)
        first += total
        rows += 1
        item, word = take_over_pair(work, work_full, work_empty, rows, GROUP)
    tma.store_wait(0)


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
    """Follow the walks with TMA: stage u of the ring gets K and V of block u."""
    BLOCK_N: gl.constexpr = 64
    BYTES: gl.constexpr = k_desc.block_type.nbytes + v_desc.block_type.nbytes
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
        following = gl.load(p_walk)
        for u in range(total):
            current = following
            following = gl.load(p_walk + gl.minimum(u + 1, total - 1))
            stage = turn % RING
            mbarrier.wait(empty.index(stage), ((turn // RING) & 1) ^ 1)
            mbarrier.expect(full.index(stage), BYTES)
            tma.async_copy_global_to_shared(
                k_desc, [i_b, i_h, current * BLOCK_N, 0], full.index(stage), k_bufs.index(stage)
            )
            tma.async_copy_global_to_shared(
                v_desc, [i_b, i_h, current * BLOCK_N, 0], full.index(stage), v_bufs.index(stage)
            )
            turn += 1
            if u == 0:
                for w in gl.static_range(2):
                    mbarrier.wait(q_empty.index(w), (rows & 1) ^ 1)
                    mbarrier.expect(q_full.index(w), q_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(
                        q_desc, [i_b, i_h, i_p * 128 + w * 64, 0], q_full.index(w), q_bufs.index(w)
                    )
                # The consumers have a block to work on while the next draw is on its way.
                t = gl.num_programs(0) + gl.atomic_add(draw_ptr, 1)
                item, walk, word_0, word_1 = draw_pair(
                    t, order_ptr, totals_ptr, rows_ptr, stride_b, stride_h, num_heads, pairs, num_draws
                )  # fmt: skip
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
def block_sparse_pairs_sm90(
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
    TURNS: gl.constexpr,
    SHARED_Q: gl.constexpr,
    OVERLAP: gl.constexpr,
    REGISTERS: gl.constexpr,
    HAS_LENGTHS: gl.constexpr,
    WITH_LSE: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Attention of pairs of 64-row query blocks over 64-row key blocks.

    Descriptors are over `[B, H, S, D]` views in boxes `[1, 1, 64, BLOCK_D]`.  `totals_ptr` and `order_ptr` are
    `int32 [B * H * pairs]`, `draw_ptr` `int32 [1]` starts at 0.  `rows_ptr` `int64 [.., pairs, 2]` and `walk_ptr`
    `int32 [.., pairs, Nk]` are what `pair_rows` makes, `stride_b` and `stride_h` pairs apart (0: shared).
    `ALIAS`: the output shares Q's buffers.  `TURNS`: the warpgroups take turns over the blocks of both rows.
    `SHARED_Q`: products read Q from shared memory; needs `ALIAS`.  `REGISTERS`: of each consumer.
    """
    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, 64, BLOCK_D], q_desc.layout)
    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [RING, 1, 1, 64, BLOCK_D], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(v_desc.dtype, [RING, 1, 1, 64, BLOCK_D], v_desc.layout)
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
                    work_empty, lse_ptr, scale, num_heads, seq_q, pairs, RING, BLOCK_D, ALIAS, TURNS, SHARED_Q,
                    OVERLAP, HAS_LENGTHS, WITH_LSE, 0,
                ),
            ),
            (
                _consumer,
                (
                    out_desc, q_bufs, k_bufs, v_bufs, out_bufs, q_full, q_empty, full, empty, work, work_full,
                    work_empty, lse_ptr, scale, num_heads, seq_q, pairs, RING, BLOCK_D, ALIAS, TURNS, SHARED_Q,
                    OVERLAP, HAS_LENGTHS, WITH_LSE, 1,
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
        [REGISTERS, 24],
    )  # fmt: skip
