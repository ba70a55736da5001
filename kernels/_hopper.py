"""Device helpers that the Hopper kernels share."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

# Where rows look for their maxima (`lazy_maximum`), one is left where it is until a score passes it by this much (base 2):
# probabilities then reach 256 instead of 1, which float32 sums and 16-bit products take as well.
LAZY_GAP = gl.constexpr(8.0)
LOG2E = gl.constexpr(1.4426950408889634)  # exp(x) == exp2(x * LOG2E)
LN2 = gl.constexpr(0.6931471805599453)
MASS_WIDTH = gl.constexpr(128)  # numbers that a tile leaves for its mass: one a row


@gluon.jit
def assembly(code: gl.constexpr):
    """Run PTX that takes and returns nothing; it must set `$0`."""
    gl.inline_asm_elementwise(code, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


def _rescaling(count: int) -> tuple[gl.constexpr, gl.constexpr]:
    """PTX that multiplies `count` numbers of a thread by as many others unless those are 1 in the whole warp.

    A thread of a wgmma accumulator has two rows, the second from its third number on.  Numbers are multiplied where
    they are (operand `i` of the inputs is output `i`).
    """
    lines = [
        "{ .reg .pred p, q;",
        f"setp.neu.f32 p, ${2 * count}, 0f3F800000; setp.neu.f32 q, ${2 * count + 2}, 0f3F800000;",
        "or.pred p, p, q; vote.sync.any.pred p, p, 0xffffffff; @!p bra.uni keep;",
        *(f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count)),
        "keep: }",
    ]
    operands = ["=f"] * count + [str(i) for i in range(count)] + ["f"] * count
    return gl.constexpr("\n".join(lines)), gl.constexpr(",".join(operands))


RESCALE_64, OPERANDS_64 = _rescaling(64)
RESCALE_32, OPERANDS_32 = _rescaling(32)


@gluon.jit
def rescale(b_o, b_alpha):
    """`b_o [64, D] * b_alpha [64]` by rows, by an instruction that stays where it is.

    Warps whose rows all have 1 jump over it: with `lazy_maximum` nearly all of them, which saves a seventh of a tile's
    instructions.
    """
    b_alpha = gl.convert_layout(b_alpha, gl.SliceLayout(1, b_o.type.layout))[:, None]
    if b_o.shape[1] == 128:
        return gl.inline_asm_elementwise(
            RESCALE_64, OPERANDS_64, [b_o, b_alpha], dtype=gl.float32, is_pure=False, pack=64
        )
    else:
        return gl.inline_asm_elementwise(
            RESCALE_32, OPERANDS_32, [b_o, b_alpha], dtype=gl.float32, is_pure=False, pack=32
        )


@gluon.jit
def _by_thread(b_x):
    """`[64, N]` as `[64, 4, N / 4]`: what each thread of a quad has of a row."""
    N: gl.constexpr = b_x.shape[1]
    return b_x.reshape([64, N // 8, 4, 2]).permute((0, 2, 1, 3)).reshape([64, 4, N // 4])


@gluon.jit
def thread_sums(b_p):
    """Sums `[64, 4]` over what each thread of a quad has of a row, in the order of `gl.sum`; `row_sums` does the rest."""
    return gl.sum(_by_thread(b_p), 2)


@gluon.jit
def row_sums(b_parts, LAYOUT: gl.constexpr):
    """Sums `[64]` from those of threads: the shuffles that `thread_sums` leaves."""
    return gl.convert_layout(gl.sum(b_parts, 1), LAYOUT)


@gluon.jit
def thread_maxima(b_p):
    """Maxima `[64, 4]` of what `thread_sums` sums.  Numbers from 0 on are ordered as their bits are, and integers take half
    of the instructions: there is one for three of them."""
    return gl.max(_by_thread(b_p.to(gl.int32, bitcast=True)), 2).to(gl.float32, bitcast=True)


@gluon.jit
def lazy_maximum(b_m, b_top):
    """What rows of scores are exponentiated under, after a tile with the maxima `b_top`; any number serves that is near."""
    return gl.where(b_top > b_m + LAZY_GAP, b_top, b_m)


def _voting(group: int, ending: str) -> gl.constexpr:
    """PTX that leaves 1 in the register `beyond{group}` if any number of those that vote is beyond 2**12, else 0."""
    return gl.constexpr(
        f"""{{ .reg .pred p;
        setp.gt.f32 p, $2, 0f45800000; setp.gt.or.f32 p, $3, 0f45800000, p;
        {ending} selp.b32 beyond{group}, 1, 0, p;
        mov.b32 $0, 0; mov.b32 $1, 0; }}"""
    )


def _reading(group: int) -> gl.constexpr:
    return gl.constexpr(f"mov.b32 $0, beyond{group};")


_IN_WARP = "vote.sync.any.pred p, p, 0xffffffff;"
# Nothing is beyond infinity.
_HOLD = "setp.gt.or.f32 p, $4, 0f7F800000, p; setp.gt.or.f32 p, $5, 0f7F800000, p;"
WARP_VOTE_0, WARP_VOTE_1 = (_voting(group, _IN_WARP) for group in range(2))
HOLDING_VOTE_0, HOLDING_VOTE_1 = (_voting(group, _HOLD + _IN_WARP) for group in range(2))
GROUP_VOTE_0, GROUP_VOTE_1 = (
    _voting(group, f"bar.red.or.pred p, {12 + group}, 128, p;") for group in range(2)
)
BEYOND_0, BEYOND_1 = _reading(0), _reading(1)


@gluon.jit
def declare_beyond(GROUP: gl.constexpr):
    """Declare the register of `are_beyond`, before anything branches."""
    assembly(
        ".reg .b32 beyond0; mov.u32 $0, 0;" if GROUP == 0 else ".reg .b32 beyond1; mov.u32 $0, 0;"
    )


@gluon.jit
def are_beyond(b_parts, GROUP: gl.constexpr, BY_WARP: gl.constexpr, b_held=None):
    """Whether any part of a sum is beyond 2**12 (NaN is not): in this warp, or else in the whole warpgroup.

    That leaves single probabilities far below what fp16 can hold, and an exponential that has overflown is beyond.
    Only a register that `declare_beyond` declares can hold a number that differs from warp to warp: Triton makes one
    number of a tensor in shared memory, where all warps of a warpgroup meet.

    By warps, `b_held` of the same shape is computed before the answer: ptxas would sink it behind the next wait.
    """
    if b_held is not None:
        gl.inline_asm_elementwise(
            HOLDING_VOTE_0 if GROUP == 0 else HOLDING_VOTE_1,
            "=r,=r,f,f,f,f",
            [b_parts, b_held],
            dtype=gl.int32,
            is_pure=False,
            pack=2,
        )
    else:
        IN_WARP: gl.constexpr = WARP_VOTE_0 if GROUP == 0 else WARP_VOTE_1
        IN_GROUP: gl.constexpr = GROUP_VOTE_0 if GROUP == 0 else GROUP_VOTE_1
        gl.inline_asm_elementwise(
            IN_WARP if BY_WARP else IN_GROUP,
            "=r,=r,f,f",
            [b_parts],
            dtype=gl.int32,
            is_pure=False,
            pack=2,
        )
    return gl.inline_asm_elementwise(
        BEYOND_0 if GROUP == 0 else BEYOND_1, "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def times_rows(b_x, b_alpha):
    """`b_x [64, N] * b_alpha [64]` by rows, in the layout of `b_x`."""
    return b_x * gl.convert_layout(b_alpha, gl.SliceLayout(1, b_x.type.layout))[:, None]


@gluon.jit
def pack_pairs(b_p, DTYPE: gl.constexpr):
    """Probabilities in 16 bits, by instructions that stay where they are: ptxas would hold them in 32 bits for longer."""
    if DTYPE == gl.bfloat16:  # noqa: SIM300
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;",
            "=r,f,f",
            [b_p],
            dtype=gl.bfloat16,
            is_pure=False,
            pack=2,
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [b_p], dtype=gl.float16, is_pure=False, pack=2
        )


@gluon.jit
def log2(x):
    """Base-2 logarithm in one instruction; a denormal counts as 0, whose logarithm is -inf."""
    return gl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def sum_rows(
    p_space,
    o_c,
    columns,
    FIRST: gl.constexpr,
    PART: gl.constexpr,
    WIDTH: gl.constexpr,
    LOGARITHMS: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Sums over `PART` of the `WIDTH` entries that each of the columns `o_c` left in a workspace, from `FIRST` on.

    With `LOGARITHMS` an entry is the base-2 logarithm of a row's sum, and what the rows are divided by follows the
    last column in the same form.
    """
    o_w = FIRST + gl.arange(0, PART, layout=gl.SliceLayout(0, LAYOUT))
    b_x = gl.load(
        p_space + o_c[:, None] * WIDTH + o_w[None, :], mask=(o_c < columns)[:, None], other=0.0
    )
    if LOGARITHMS:
        b_x = gl.exp2(b_x - gl.load(p_space + columns * WIDTH + o_w)[None, :])
    return gl.sum(b_x, 1)


