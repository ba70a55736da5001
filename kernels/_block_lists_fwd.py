"""Device code for making block lists: no sort, no atomics, no host synchronisation, the same bits every time.

`block_lists.py` and `block_scores.py` launch these and hold the plain torch versions that define them.
"""

import triton
import triton.language as tl


@triton.jit
def _list_column(o_place, i_m, num_rows, num_columns, VISITS: tl.constexpr, RAGGED: tl.constexpr):
    """The column at each place of a list of everything; `block_lists.list_columns` in closed form."""
    if VISITS == "descending":
        return o_place
    # Visited as number: lists are walked from their end, and a ragged block comes before all others, as number -1.
    b_rank = num_columns - 1 - o_place
    last = num_columns - 1
    if RAGGED:
        b_rank -= 1
        last -= 1
    if VISITS == "ascending":
        b_column = b_rank
    else:
        centre = tl.minimum((2 * i_m + 1) * num_columns // (2 * num_rows), last)
        half = (b_rank + 1) // 2
        b_near = centre + tl.where(b_rank % 2 == 1, half, -half)
        b_far = tl.where(centre < last - centre, b_rank, last - b_rank)
        b_column = tl.where(b_rank <= 2 * tl.minimum(centre, last - centre), b_near, b_far)
    return tl.where(b_rank < 0, num_columns - 1, b_column)


@triton.jit(do_not_specialize=["num_rows", "num_columns"])
def compact_rows(
    keep_ptr, count_ptr, index_ptr, num_rows, num_columns,
    PACKED: tl.constexpr, CHUNK: tl.constexpr, VISITS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One row of kept columns to a list, in the order of `VISITS` from its end, and its length.

    `keep_ptr` is `uint8 [B * H * num_rows, num_columns]`, or with `PACKED` a bitmap `[.., ceil(num_columns / 8)]` with
    column `j` in bit `j % 8` of byte `j // 8`.
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_m = (i_row % num_rows).to(tl.int32)
    row_bytes = (num_columns + 7) // 8 if PACKED else num_columns
    count = 0
    for start in range(0, num_columns, CHUNK):
        o_place = start + tl.arange(0, CHUNK)
        m_n = o_place < num_columns
        o_n = _list_column(o_place, i_m, num_rows, num_columns, VISITS, RAGGED)
        if PACKED:
            b_byte = tl.load(keep_ptr + i_row * row_bytes + o_n // 8, mask=m_n, other=0).to(
                tl.int32
            )
            b_keep = ((b_byte >> (o_n % 8)) & 1) != 0
        else:
            b_keep = tl.load(keep_ptr + i_row * row_bytes + o_n, mask=m_n, other=0) != 0
        b_keep &= m_n
        b_one = b_keep.to(tl.int32)
        o_list = count + tl.cumsum(b_one, 0) - 1
        tl.store(index_ptr + i_row * num_columns + o_list, o_n, mask=b_keep)
        count += tl.sum(b_one, 0)
    tl.store(count_ptr + i_row, count)


@triton.jit(do_not_specialize=["num_columns", "rows_per_k"])
def select_top_k(
    score_ptr, k_ptr, forced_ptr, count_ptr, index_ptr, num_columns, rows_per_k,
    HAS_FORCED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The `k` best columns of one row, ascending; equal scores go to the lower column; forced columns come on top.

    Walks the bits of order-preserving integer keys from the highest (a radix select over one row in registers).
    """
    i_row = tl.program_id(0).to(tl.int64)
    k = tl.load(k_ptr + i_row // rows_per_k)
    o_n = tl.arange(0, COLUMNS)
    m_n = o_n < num_columns
    b_score = tl.load(score_ptr + i_row * num_columns + o_n, mask=m_n, other=float("-inf"))
    b_score = tl.where(b_score == 0.0, 0.0, b_score)  # -0 and 0 are equal scores
    b_bits = b_score.to(tl.int32, bitcast=True)
    # Unsigned order of the keys is the order of the scores; 0 lies below every score, -inf included.
    b_key = tl.where(b_bits < 0, ~b_bits, b_bits ^ -2147483648).to(tl.uint32, bitcast=True)
    b_key = tl.where(m_n, b_key, 0)
    bar = tl.zeros([], tl.uint32)
    for i in tl.static_range(32):
        higher = bar | (1 << (31 - i))
        bar = tl.where(tl.sum((b_key >= higher).to(tl.int32), 0) >= k, higher, bar)
    b_above = b_key > bar
    b_level = (b_key == bar) & m_n
    room = k - tl.sum(b_above.to(tl.int32), 0)
    b_take = b_above | (b_level & (tl.cumsum(b_level.to(tl.int32), 0) <= room))
    if HAS_FORCED:
        b_take |= tl.load(forced_ptr + i_row * num_columns + o_n, mask=m_n, other=0) != 0
    b_one = b_take.to(tl.int32)
    tl.store(index_ptr + i_row * num_columns + tl.cumsum(b_one, 0) - 1, o_n, mask=b_take)
    tl.store(count_ptr + i_row, tl.sum(b_one, 0))


@triton.jit(
    do_not_specialize=[
        "stride_cb",
        "stride_ch",
        "stride_ib",
        "stride_ih",
        "num_heads",
        "q_blocks",
        "kv_blocks",
        "steps",
        "kv_block",
    ]
)
def count_visible(
    count_ptr, index_ptr, length_ptr, visible_ptr, stride_cb, stride_ch, stride_ib, stride_ih, num_heads, q_blocks,
    kv_blocks, steps, kv_block, ROWS: tl.constexpr,
):  # fmt: skip
    """How many entries of every ascending list begin before its batch row's key length: a binary search a row."""
    i_bh = tl.program_id(0)
    i_b = (i_bh // num_heads).to(tl.int64)
    i_h = (i_bh % num_heads).to(tl.int64)
    o_row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < q_blocks
    length = tl.load(length_ptr + i_b)
    p_list = index_ptr + i_b * stride_ib + i_h * stride_ih + o_row.to(tl.int64) * kv_blocks
    b_low = tl.zeros([ROWS], tl.int32)
    b_high = tl.load(count_ptr + i_b * stride_cb + i_h * stride_ch + o_row, mask=m_row, other=0)
    for _ in range(steps):
        b_middle = (b_low + b_high) // 2
        m_open = b_low < b_high
        b_start = tl.load(p_list + b_middle, mask=m_open, other=0) * kv_block
        m_inside = m_open & (b_start < length)
        b_low = tl.where(m_inside, b_middle + 1, b_low)
        b_high = tl.where(m_open & (b_start >= length), b_middle, b_high)
    tl.store(visible_ptr + i_bh * q_blocks + o_row, b_low, mask=m_row)


@triton.jit(do_not_specialize=["stride_cb", "stride_ch", "num_heads", "q_blocks"])
def order_rows(
    count_ptr,
    flat_ptr,
    order_ptr,
    draw_ptr,
    stride_cb,
    stride_ch,
    num_heads,
    q_blocks,
    ROWS: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """Rows of every head by descending count, stable; and the counts laid out flat, `int32 [B * H * Mq]`.

    A row's place is the number of rows that go before it: quadratic in the rows of a head, and still microseconds.
    `draw_ptr` `int32 [1]` becomes 0: a persistent grid counts with it how many rows it has handed out.
    """
    i_bh = tl.program_id(0)
    if (i_bh == 0) & (tl.program_id(1) == 0):
        tl.store(draw_ptr, 0)
    p_count = (
        count_ptr
        + (i_bh // num_heads).to(tl.int64) * stride_cb
        + (i_bh % num_heads).to(tl.int64) * stride_ch
    )
    o_row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    b_count = tl.load(p_count + o_row, mask=o_row < q_blocks, other=-1)
    b_place = tl.zeros([ROWS], tl.int32)
    for start in range(0, q_blocks, OTHERS):
        o_other = start + tl.arange(0, OTHERS)
        b_other = tl.load(p_count + o_other, mask=o_other < q_blocks, other=-1)
        b_before = (b_other[None, :] > b_count[:, None]) | (
            (b_other[None, :] == b_count[:, None]) & (o_other[None, :] < o_row[:, None])
        )
        b_place += tl.sum(b_before.to(tl.int32), 1)
    first = i_bh * q_blocks
    m_row = o_row < q_blocks
    tl.store(flat_ptr + first + o_row, b_count, mask=m_row)
    tl.store(order_ptr + first + b_place, first + o_row, mask=m_row)


@triton.jit(do_not_specialize=["num_heads", "seq", "num_blocks"])
def mean_blocks(
    x_ptr, mean_ptr, stride_xb, stride_xs, stride_xh, num_heads, seq, num_blocks,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Mean token of one block, float32; the ragged last block is divided by its true length."""
    i_block = tl.program_id(0)
    i_bh = tl.program_id(1)
    p_x = (
        x_ptr
        + (i_bh // num_heads).to(tl.int64) * stride_xb
        + (i_bh % num_heads).to(tl.int64) * stride_xh
    )
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.static_range(0, BLOCK, CHUNK):
        o_s = i_block * BLOCK + start + tl.arange(0, CHUNK)
        m_s = (o_s < seq) & (start + tl.arange(0, CHUNK) < BLOCK)
        b_x = tl.load(
            p_x + o_s[:, None].to(tl.int64) * stride_xs + o_d[None, :],
            mask=m_s[:, None] & m_d[None, :],
            other=0.0,
        )
        b_sum += tl.sum(b_x.to(tl.float32), 0)
    tokens = tl.minimum(seq - i_block * BLOCK, BLOCK)
    tl.store(
        mean_ptr + (i_bh.to(tl.int64) * num_blocks + i_block) * HEAD_DIM + o_d,
        b_sum / tokens,
        mask=m_d,
    )
