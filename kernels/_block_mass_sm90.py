"""Exact softmax mass of every block for Hopper in Gluon: device code only (`_block_mass_gluon.py` launches it).

    mass[m, n] = sum over the rows i of query block m and the keys j of key block n of exp(scale * q_i . k_j - lse_i)

One producer warp streams all keys past 256 query rows held by four consumer warpgroups of 64.  A warpgroup's product
and its exponentials take equally long, so four of them keep both units busy without taking turns.

Without a log-sum-exp at hand one pass is still enough: what leaves the loop is the logarithm of every row's sum in
every block, `float32` beside 256 bytes of keys read, and is turned into mass when the rows are finished.  With one,
the sum over a warp's 16 rows leaves instead.  Either goes through a workspace that belongs to the program, so that
sums over rows have a fixed order: no atomics, the same bits every time.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparsediff.kernels._hopper import (
    LOG2E,
    assembly,
    log2,
    store_warp_sum,
    sum_rows,
    visible_keys,
)

ROWS = gl.constexpr(256)  # query rows a program holds
PAIR_ROWS = gl.constexpr(128)  # of two warpgroups, which share what they leave in the workspace
COLUMNS = gl.constexpr(128)  # keys a tile


@gluon.jit
def _meet_pair(PAIR: gl.constexpr):
    """Both warpgroups of a pair wait for each other.  Barriers 0-8 are Triton's own."""
    assembly("bar.sync 9, 256; mov.u32 $0, 0;" if PAIR == 0 else "bar.sync 10, 256; mov.u32 $0, 0;")


