"""Device code that joins the lists of two neighbouring query blocks; `block_pairs.py` launches and describes it."""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=[
        "stride_cb",
        "stride_ch",
        "stride_ib",
        "stride_ih",
        "heads",
        "q_blocks",
        "pairs",
        "kv_blocks",
        "seq_k",
    ]
)
def pair_rows(
    count_ptr, index_ptr, length_ptr, mark_ptr, total_ptr, row_ptr, walk_ptr, stride_cb, stride_ch, stride_ib,
    stride_ih, heads, q_blocks, pairs, kv_blocks, seq_k,
    HAS_LENGTHS: tl.constexpr, BLOCK_N: tl.constexpr, FIELD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One pair: marks in a workspace `uint8 [.., pairs, Nk]` who lists a block, then deals the blocks out."""
    i_pair = tl.program_id(0).to(tl.int64)
    i_p = (i_pair % pairs).to(tl.int32)
    i_h = i_pair // pairs % heads
    i_b = i_pair // pairs // heads
    length = seq_k
    if HAS_LENGTHS:
        length = tl.minimum(tl.load(length_ptr + i_b), seq_k)
    blocks = (length + BLOCK_N - 1) // BLOCK_N  # those of which a key is visible
    edge = tl.where(length % BLOCK_N == 0, -1, blocks - 1)  # the one of which some are not
    p_mark = mark_ptr + i_pair * kv_blocks
    for start in range(0, kv_blocks, CHUNK):
        o_n = start + tl.arange(0, CHUNK)
        tl.store(p_mark + o_n, tl.zeros([CHUNK], tl.uint8), mask=o_n < kv_blocks)
    # Marks are shared by the program's threads: none may read one, or add to it, before it is written.
    tl.debug_barrier()
    top = 0
    shared = 0
    count_0 = 0
    count_1 = 0
    for row in tl.static_range(2):
        i_m = 2 * i_p + row
        real = i_m < q_blocks  # the last pair may lack its second row
        i_m = tl.minimum(i_m, q_blocks - 1)
        listed = tl.load(count_ptr + i_b * stride_cb + i_h * stride_ch + i_m)
        listed = tl.where(real, listed, 0)
        p_list = index_ptr + i_b * stride_ib + i_h * stride_ih + i_m.to(tl.int64) * kv_blocks
        count = 0
        for start in range(0, listed, CHUNK):
            o_list = start + tl.arange(0, CHUNK)
            b_n = tl.load(p_list + o_list, mask=o_list < listed, other=blocks)
            m_n = b_n < blocks
            b_mark = tl.load(p_mark + b_n, mask=m_n, other=0)
            tl.store(p_mark + b_n, b_mark + (1 + row), mask=m_n)
            shared += tl.sum((m_n & (b_mark != 0)).to(tl.int32), 0)
            count += tl.sum(m_n.to(tl.int32), 0)
            top = tl.maximum(top, tl.max(tl.where(m_n, b_n, 0), 0))
        tl.debug_barrier()
        if row == 0:
            count_0 = count
        else:
            count_1 = count
    # A row without blocks goes along with the other's first one, and sees none of it.
    adopted = (count_0 == 0) | (count_1 == 0)
    shared += adopted.to(tl.int32)
    b_edge = tl.load(p_mark + tl.maximum(edge, 0))
    b_edge = tl.where(edge >= 0, b_edge, 0).to(tl.int32)
    seen_0 = tl.where(b_edge % 2 == 1, length % BLOCK_N, BLOCK_N)
    seen_1 = tl.where(b_edge >= 2, length % BLOCK_N, BLOCK_N)
    # The edge is visited first; where it belongs to one row alone, it comes before the blocks of both.
    lead = tl.where((b_edge == 3) | adopted, 0, b_edge)
    lead_0 = (lead == 1).to(tl.int32)
    lead_1 = (lead == 2).to(tl.int32)
    own_0 = tl.maximum(count_0, 1)
    own_1 = tl.maximum(count_1, 1)
    private_0 = own_0 - shared - lead_0
    private_1 = own_1 - shared - lead_1
    turns = tl.minimum(private_0, private_1)
    begin = shared + lead_0 + lead_1
    total = begin + private_0 + private_1
    # An idle row must take part in clearing the values past a key length.
    idle_0 = count_0 == 0
    idle_1 = count_1 == 0
    both_seen = tl.minimum(seen_0, seen_1)
    seen_0 = tl.where(idle_0, both_seen, seen_0)
    seen_1 = tl.where(idle_1, both_seen, seen_1)
    p_row = row_ptr + i_pair * 2
    tl.store(p_row, _numbers(own_0, shared + lead_0, turns, seen_0, lead_1, lead_0, idle_0, FIELD))
    p_row += 1
    tl.store(p_row, _numbers(own_1, shared + lead_1, turns, seen_1, lead_0, lead_1, idle_1, FIELD))
    tl.store(total_ptr + i_pair, total)

    p_walk = walk_ptr + i_pair * kv_blocks
    done_both = 0
    done_0 = 0
    done_1 = 0
    for start in range(0, kv_blocks, CHUNK):
        # From the last block to the first
        o_n = kv_blocks - 1 - start - tl.arange(0, CHUNK)
        b_mark = tl.load(p_mark + o_n, mask=o_n >= 0, other=0).to(tl.int32)
        b_mark = tl.where(adopted & (o_n == top), 3, b_mark)
        m_lead = (lead != 0) & (o_n == edge)
        tl.store(p_walk + o_n * 0, o_n, mask=m_lead)
        b_mark = tl.where(m_lead, 0, b_mark)
        b_both = (b_mark == 3).to(tl.int32)
        b_0 = (b_mark == 1).to(tl.int32)
        b_1 = (b_mark == 2).to(tl.int32)
        tl.store(
            p_walk + lead_0 + lead_1 + done_both + tl.cumsum(b_both, 0) - 1, o_n, mask=b_both != 0
        )
        # Block k of a row alone: one of the other row stands before each of the `turns` of the second row, after each
        # of the first.
        k_0 = done_0 + tl.cumsum(b_0, 0) - 1
        k_1 = done_1 + tl.cumsum(b_1, 0) - 1
        tl.store(p_walk + begin + k_0 + tl.minimum(k_0, turns), o_n, mask=b_0 != 0)
        tl.store(p_walk + begin + k_1 + tl.minimum(k_1 + 1, turns), o_n, mask=b_1 != 0)
        done_both += tl.sum(b_both, 0)
        done_0 += tl.sum(b_0, 0)
        done_1 += tl.sum(b_1, 0)


@triton.jit
def _numbers(count, before, turns, visible, start, lead, idle, FIELD: tl.constexpr):
    """A row's numbers in one word, from the lowest bit."""
    word = count.to(tl.int64) | (before.to(tl.int64) << FIELD) | (turns.to(tl.int64) << 2 * FIELD)
    word |= visible.to(tl.int64) << 3 * FIELD
    word |= (start.to(tl.int64) << (3 * FIELD + 7)) | (lead.to(tl.int64) << (3 * FIELD + 8))
    return word | (idle.to(tl.int64) << (3 * FIELD + 9))
