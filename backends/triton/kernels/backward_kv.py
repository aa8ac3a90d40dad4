"""Backward: one program keeps a tile of keys and values and walks the query rows that see it, for d key and d value.

Tiles are (kv, q), so that the weights are the left operand of every product and stay in registers. ATOMIC_Q also adds
what each tile gives to d query, which makes five products in all; without it backward_q does that, in a fixed order. A
program serves one query head (ALONE), or all of its key head one after another (`members`).

A program whose result is not finite says so in `unsound`. A second launch, CAREFUL, does those again: what is not finite
may come from a masked row. It is a launch of its own because the first has no register to spare.
"""
import triton
import triton.language as tl

NUMBERS = (
    "kv_batch", "q_heads", "kv_heads", "group", "members", "q_len", "kv_len", "rows", "columns", "mask_heads", "list_rows",
    "section", "replicas", "kv_tiles",
    # hole: numbers
)  # fmt: skip


@triton.jit
def row_numbers(saved_max, saved_sum, delta, start, q_rows, inside, CHECKED: tl.constexpr):
    """row_max, log2(row_sum) and delta of the query rows; a row that is not inside has no weight."""
    at = start + q_rows
    if CHECKED:
        top = tl.load(saved_max + at, mask=inside, other=0.0)
        log_sum = tl.load(saved_sum + at, mask=inside, other=float("inf"))
        return top[None, :], log_sum[None, :], tl.load(delta + at, mask=inside, other=0.0)[None, :]
    else:
        return tl.load(saved_max + at)[None, :], tl.load(saved_sum + at)[None, :], tl.load(delta + at)[None, :]


@triton.jit
def walk_rows(
    d_k, d_v, k_tile, v_tile, q_at, g_at, saved_max, saved_sum, delta, d_query, start, scale, b, h, kv_idx, kv_inside,
    count, at, full_at, tail, indices, full_indices, q_row, q_column, g_row, g_column, q_len, errors,
    # hole: parameters
    # hole: accumulators
    CHECKED: tl.constexpr, BLOCK_M: tl.constexpr, Q_BLOCK: tl.constexpr, LISTS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEAD_COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    FOLD: tl.constexpr, FUSED: tl.constexpr, HAS_SCORE: tl.constexpr, HAS_MASK: tl.constexpr,
    CHECK_READS: tl.constexpr, PRECISION: tl.constexpr, ATOMIC_Q: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr,
    SCATTER: tl.constexpr,
):
    """Adds what `count` tiles of query rows give to d_k and d_v."""
    TILES: tl.constexpr = (Q_BLOCK + BLOCK_M - 1) // BLOCK_M
    q_rows = tl.arange(0, BLOCK_M)
    for it in range(0, count):
        block, full = listed(it, at, full_at, tail, indices, full_indices, CHECKED, LISTS, TILES)
        q0 = block * Q_BLOCK + it % TILES * BLOCK_M
        inside = q0 + q_rows < tl.minimum((block + 1) * Q_BLOCK, q_len)
        q_tile = load_rows(q_at + q0.to(tl.int64) * q_row, q_rows, q_row, q_column, inside, HEAD_COLUMNS, HEAD_DIM, CHECKED)
        g_tile = load_rows(g_at + q0.to(tl.int64) * g_row, q_rows, g_row, g_column, inside, VALUE_COLUMNS, VALUE_DIM, CHECKED)
        top, log_sum, less = row_numbers(saved_max, saved_sum, delta, start + q0, q_rows, inside, CHECKED)
        score = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION, out_dtype=real)
        upward = tl.dot(v_tile, tl.trans(g_tile), input_precision=PRECISION, out_dtype=real)
        q_idx = tl.minimum(q0 + q_rows, q_len - 1)[None, :]
        weights, grad, _ = gradients(
            score, upward, top, log_sum, less, scale, b, h, q_idx, kv_idx, kv_inside[:, None] & inside[None, :], full, errors,
            # hole: arguments
            # hole: accumulators
            # what is added up at once cannot be done again
            CHECKED, FOLD, FUSED, HAS_SCORE, HAS_MASK, CHECK_READS, SCATTER, ATOMIC_Q,
        )
        if NEED_V:
            d_v = tl.dot(weights.to(g_tile.dtype), g_tile, d_v, input_precision=PRECISION, out_dtype=real)
        if NEED_K:
            d_k = tl.dot(grad.to(q_tile.dtype), q_tile, d_k, input_precision=PRECISION, out_dtype=real)
        if ATOMIC_Q:
            share = tl.dot(tl.trans(grad).to(k_tile.dtype), finite(k_tile), input_precision=PRECISION, out_dtype=real)
            add_rows(d_query, start + q0, q_rows, inside, share * scale, HEAD_COLUMNS, HEAD_DIM)
    return d_k, d_v


