"""Backward: one program keeps a tile of keys and values and walks the query rows that see it, for d key and d value.

Tiles are (kv, q), so that the weights are the left operand of every product and stay in registers. ATOMIC_Q also adds
what each tile gives to d query, which makes five products in all; without it backward_q does that, in a fixed order. A
program serves all query heads of its key head one after another (`members`), or one of them.
"""
import triton
import triton.language as tl

NUMBERS = (
    "kv_batch", "q_heads", "kv_heads", "group", "members", "q_len", "kv_len", "rows", "columns", "mask_heads", "list_rows",
    "section", "replicas",
    # hole: numbers
)  # fmt: skip


@triton.jit
def row_numbers(saved_max, saved_sum, delta, start, q_rows, inside):
    """row_max, log2(row_sum) and delta of the query rows; a row that is not inside has no weight."""
    at = start + q_rows
    top = tl.load(saved_max + at, mask=inside, other=0.0)
    log_sum = tl.load(saved_sum + at, mask=inside, other=float("inf"))
    return top[None, :], log_sum[None, :], tl.load(delta + at, mask=inside, other=0.0)[None, :]


@triton.jit(do_not_specialize=NUMBERS)
def backward_kv(
    q, k, v, grad_out, saved_max, saved_sum, delta, d_query, d_key, d_value, errors,
    offsets, indices, full_offsets, full_indices, order,
    q_b, q_h, q_row, q_column, k_b, k_h, k_row, k_column, v_b, v_h, v_row, v_column, g_b, g_h, g_row, g_column,
    scale: "fp64", kv_batch, q_heads, kv_heads, group, members, q_len, kv_len, rows, columns, mask_heads, list_rows, section, replicas,
    # hole: parameters
    # hole: accumulators
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, LISTS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEAD_COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, FOLD: tl.constexpr, SUBTRACT: tl.constexpr, HAS_SCORE: tl.constexpr, HAS_MASK: tl.constexpr,
    CHECK_READS: tl.constexpr, PRECISION: tl.constexpr, ATOMIC_Q: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr,
    SCATTER: tl.constexpr, KV_TILES: tl.constexpr,
):
    pid = tl.program_id(0)
    of_section = section * list_rows * KV_TILES
    before = pid // of_section * section
    width = tl.minimum(section, replicas - before)
    rank, replica = pid % of_section // width, before + pid % of_section % width
    flat = rank // KV_TILES
    if LISTS:
        flat = tl.load(order + flat)
    column_of_blocks = flat % columns
    units = q_heads // members
    fan = tl.where(mask_heads == 1, units, 1)
    b = flat // columns // mask_heads + replica // fan
    unit = flat // columns % mask_heads + replica % fan
    kv_head = unit * members // group
    kv_first = column_of_blocks * KV_BLOCK + rank % KV_TILES * BLOCK_N
    kv_end = tl.minimum((column_of_blocks + 1) * KV_BLOCK, kv_len)
    if kv_first >= kv_end:
        return
    kv = kv_first + tl.arange(0, BLOCK_N)
    kv_inside = kv < kv_end
    kv_idx = tl.minimum(kv, kv_len - 1)[:, None]
    scale = tl.full([], scale, real)

    kv_b = tl.minimum(b, kv_batch - 1)
    kv_rows, q_rows = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    k_at = k + kv_b.to(tl.int64) * k_b + kv_head.to(tl.int64) * k_h + kv_first.to(tl.int64) * k_row
    v_at = v + kv_b.to(tl.int64) * v_b + kv_head.to(tl.int64) * v_h + kv_first.to(tl.int64) * v_row
    k_tile = load_rows(k_at, kv_rows, k_row, k_column, kv_inside, HEAD_COLUMNS, HEAD_DIM, True).to(q.dtype.element_ty)
    v_tile = load_rows(v_at, kv_rows, v_row, v_column, kv_inside, VALUE_COLUMNS, VALUE_DIM, True).to(q.dtype.element_ty)

    TILES: tl.constexpr = (Q_BLOCK + BLOCK_M - 1) // BLOCK_M
    d_k, d_v = tl.zeros([BLOCK_N, HEAD_COLUMNS], real), tl.zeros([BLOCK_N, VALUE_COLUMNS], real)
    for member in tl.range(0, members, num_stages=1):
        h = unit * members + member
        q_at = q + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
        g_at = grad_out + b.to(tl.int64) * g_b + h.to(tl.int64) * g_h
        start = (b.to(tl.int64) * q_heads + h) * q_len
        # the lists of this head: all heads share them, or the program serves one
        at, full_at, partial, full_count, interior = row_range(
            offsets, full_offsets, full_indices, flat, rows, q_len % Q_BLOCK != 0, LISTS, Q_BLOCK % BLOCK_M == 0
        )
        interior = tl.where(kv_first + BLOCK_N <= kv_end, interior, 0)
        for it in range(0, interior * TILES):
            block, full = listed(it, at, full_at, full_count, indices, full_indices, False, LISTS, TILES)
            q0 = block * Q_BLOCK + it % TILES * BLOCK_M
            inside = q0 + q_rows < q_len
            q_tile = load_rows(
                q_at + q0.to(tl.int64) * q_row, q_rows, q_row, q_column, inside, HEAD_COLUMNS, HEAD_DIM, False
            )
            g_tile = load_rows(
                g_at + q0.to(tl.int64) * g_row, q_rows, g_row, g_column, inside, VALUE_COLUMNS, VALUE_DIM, False
            )
            top, log_sum, less = row_numbers(saved_max, saved_sum, delta, start + q0, q_rows, inside)
            score = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION, out_dtype=real)
            upward = tl.dot(v_tile, tl.trans(g_tile), input_precision=PRECISION, out_dtype=real)
            weights, grad, _ = gradients(
                score, upward, top, log_sum, less, scale, b, h, (q0 + q_rows)[None, :], kv_idx,
                kv_inside[:, None] & inside[None, :], full, errors,
                # hole: arguments
                # hole: accumulators
                False, FOLD, SUBTRACT, HAS_SCORE, HAS_MASK, CHECK_READS, SCATTER,
            )
            if NEED_V:
                d_v = tl.dot(weights.to(g_tile.dtype), g_tile, d_v, input_precision=PRECISION, out_dtype=real)
            if NEED_K:
                d_k = tl.dot(grad.to(q_tile.dtype), q_tile, d_k, input_precision=PRECISION, out_dtype=real)
            if ATOMIC_Q:
                share = tl.dot(tl.trans(grad).to(k_tile.dtype), finite(k_tile), input_precision=PRECISION, out_dtype=real)
                add_rows(d_query, start + q0, q_rows, inside, share * scale, HEAD_COLUMNS, HEAD_DIM)
        for it in range(0, (full_count - interior + partial) * TILES):
            block, full = listed(
                it, at, full_at + interior, full_count - interior, indices, full_indices, True, LISTS, TILES
            )
            q0 = block * Q_BLOCK + it % TILES * BLOCK_M
            inside = q0 + q_rows < tl.minimum((block + 1) * Q_BLOCK, q_len)
            q_tile = load_rows(
                q_at + q0.to(tl.int64) * q_row, q_rows, q_row, q_column, inside, HEAD_COLUMNS, HEAD_DIM, True
            )
            g_tile = load_rows(
                g_at + q0.to(tl.int64) * g_row, q_rows, g_row, g_column, inside, VALUE_COLUMNS, VALUE_DIM, True
            )
            top, log_sum, less = row_numbers(saved_max, saved_sum, delta, start + q0, q_rows, inside)
            score = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION, out_dtype=real)
            upward = tl.dot(v_tile, tl.trans(g_tile), input_precision=PRECISION, out_dtype=real)
            q_idx = tl.minimum(q0 + q_rows, q_len - 1)[None, :]
            weights, grad, _ = gradients(
                score, upward, top, log_sum, less, scale, b, h, q_idx, kv_idx,
                kv_inside[:, None] & inside[None, :], full, errors,
                # hole: arguments
                # hole: accumulators
                True, FOLD, SUBTRACT, HAS_SCORE, HAS_MASK, CHECK_READS, SCATTER,
            )
            if NEED_V:
                d_v = tl.dot(weights.to(g_tile.dtype), g_tile, d_v, input_precision=PRECISION, out_dtype=real)
            if NEED_K:
                d_k = tl.dot(grad.to(q_tile.dtype), q_tile, d_k, input_precision=PRECISION, out_dtype=real)
            if ATOMIC_Q:
                share = tl.dot(tl.trans(grad).to(k_tile.dtype), finite(k_tile), input_precision=PRECISION, out_dtype=real)
                add_rows(d_query, start + q0, q_rows, inside, share * scale, HEAD_COLUMNS, HEAD_DIM)

    unsound = any_of((d_k - d_k != 0) & kv_inside[:, None]) | any_of((d_v - d_v != 0) & kv_inside[:, None])
    place = (b.to(tl.int64) * units + unit) * kv_len + kv
    if unsound == 0:
        if NEED_K:
            put_rows(d_key, place, kv_inside, d_k * scale, 0, HEAD_COLUMNS, HEAD_DIM)
        if NEED_V:
            put_rows(d_value, place, kv_inside, d_v, 0, VALUE_COLUMNS, VALUE_DIM)
    else:
        # a number that is not finite may come from a masked row: once more, a few columns at a time, with a care for each
        for column in tl.range(0, max(HEAD_DIM, VALUE_DIM), CHUNK, num_stages=1):
            k_part, v_part = tl.zeros([BLOCK_N, CHUNK], real), tl.zeros([BLOCK_N, CHUNK], real)
            few = column + tl.arange(0, CHUNK)
            k_tile = load_rows(k_at, kv_rows, k_row, k_column, kv_inside, HEAD_COLUMNS, HEAD_DIM, True)
            v_tile = load_rows(v_at, kv_rows, v_row, v_column, kv_inside, VALUE_COLUMNS, VALUE_DIM, True)
            for member in tl.range(0, members, num_stages=1):
                h = unit * members + member
                q_at = q + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
                g_at = grad_out + b.to(tl.int64) * g_b + h.to(tl.int64) * g_h
                start = (b.to(tl.int64) * q_heads + h) * q_len
                at, full_at, partial, full_count, interior = row_range(
                    offsets, full_offsets, full_indices, flat, rows, q_len % Q_BLOCK != 0, LISTS, False
                )
                for it in tl.range(0, (full_count + partial) * TILES, num_stages=1):
                    block, full = listed(it, at, full_at, full_count, indices, full_indices, True, LISTS, TILES)
                    q0 = block * Q_BLOCK + it % TILES * BLOCK_M
                    inside = q0 + q_rows < tl.minimum((block + 1) * Q_BLOCK, q_len)
                    q_tile = load_rows(
                        q_at + q0.to(tl.int64) * q_row, q_rows, q_row, q_column, inside, HEAD_COLUMNS, HEAD_DIM, True
                    )
                    g_tile = load_rows(
                        g_at + q0.to(tl.int64) * g_row, q_rows, g_row, g_column, inside, VALUE_COLUMNS, VALUE_DIM, True
                    )
                    top, log_sum, less = row_numbers(saved_max, saved_sum, delta, start + q0, q_rows, inside)
                    score = tl.dot(
                        k_tile.to(q_tile.dtype), tl.trans(q_tile), input_precision=PRECISION, out_dtype=real
                    )
                    upward = tl.dot(
                        v_tile.to(q_tile.dtype), tl.trans(g_tile), input_precision=PRECISION, out_dtype=real
                    )
                    q_idx = tl.minimum(q0 + q_rows, q_len - 1)[None, :]
                    weights, grad, seen = gradients(
                        score, upward, top, log_sum, less, scale, b, h, q_idx, kv_idx,
                        kv_inside[:, None] & inside[None, :], full, errors,
                        # hole: arguments
                        # hole: accumulators
                        True, FOLD, True, HAS_SCORE, HAS_MASK, CHECK_READS, False,
                    )
                    q_few = load_few(q_at, q0 + q_rows, few, q_row, q_column, inside, HEAD_DIM)
                    g_few = load_few(g_at, q0 + q_rows, few, g_row, g_column, inside, VALUE_DIM)
                    v_part = careful_dot(weights, seen, g_few, v_part, PRECISION)
                    k_part = tl.dot(grad.to(q_few.dtype), finite(q_few), k_part, input_precision=PRECISION, out_dtype=real)
            if NEED_K:
                put_rows(d_key, place, kv_inside, k_part * scale, column, CHUNK, HEAD_DIM)
            if NEED_V:
                put_rows(d_value, place, kv_inside, v_part, column, CHUNK, VALUE_DIM)