@gluon.jit
def _producer(
    q_desc,
    k_desc,
    q_bufs,
    k_bufs,
    q_full,
    q_empty,
    full,
    empty,
    kv_lengths_ptr,
    num_heads,
    seq_k,
    row_tiles,
    num_items,
    RING: gl.constexpr,
    HAS_LENGTHS: gl.constexpr,
):
    turn = 0
    q_phase = 1
    for t in range(gl.program_id(0), num_items, gl.num_programs(0)):
        i_bh = t // row_tiles
        i_b = i_bh // num_heads
        i_h = i_bh % num_heads
        tiles = gl.cdiv(visible_keys(kv_lengths_ptr, i_b, seq_k, HAS_LENGTHS), COLUMNS)
        start = (t % row_tiles) * ROWS
        for w in gl.static_range(4):
            mbarrier.wait(q_empty.index(w), q_phase)
            mbarrier.expect(q_full.index(w), q_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                q_desc, [i_b, i_h, start + w * 64, 0], q_full.index(w), q_bufs.index(w)
            )
        q_phase ^= 1
        for j in range(tiles):
            stage = turn % RING
            mbarrier.wait(empty.index(stage), ((turn // RING) & 1) ^ 1)
            mbarrier.expect(full.index(stage), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                k_desc, [i_b, i_h, j * COLUMNS, 0], full.index(stage), k_bufs.index(stage)
            )
            turn += 1


@gluon.jit
def _sum_part(b_p, PART: gl.constexpr, PARTS: gl.constexpr, ROW: gl.constexpr):
    """Row sums over one of the `PARTS` key blocks of a tile."""
    if PARTS == 1:
        return gl.sum(b_p, 1)
    else:
        left, right = b_p.reshape([64, 2, COLUMNS // 2]).permute((0, 2, 1)).split()
        return gl.convert_layout(gl.sum(left if PART == 0 else right, 1), ROW)


@gluon.jit
def _finish(
    p_space,
    mass_ptr,
    i_bh,
    first_row,
    columns,
    q_blocks,
    kv_blocks,
    OWN_LSE: gl.constexpr,
    Q_BLOCK: gl.constexpr,
    WIDTH: gl.constexpr,
    HALF: gl.constexpr,
):
    """Mass of a pair's rows out of its workspace, `float32 [columns + 1, WIDTH]`; `HALF` of every two chunks."""
    PART: gl.constexpr = WIDTH * Q_BLOCK // PAIR_ROWS
    CHUNK: gl.constexpr = 32 if OWN_LSE else 128
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [128 // PART, PART // 4], [4, 1], [1, 0])
    o_c = HALF * CHUNK + gl.arange(0, CHUNK, layout=gl.SliceLayout(1, LAYOUT))
    for _ in range(HALF * CHUNK, columns, 2 * CHUNK):
        for s in gl.static_range(PAIR_ROWS // Q_BLOCK):
            b_mass = sum_rows(p_space, o_c, columns, s * PART, PART, WIDTH, OWN_LSE, LAYOUT)
            i_m = first_row // Q_BLOCK + s
            p_mass = mass_ptr + (i_bh.to(gl.int64) * q_blocks + i_m) * kv_blocks
            seen = o_c < gl.minimum(columns, kv_blocks)
            gl.store(p_mass + o_c, b_mass, mask=seen & (i_m < q_blocks))
        o_c += 2 * CHUNK


@gluon.jit
def _consumer(
    q_bufs,
    k_bufs,
    q_full,
    q_empty,
    full,
    empty,
    lse_ptr,
    kv_lengths_ptr,
    space_ptr,
    mass_ptr,
    scale,
    num_heads,
    seq_q,
    seq_k,
    q_blocks,
    kv_blocks,
    row_tiles,
    num_items,
    RING: gl.constexpr,
    BLOCK_D: gl.constexpr,
    Q_BLOCK: gl.constexpr,
    KV_BLOCK: gl.constexpr,
    OWN_LSE: gl.constexpr,
    HAS_LENGTHS: gl.constexpr,
    GROUP: gl.constexpr,
):
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    PAIR: gl.constexpr = GROUP // 2
    PARTS: gl.constexpr = COLUMNS // KV_BLOCK
    # What a tile leaves of the pair's 128 rows: a number a row, or a number a warp
    WIDTH: gl.constexpr = PAIR_ROWS if OWN_LSE else PAIR_ROWS // 16
    room = gl.cdiv(seq_k, COLUMNS) * PARTS + 1
    p_space = space_ptr + (gl.program_id(0) * 2 + PAIR).to(gl.int64) * room * WIDTH
    o_row = (GROUP % 2) * 64 + gl.arange(0, 64, layout=ROW)
    o_space = o_row if OWN_LSE else o_row // 16
    q_smem = q_bufs.index(GROUP).reshape([64, BLOCK_D])
    qk_scale = scale * LOG2E
    turn = 0
    q_phase = 0
    for t in range(gl.program_id(0), num_items, gl.num_programs(0)):
        i_bh = t // row_tiles
        length = visible_keys(kv_lengths_ptr, i_bh // num_heads, seq_k, HAS_LENGTHS)
        tiles = gl.cdiv(length, COLUMNS)
        first_row = (t % row_tiles) * ROWS + PAIR * PAIR_ROWS
        o_m = first_row + o_row
        if OWN_LSE:
            b_m = gl.full([64], float("-inf"), gl.float32, ROW)
            b_l = gl.zeros([64], gl.float32, ROW)
        else:
            b_m = gl.load(
                lse_ptr + i_bh.to(gl.int64) * seq_q + o_m, mask=o_m < seq_q, other=float("-inf")
            )
            # No softmax, no mass: exp2(x - inf) is 0.
            b_m = gl.where(b_m == float("-inf"), float("inf"), b_m * LOG2E)
        p_left = p_space + o_space
        mbarrier.wait(q_full.index(GROUP), q_phase)
        for j in range(tiles):
            stage = turn % RING
            mbarrier.wait(full.index(stage), (turn // RING) & 1)
            k_smem = k_bufs.index(stage).reshape([COLUMNS, BLOCK_D]).permute((1, 0))
            b_s = gl.zeros([64, COLUMNS], gl.float32, S_LAYOUT)
            b_s = warpgroup_mma(q_smem, k_smem, b_s, use_acc=False, is_async=True)
            b_s = warpgroup_mma_wait(0, deps=(b_s,))
            mbarrier.arrive(empty.index(stage), count=1)
            turn += 1
            if (j + 1) * COLUMNS > length:
                o_n = j * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, S_LAYOUT))
                b_s = gl.where((o_n < length)[None, :], b_s, float("-inf"))
            if OWN_LSE:
                b_m_new = gl.maximum(b_m, gl.max(b_s, 1) * qk_scale)
                b_l *= gl.exp2(b_m - b_m_new)
                b_m = b_m_new
            b_p = gl.exp2(b_s * qk_scale - b_m[:, None])
            for s in gl.static_range(PARTS):
                b_sum = _sum_part(b_p, s, PARTS, ROW)
                if OWN_LSE:
                    b_l += b_sum
                    gl.store(p_left, b_m + log2(b_sum))
                else:
                    store_warp_sum(b_sum, p_left.to(gl.int64))
                p_left += WIDTH
        mbarrier.arrive(q_empty.index(GROUP), count=1)
        q_phase ^= 1
        if OWN_LSE:
            # Rows past the end of the sequence contribute nothing.
            b_norm = gl.where(o_m < seq_q, b_m + log2(b_l), float("inf"))
            gl.store(p_left, b_norm)
        _meet_pair(PAIR)
        _finish(
            p_space, mass_ptr, i_bh, first_row, tiles * PARTS, q_blocks, kv_blocks,
            OWN_LSE, Q_BLOCK, WIDTH, GROUP % 2,
        )  # fmt: skip
        _meet_pair(PAIR)


# Sizes differ from call to call and gain nothing from specialisation: one binary serves every shape.
@gluon.jit(
    do_not_specialize=[
        "scale",
        "num_heads",
        "seq_q",
        "seq_k",
        "q_blocks",
        "kv_blocks",
        "row_tiles",
        "num_items",
    ]
)
def block_mass_sm90(
    q_desc,
    k_desc,
    lse_ptr,
    kv_lengths_ptr,
    space_ptr,
    mass_ptr,
    scale,
    num_heads,
    seq_q,
    seq_k,
    q_blocks,
    kv_blocks,
    row_tiles,
    num_items,
    RING: gl.constexpr,
    BLOCK_D: gl.constexpr,
    Q_BLOCK: gl.constexpr,
    KV_BLOCK: gl.constexpr,
    OWN_LSE: gl.constexpr,
    HAS_LENGTHS: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Mass of blocks of `Q_BLOCK x KV_BLOCK` tokens, each 64 or 128, into `float32 [B, H, Mq, Nk]`.

    Descriptors are over `[B, H, S, D]` views: `[1, 1, 64, BLOCK_D]` boxes of queries, `[1, 1, 128, BLOCK_D]` of keys.
    `lse_ptr` `float32 [B, H, Sq]` is not read with `OWN_LSE`.  With `HAS_LENGTHS` keys from `kv_lengths_ptr` `int32 [B]`
    on are not looked at, and nothing is written for blocks that have no others.  `space_ptr` is `float32 [programs, 2,
    tiles * 128 / KV_BLOCK + 1, WIDTH]`: tiles of 128 keys, `WIDTH` 128 with `OWN_LSE` and 8 otherwise.
    """
    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [4, 1, 1, 64, BLOCK_D], q_desc.layout)
    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [RING, 1, 1, COLUMNS, BLOCK_D], k_desc.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [4, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [4, 1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [RING, 1], BARRIER)
    for i in gl.static_range(4):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(RING):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=4)
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    q_bufs, k_bufs, q_full, q_empty, full, empty, lse_ptr, kv_lengths_ptr, space_ptr, mass_ptr, scale,
                    num_heads, seq_q, seq_k, q_blocks, kv_blocks, row_tiles, num_items, RING, BLOCK_D, Q_BLOCK, KV_BLOCK,
                    OWN_LSE, HAS_LENGTHS, 0,
                ),
            ),
            (
                _consumer,
                (
                    q_bufs, k_bufs, q_full, q_empty, full, empty, lse_ptr, kv_lengths_ptr, space_ptr, mass_ptr, scale,
                    num_heads, seq_q, seq_k, q_blocks, kv_blocks, row_tiles, num_items, RING, BLOCK_D, Q_BLOCK, KV_BLOCK,
                    OWN_LSE, HAS_LENGTHS, 1,
                ),
            ),
            (
                _consumer,
                (
                    q_bufs, k_bufs, q_full, q_empty, full, empty, lse_ptr, kv_lengths_ptr, space_ptr, mass_ptr, scale,
                    num_heads, seq_q, seq_k, q_blocks, kv_blocks, row_tiles, num_items, RING, BLOCK_D, Q_BLOCK, KV_BLOCK,
                    OWN_LSE, HAS_LENGTHS, 2,
                ),
            ),
            (
                _consumer,
                (
                    q_bufs, k_bufs, q_full, q_empty, full, empty, lse_ptr, kv_lengths_ptr, space_ptr, mass_ptr, scale,
                    num_heads, seq_q, seq_k, q_blocks, kv_blocks, row_tiles, num_items, RING, BLOCK_D, Q_BLOCK, KV_BLOCK,
                    OWN_LSE, HAS_LENGTHS, 3,
                ),
            ),
            (
                _producer,
                (
                    q_desc, k_desc, q_bufs, k_bufs, q_full, q_empty, full, empty, kv_lengths_ptr, num_heads, seq_k,
                    row_tiles, num_items, RING, HAS_LENGTHS,
                ),
            ),
        ],
        [4, 4, 4, 1],
        [112, 112, 112, 24],
    )  # fmt: skip