@gluon.jit
def take_turn(GROUP: gl.constexpr):
    """Wait until the other warpgroup has issued its products.  Barriers 0-8 are Triton's own."""
    assembly(
        "bar.sync 9, 256; mov.u32 $0, 0;" if GROUP == 0 else "bar.sync 10, 256; mov.u32 $0, 0;"
    )


@gluon.jit
def pass_turn(GROUP: gl.constexpr):
    assembly(
        "bar.arrive 10, 256; mov.u32 $0, 0;" if GROUP == 0 else "bar.arrive 9, 256; mov.u32 $0, 0;"
    )


@gluon.jit
def store_vote(b_gap, b_address):
    """Store 1 at the address if any of the warp's 16 rows has a positive gap: one vote, one predicated store."""
    gl.inline_asm_elementwise(
        """{ .reg .pred p, q; .reg .b32 t;
        setp.gt.f32 p, $2, 0f00000000; setp.gt.f32 q, $3, 0f00000000; or.pred p, p, q;
        vote.sync.any.pred p, p, 0xffffffff;
        mov.u32 t, %laneid; setp.eq.and.u32 q, t, 0, p;
        mov.u32 t, 1; @q st.global.u8 [$4], t;
        mov.b32 $0, 0; mov.b32 $1, 0; }""",
        "=r,=r,f,f,l,l",
        [b_gap, b_address],
        dtype=gl.int32,
        is_pure=False,
        pack=2,
    )


