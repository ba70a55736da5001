"""Device helpers that the Hopper kernels for pairs of rows share."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from sparsediff.kernels._hopper import draw, place

FIELD = gl.constexpr(17)  # `block_pairs.RowNumbers`, which says what a row's numbers are


@gluon.jit
def field(word, SHIFT: gl.constexpr, BITS: gl.constexpr):
    return ((word >> SHIFT) & ((1 << BITS) - 1)).to(gl.int32)


@gluon.jit
def let_pass(turn, full, empty, RING: gl.constexpr):
    """Free a stage that is not this consumer's, once it is filled: earlier, two laps could not be told apart."""
    mbarrier.wait(full.index(turn % RING), (turn // RING) & 1)
    mbarrier.arrive(empty.index(turn % RING), count=1)


@gluon.jit
def draw_pair(t, order_ptr, totals_ptr, rows_ptr, stride_b, stride_h, num_heads, pairs, num_draws):
    """Pair number `t` of the grid's order: its item, its place among the walks, the numbers of its rows."""
    item = draw(t, order_ptr, totals_ptr, num_draws)
    i_b, i_h, i_p = place(gl.maximum(item, 0).to(gl.int32), num_heads, pairs)
    walk = i_b.to(gl.int64) * stride_b + i_h.to(gl.int64) * stride_h + i_p
    return item, walk, gl.load(rows_ptr + walk * 2), gl.load(rows_ptr + walk * 2 + 1)


@gluon.jit
def hand_over_pair(item, word_0, word_1, work, work_full, work_empty, rows):
    """Producer: pass its draw number `rows` and the numbers of both rows to the consumers."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    slot = rows & 1
    mbarrier.wait(work_empty.index(slot), ((rows >> 1) & 1) ^ 1)
    work.index(slot * 3).store(gl.full([1], item, gl.int64, LAYOUT))
    work.index(slot * 3 + 1).store(gl.full([1], word_0, gl.int64, LAYOUT))
    work.index(slot * 3 + 2).store(gl.full([1], word_1, gl.int64, LAYOUT))
    mbarrier.arrive(work_full.index(slot), count=1)


@gluon.jit
def take_over_pair(work, work_full, work_empty, rows, GROUP: gl.constexpr):
    """Consumer: the producer's draw number `rows` and this row's numbers."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    slot = rows & 1
    mbarrier.wait(work_full.index(slot), (rows >> 1) & 1)
    item = gl.max(work.index(slot * 3).load(LAYOUT), 0)
    word = gl.max(work.index(slot * 3 + 1 + GROUP).load(LAYOUT), 0)
    mbarrier.arrive(work_empty.index(slot), count=1)
    return item, word