@triton.jit
def walk_head(
    d_k, d_v, k_tile, v_tile, q, grad_out, saved_max, saved_sum, delta, d_query, scale, b, h, kv_idx, kv_inside, whole, flat,
    offsets, indices, full_offsets, full_indices, q_b, q_h, q_row, q_column, g_b, g_h, g_row, g_column, q_heads, q_len, rows,
    errors,
    # hole: parameters
    # hole: accumulators
    BLOCK_M: tl.constexpr, Q_BLOCK: tl.constexpr, LISTS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEAD_COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    FOLD: tl.constexpr, FUSED: tl.constexpr, HAS_SCORE: tl.constexpr, HAS_MASK: tl.constexpr,
    CHECK_READS: tl.constexpr, PRECISION: tl.constexpr, ATOMIC_Q: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr,
    SCATTER: tl.constexpr,
):
    """The walk for one query head: tiles that need no check, if all keys are there, and then the others."""
    TILES: tl.constexpr = (Q_BLOCK + BLOCK_M - 1) // BLOCK_M
    q_at = q + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
    g_at = grad_out + b.to(tl.int64) * g_b + h.to(tl.int64) * g_h
    start = (b.to(tl.int64) * q_heads + h) * q_len
    at, full_at, partial, full_count, interior = row_range(
        offsets, full_offsets, full_indices, flat, rows, q_len % Q_BLOCK != 0, LISTS, Q_BLOCK % BLOCK_M == 0
    )
    interior = tl.where(whole, interior, 0)
    d_k, d_v = walk_rows(
        d_k, d_v, k_tile, v_tile, q_at, g_at, saved_max, saved_sum, delta, d_query, start, scale, b, h, kv_idx, kv_inside,
        interior * TILES, at, full_at, full_count, indices, full_indices, q_row, q_column, g_row, g_column, q_len, errors,
        # hole: arguments
        # hole: accumulators
        False, BLOCK_M, Q_BLOCK, LISTS, HEAD_DIM, VALUE_DIM, HEAD_COLUMNS, VALUE_COLUMNS,
        FOLD, FUSED, HAS_SCORE, HAS_MASK, CHECK_READS, PRECISION, ATOMIC_Q, NEED_K, NEED_V, SCATTER,
    )
    tail = full_count - interior
    return walk_rows(
        d_k, d_v, k_tile, v_tile, q_at, g_at, saved_max, saved_sum, delta, d_query, start, scale, b, h, kv_idx, kv_inside,
        (tail + partial) * TILES, at, full_at + interior, tail, indices, full_indices, q_row, q_column, g_row, g_column, q_len,
        errors,
        # hole: arguments
        # hole: accumulators
        True, BLOCK_M, Q_BLOCK, LISTS, HEAD_DIM, VALUE_DIM, HEAD_COLUMNS, VALUE_COLUMNS,
        FOLD, FUSED, HAS_SCORE, HAS_MASK, CHECK_READS, PRECISION, ATOMIC_Q, NEED_K, NEED_V, SCATTER,
    )