@gluon.jit
def gather_votes(b_votes, b_top, b_bar, tile):
    """Set bit `tile % 32` of a thread's votes if one of its two rows reaches its bar (one of 0 is reached by all)."""
    b_bit = gl.full([64], 1 << (tile & 31), gl.int32, b_votes.type.layout)
    return gl.inline_asm_elementwise(
        """{ .reg .pred p, q;
        setp.ge.f32 p, $4, $6; setp.ge.or.f32 q, $5, $7, p;
        mov.b32 $0, $2; @q or.b32 $0, $0, $8; mov.b32 $1, 0; }""",
        "=&r,=r,r,r,f,f,f,f,r,r",
        [b_votes, b_top, b_bar, b_bit],
        dtype=gl.int32,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def load_entries(p_list, last, LAYOUT: gl.constexpr):
    """The blocks of 32 tiles, a lane a tile: lane 0 gets entry `last` of the list, the next ones those before it."""
    return gl.inline_asm_elementwise(
        """{ .reg .b32 l; .reg .b64 a;
        mov.u32 l, %laneid; sub.s32 l, $4, l; max.s32 l, l, 0; mul.wide.s32 a, l, 4; add.s64 a, a, $2;
        ld.global.b32 $0, [a]; mov.b32 $1, 0; }""",
        "=r,=r,l,l,r,r",
        [
            gl.full([64], p_list.to(gl.int64), gl.int64, LAYOUT),
            gl.full([64], last, gl.int32, LAYOUT),
        ],
        dtype=gl.int32,
        is_pure=False,
        pack=2,
    )


@gluon.jit
def store_votes(b_votes, b_entries, vote_row):
    """Store what 32 tiles have gathered, a lane a tile: 1 where any of the warp's rows has set the tile's bit."""
    gl.inline_asm_elementwise(
        """{ .reg .pred p; .reg .b32 v, l; .reg .b64 a;
        redux.sync.or.b32 v, $2, 0xffffffff; mov.u32 l, %laneid;
        shr.u32 v, v, l; and.b32 v, v, 1; setp.ne.u32 p, v, 0;
        cvt.s64.s32 a, $4; add.s64 a, a, $6; @p st.global.u8 [a], v;
        mov.b32 $0, 0; mov.b32 $1, 0; }""",
        "=r,=r,r,r,r,r,l,l",
        [
            b_votes,
            b_entries,
            gl.full([64], vote_row.to(gl.int64), gl.int64, b_votes.type.layout),
        ],
        dtype=gl.int32,
        is_pure=False,
        pack=2,
    )


@gluon.jit
def draw(t, order_ptr, kv_num_blocks_ptr, num_rows):
    """Query block number `t` of the walk, as row of the lists and its count in one number; -1 past the end."""
    item = gl.to_tensor(-1).to(gl.int64)
    if t < num_rows:
        i_row = gl.load(order_ptr + t)
        item = i_row.to(gl.int64) | (gl.load(kv_num_blocks_ptr + i_row).to(gl.int64) << 32)
    return item


@gluon.jit
def hand_over(item, work, work_full, work_empty, slot, phase):
    """Producer: pass a draw to both consumers."""
    mbarrier.wait(work_empty.index(slot), phase ^ 1)
    work.index(slot).store(gl.full([1], item, gl.int64, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(work_full.index(slot), count=1)


@gluon.jit
def take_over(work, work_full, work_empty, slot, phase):
    """Consumer: the producer's draw."""
    mbarrier.wait(work_full.index(slot), phase)
    item = gl.max(work.index(slot).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    mbarrier.arrive(work_empty.index(slot), count=1)
    return item


@gluon.jit
def store_warp_sum(b_x, b_address):
    """Store the sum over a warp's 16 rows: a thread brings two of them, and its quad brings the same."""
    gl.inline_asm_elementwise(
        """{ .reg .pred q; .reg .b32 t; .reg .f32 a, b;
        add.f32 a, $2, $3;
        shfl.sync.bfly.b32 b, a, 4, 31, 0xffffffff; add.f32 a, a, b;
        shfl.sync.bfly.b32 b, a, 8, 31, 0xffffffff; add.f32 a, a, b;
        shfl.sync.bfly.b32 b, a, 16, 31, 0xffffffff; add.f32 a, a, b;
        mov.u32 t, %laneid; setp.eq.u32 q, t, 0; @q st.global.f32 [$4], a;
        mov.b32 $0, 0; mov.b32 $1, 0; }""",
        "=r,=r,f,f,l,l",
        [b_x, b_address],
        dtype=gl.int32,
        is_pure=False,
        pack=2,
    )


@gluon.jit
def store_pair(b_x, b_address):
    """Store a thread's two rows side by side at the first one's address; its quad brings the same."""
    gl.inline_asm_elementwise(
        "st.global.v2.f32 [$4], {$2, $3}; mov.b32 $0, 0; mov.b32 $1, 0;",
        "=r,=r,f,f,l,l",
        [b_x, b_address],
        dtype=gl.int32,
        is_pure=False,
        pack=2,
    )


@gluon.jit
def mass_place(p_space, GROUP: gl.constexpr, ROW: gl.constexpr):
    """Where in a workspace the first tile leaves its numbers: addresses by rows, a thread's two side by side."""
    o_m = gl.arange(0, 64, layout=ROW)
    return (p_space + (GROUP * 64 + o_m // 16 * 16 + o_m % 8 * 2 + o_m // 8 % 2)).to(gl.int64)


@gluon.jit
def leave_mass(b_left, b_sum, b_m):
    """What a tile leaves in the workspace at the addresses `b_left`: logarithms of row sums `b_sum` under maxima `b_m`."""
    store_pair(b_m + log2(b_sum), b_left)


@gluon.jit
def leave_norm(b_left, b_lse, o_m, seq_q):
    """What rows are divided by, after the last tile: infinite for those past the end or without softmax."""
    store_pair(
        gl.where((o_m < seq_q) & (b_lse != float("-inf")), b_lse, float("inf")),
        b_left,
    )


@gluon.jit
def store_mass(p_space, p_mass, p_list, count, GROUP: gl.constexpr):
    """Add what this warpgroup's rows say of the mass of a finished row of blocks, which is 0 before.

    Two numbers have one sum, whoever comes first.  Rows of blocks use two workspaces in turn, so that no warp writes what
    another one still reads.
    """
    CHUNK: gl.constexpr = 64
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    assembly(
        "bar.sync 11, 128; mov.u32 $0, 0;" if GROUP == 0 else "bar.sync 14, 128; mov.u32 $0, 0;"
    )
    o_j = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, LAYOUT))
    for _ in range(0, count, CHUNK):
        o_n = gl.load(p_list + (count - 1 - o_j), mask=o_j < count, other=0)
        b_mass = sum_rows(p_space, o_j, count, GROUP * 64, 64, MASS_WIDTH, True, LAYOUT)
        gl.atomic_add(p_mass + o_n, b_mass, mask=o_j < count, sem="relaxed")
        o_j += CHUNK


@gluon.jit
def clear_past(v_buffer, valid, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr):
    """Zero the rows of V from `valid` on: what padding holds may be infinite, and 0 * inf is NaN.

    Both warpgroups do it, with the same bits.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    v_smem = v_buffer.reshape([BLOCK_N, BLOCK_D])
    for start in gl.static_range(0, BLOCK_N, 32):
        part = v_smem.slice(start, 32)
        o_n = start + gl.arange(0, 32, layout=gl.SliceLayout(1, LAYOUT))
        part.store(gl.where((o_n < valid)[:, None], part.load(LAYOUT), 0.0))
    fence_async_shared()


@gluon.jit
def visible_keys(kv_lengths_ptr, i_b, seq_k, HAS_LENGTHS: gl.constexpr):
    """How many keys of a sample count."""
    length = seq_k
    if HAS_LENGTHS:
        length = gl.minimum(gl.load(kv_lengths_ptr + i_b), seq_k)
    return length


@gluon.jit
def place(i_row, num_heads, q_blocks):
    """Batch, head and place of a row of the lists."""
    i_bh = i_row // q_blocks
    return i_bh // num_heads, i_bh % num_heads, i_row % q_blocks


@gluon.jit
def row_list(kv_indices_ptr, i_b, i_h, i_m, stride_ib, stride_ih, kv_blocks):
    """The list of query block `i_m`."""
    return (
        kv_indices_ptr
        + i_b.to(gl.int64) * stride_ib
        + i_h.to(gl.int64) * stride_ih
        + i_m.to(gl.int64) * kv_blocks
    )


@gluon.jit
def _load_values(v_desc, v_buffer, barrier, i_b, i_h, start, TRANSPOSED: gl.constexpr):
    if TRANSPOSED:
        tma.async_copy_global_to_shared(v_desc, [i_b, i_h, 0, start], barrier, v_buffer)
    else:
        tma.async_copy_global_to_shared(v_desc, [i_b, i_h, start, 0], barrier, v_buffer)


@gluon.jit
def produce(
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
    kv_num_blocks_ptr,
    kv_indices_ptr,
    order_ptr,
    draw_ptr,
    stride_ib,
    stride_ih,
    num_heads,
    q_blocks,
    kv_blocks,
    num_rows,
    RING: gl.constexpr,
    BLOCK_N: gl.constexpr,
    V_TRANSPOSED: gl.constexpr,
):
    """Follow the lists with TMA: stage j of the ring gets K[j] and V[j-1]; with `V_TRANSPOSED` V is `[B, H, D, S]`."""
    K_BYTES: gl.constexpr = k_desc.block_type.nbytes
    V_BYTES: gl.constexpr = v_desc.block_type.nbytes
    turn = 0
    rows = 0
    item = draw(gl.program_id(0), order_ptr, kv_num_blocks_ptr, num_rows)
    while item >= 0:
        hand_over(item, work, work_full, work_empty, rows & 1, (rows >> 1) & 1)
        count = (item >> 32).to(gl.int32)
        i_b, i_h, i_m = place(item.to(gl.int32), num_heads, q_blocks)
        p_list = row_list(kv_indices_ptr, i_b, i_h, i_m, stride_ib, stride_ih, kv_blocks)
        # An empty row runs one masked tile; what its list names is arbitrary.
        current = gl.where(count > 0, gl.load(p_list + gl.maximum(count - 1, 0)), 0)
        following = gl.load(p_list + gl.maximum(count - 2, 0))
        stage = turn % RING
        mbarrier.wait(empty.index(stage), ((turn // RING) & 1) ^ 1)
        mbarrier.expect(full.index(stage), K_BYTES)
        tma.async_copy_global_to_shared(
            k_desc, [i_b, i_h, current * BLOCK_N, 0], full.index(stage), k_bufs.index(stage)
        )
        for w in gl.static_range(2):
            mbarrier.wait(q_empty.index(w), (rows & 1) ^ 1)
            mbarrier.expect(q_full.index(w), q_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                q_desc, [i_b, i_h, i_m * 128 + w * 64, 0], q_full.index(w), q_bufs.index(w)
            )
        turn += 1
        # The consumers have a tile to work on while the next draw is on its way.
        t = gl.num_programs(0) + gl.atomic_add(draw_ptr, 1)
        item = draw(t, order_ptr, kv_num_blocks_ptr, num_rows)
        for j in range(1, count):
            after = gl.load(p_list + gl.maximum(count - 2 - j, 0))
            stage = turn % RING
            mbarrier.wait(empty.index(stage), ((turn // RING) & 1) ^ 1)
            mbarrier.expect(full.index(stage), K_BYTES + V_BYTES)
            tma.async_copy_global_to_shared(
                k_desc, [i_b, i_h, following * BLOCK_N, 0], full.index(stage), k_bufs.index(stage)
            )
            _load_values(
                v_desc,
                v_bufs.index(stage),
                full.index(stage),
                i_b,
                i_h,
                current * BLOCK_N,
                V_TRANSPOSED,
            )
            current = following
            following = after
            turn += 1
        stage = turn % RING
        mbarrier.wait(empty.index(stage), ((turn // RING) & 1) ^ 1)
        mbarrier.expect(full.index(stage), V_BYTES)
        _load_values(
            v_desc,
            v_bufs.index(stage),
            full.index(stage),
            i_b,
            i_h,
            current * BLOCK_N,
            V_TRANSPOSED,
        )
        turn += 1
        rows += 1
    hand_over(item, work, work_full, work_empty, rows & 1, (rows >> 1) & 1)
