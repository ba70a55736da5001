"""Device code of `block_bitmap.py`: one row of kept blocks to every form that is stored of it."""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["q_blocks", "kv_blocks", "q_block", "kv_block", "seq_q", "seq_k", "scale"]
)
def pack_rows(
    keep_ptr, forced_ptr, bitmap_ptr, count_ptr, index_ptr, share_ptr,
    q_blocks, kv_blocks, q_block, kv_block, seq_q, seq_k, scale,
    WITH_LISTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`keep | forced` of one query block as a bitmap, as a share of the token area, and as an ascending list.

    `keep_ptr` `uint8 [rows, Nk]`, `forced_ptr` `uint8 [Mq, Nk]`; `share_ptr` `float32 [rows]` takes the area times
    `scale`.  Nobody else reads or writes the row, so the bitmap may be the one that `keep` came from.
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_m = (i_row % q_blocks).to(tl.int32)
    row_bytes = (kv_blocks + 7) // 8
    count = 0
    tokens = 0
    for start in range(0, kv_blocks, CHUNK):
        o_n = start + tl.arange(0, CHUNK)
        m_n = o_n < kv_blocks
        b_keep = tl.load(keep_ptr + i_row * kv_blocks + o_n, mask=m_n, other=0)
        b_keep |= tl.load(forced_ptr + i_m.to(tl.int64) * kv_blocks + o_n, mask=m_n, other=0)
        b_one = (b_keep != 0).to(tl.int32)
        b_bits = tl.reshape(b_one << (o_n % 8), [CHUNK // 8, 8])
        o_byte = start // 8 + tl.arange(0, CHUNK // 8)
        tl.store(
            bitmap_ptr + i_row * row_bytes + o_byte,
            tl.sum(b_bits, 1).to(tl.uint8),
            mask=o_byte < row_bytes,
        )
        tokens += tl.sum(b_one * tl.minimum(seq_k - o_n * kv_block, kv_block), 0)
        if WITH_LISTS:
            o_place = count + tl.cumsum(b_one, 0) - 1
            tl.store(index_ptr + i_row * kv_blocks + o_place, o_n, mask=b_one != 0)
            count += tl.sum(b_one, 0)
    if WITH_LISTS:
        tl.store(count_ptr + i_row, count)
    rows = tl.minimum(seq_q - i_m * q_block, q_block)
    tl.store(share_ptr + i_row, tokens.to(tl.float32) * rows * scale)