@triton.jit
def walk_with_care(
    k_part, v_part, k_tile, v_tile, q, grad_out, saved_max, saved_sum, delta, scale, b, h, kv_idx, kv_inside, flat, few,
    offsets, indices, full_offsets, full_indices, q_b, q_h, q_row, q_column, g_b, g_h, g_row, g_column, q_heads, q_len, rows,
    errors,
    # hole: parameters
    # hole: accumulators
    BLOCK_M: tl.constexpr, Q_BLOCK: tl.constexpr, LISTS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEAD_COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    FOLD: tl.constexpr, FUSED: tl.constexpr, HAS_SCORE: tl.constexpr, HAS_MASK: tl.constexpr, CHECK_READS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The walk for one query head and the columns `few`, in which a masked pair of rows gives exactly nothing."""
    TILES: tl.constexpr = (Q_BLOCK + BLOCK_M - 1) // BLOCK_M
    q_rows = tl.arange(0, BLOCK_M)
    q_at = q + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
    g_at = grad_out + b.to(tl.int64) * g_b + h.to(tl.int64) * g_h
    start = (b.to(tl.int64) * q_heads + h) * q_len
    at, full_at, partial, full_count, _ = row_range(
        offsets, full_offsets, full_indices, flat, rows, q_len % Q_BLOCK != 0, LISTS, False
    )
    for it in tl.range(0, (full_count + partial) * TILES, num_stages=1):
        block, full = listed(it, at, full_at, full_count, indices, full_indices, True, LISTS, TILES)
        q0 = block * Q_BLOCK + it % TILES * BLOCK_M
        inside = q0 + q_rows < tl.minimum((block + 1) * Q_BLOCK, q_len)
        q_tile = load_rows(q_at + q0.to(tl.int64) * q_row, q_rows, q_row, q_column, inside, HEAD_COLUMNS, HEAD_DIM, True)
        g_tile = load_rows(g_at + q0.to(tl.int64) * g_row, q_rows, g_row, g_column, inside, VALUE_COLUMNS, VALUE_DIM, True)
        top, log_sum, less = row_numbers(saved_max, saved_sum, delta, start + q0, q_rows, inside, True)
        score = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION, out_dtype=real)
        upward = tl.dot(v_tile, tl.trans(g_tile), input_precision=PRECISION, out_dtype=real)
        q_idx = tl.minimum(q0 + q_rows, q_len - 1)[None, :]
        weights, grad, seen = gradients(
            score, upward, top, log_sum, less, scale, b, h, q_idx, kv_idx, kv_inside[:, None] & inside[None, :], full, errors,
            # hole: arguments
            # hole: accumulators
            True, FOLD, FUSED, HAS_SCORE, HAS_MASK, CHECK_READS, False, True,
        )
        q_few = load_few(q_at, q0 + q_rows, few, q_row, q_column, inside, HEAD_DIM)
        g_few = load_few(g_at, q0 + q_rows, few, g_row, g_column, inside, VALUE_DIM)
        v_part = careful_dot(weights, seen, g_few, v_part, PRECISION)
        k_part = tl.dot(grad.to(q_few.dtype), finite(q_few), k_part, input_precision=PRECISION, out_dtype=real)
    return k_part, v_part


@triton.jit(do_not_specialize=NUMBERS)
def backward_kv(
    q, k, v, grad_out, saved_max, saved_sum, delta, d_query, d_key, d_value, unsound, errors,
    offsets, indices, full_offsets, full_indices, order,
    q_b, q_h, q_row, q_column, k_b, k_h, k_row, k_column, v_b, v_h, v_row, v_column, g_b, g_h, g_row, g_column,
    scale: "fp64", kv_batch, q_heads, kv_heads, group, members, q_len, kv_len, rows, columns, mask_heads, list_rows, section,
    replicas, kv_tiles,
    # hole: parameters
    # hole: accumulators
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, LISTS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEAD_COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, FOLD: tl.constexpr, FUSED: tl.constexpr, HAS_SCORE: tl.constexpr, HAS_MASK: tl.constexpr,
    CHECK_READS: tl.constexpr, PRECISION: tl.constexpr, ATOMIC_Q: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr,
    SCATTER: tl.constexpr, ALONE: tl.constexpr, CAREFUL: tl.constexpr,
):
    pid = tl.program_id(0)
    if CAREFUL:
        if tl.load(unsound + pid) == 0:
            return
    units = q_heads // members
    flat, tile, column_of_blocks, b, unit = place_of(
        pid, order, columns, section, list_rows, replicas, units, mask_heads, kv_tiles, LISTS
    )
    kv_first = column_of_blocks * KV_BLOCK + tile * BLOCK_N
    kv_end = tl.minimum(column_of_blocks * KV_BLOCK + tl.minimum(KV_BLOCK, kv_len), kv_len)
    if kv_first >= kv_end:
        if not CAREFUL:
            tl.store(unsound + pid, 0)
        return
    kv_rows = tl.arange(0, BLOCK_N)
    kv = kv_first + kv_rows
    kv_inside, whole = kv < kv_end, kv_first + BLOCK_N <= kv_end
    kv_idx = tl.minimum(kv, kv_len - 1)[:, None]
    scale = tl.full([], scale, real)

    kv_head, kv_b = unit * members // group, tl.minimum(b, kv_batch - 1)
    k_at = k + kv_b.to(tl.int64) * k_b + kv_head.to(tl.int64) * k_h + kv_first.to(tl.int64) * k_row
    v_at = v + kv_b.to(tl.int64) * v_b + kv_head.to(tl.int64) * v_h + kv_first.to(tl.int64) * v_row
    k_tile = load_rows(k_at, kv_rows, k_row, k_column, kv_inside, HEAD_COLUMNS, HEAD_DIM, True).to(q.dtype.element_ty)
    v_tile = load_rows(v_at, kv_rows, v_row, v_column, kv_inside, VALUE_COLUMNS, VALUE_DIM, True).to(q.dtype.element_ty)
    place = (b.to(tl.int64) * units + unit) * kv_len + kv

    if CAREFUL:
        for column in tl.range(0, max(HEAD_DIM, VALUE_DIM), CHUNK, num_stages=1):
            k_part, v_part = tl.zeros([BLOCK_N, CHUNK], real), tl.zeros([BLOCK_N, CHUNK], real)
            for member in tl.range(0, members, num_stages=1):
                k_part, v_part = walk_with_care(
                    k_part, v_part, k_tile, v_tile, q, grad_out, saved_max, saved_sum, delta, scale, b, unit * members + member,
                    kv_idx, kv_inside, flat, column + tl.arange(0, CHUNK), offsets, indices, full_offsets, full_indices,
                    q_b, q_h, q_row, q_column, g_b, g_h, g_row, g_column, q_heads, q_len, rows, errors,
                    # hole: arguments
                    # hole: accumulators
                    BLOCK_M, Q_BLOCK, LISTS, HEAD_DIM, VALUE_DIM, HEAD_COLUMNS, VALUE_COLUMNS,
                    FOLD, FUSED, HAS_SCORE, HAS_MASK, CHECK_READS, PRECISION,
                )
            if NEED_K:
                put_rows(d_key, place, kv_inside, k_part * scale, column, CHUNK, HEAD_DIM)
            if NEED_V:
                put_rows(d_value, place, kv_inside, v_part, column, CHUNK, VALUE_DIM)
    else:
        d_k, d_v = tl.zeros([BLOCK_N, HEAD_COLUMNS], real), tl.zeros([BLOCK_N, VALUE_COLUMNS], real)
        if ALONE:
            d_k, d_v = walk_head(
                d_k, d_v, k_tile, v_tile, q, grad_out, saved_max, saved_sum, delta, d_query, scale, b, unit, kv_idx, kv_inside,
                whole, flat, offsets, indices, full_offsets, full_indices,
                q_b, q_h, q_row, q_column, g_b, g_h, g_row, g_column, q_heads, q_len, rows, errors,
                # hole: arguments
                # hole: accumulators
                BLOCK_M, Q_BLOCK, LISTS, HEAD_DIM, VALUE_DIM, HEAD_COLUMNS, VALUE_COLUMNS,
                FOLD, FUSED, HAS_SCORE, HAS_MASK, CHECK_READS, PRECISION, ATOMIC_Q, NEED_K, NEED_V, SCATTER,
            )
        else:
            for member in tl.range(0, members, num_stages=1):
                d_k, d_v = walk_head(
                    d_k, d_v, k_tile, v_tile, q, grad_out, saved_max, saved_sum, delta, d_query, scale, b,
                    unit * members + member, kv_idx, kv_inside, whole, flat, offsets, indices, full_offsets, full_indices,
                    q_b, q_h, q_row, q_column, g_b, g_h, g_row, g_column, q_heads, q_len, rows, errors,
                    # hole: arguments
                    # hole: accumulators
                    BLOCK_M, Q_BLOCK, LISTS, HEAD_DIM, VALUE_DIM, HEAD_COLUMNS, VALUE_COLUMNS,
                    FOLD, FUSED, HAS_SCORE, HAS_MASK, CHECK_READS, PRECISION, ATOMIC_Q, NEED_K, NEED_V, SCATTER,
                )
        strange = any_of((d_k - d_k != 0) & kv_inside[:, None]) | any_of((d_v - d_v != 0) & kv_inside[:, None])
        tl.store(unsound + pid, strange)
        if NEED_K:
            put_rows(d_key, place, kv_inside, d_k * scale, 0, HEAD_COLUMNS, HEAD_DIM)
        if NEED_V:
            put_rows(d_value, place, kv_inside, d_v, 0, VALUE_COLUMNS, VALUE_DIM)
