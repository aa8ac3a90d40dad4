"""Backward: one program keeps a tile of query rows and walks the listed keys, for d query, in a fixed order.

A program whose result is not finite says so in `unsound`, and a second launch, CAREFUL, does those again, a few columns
at a time and without the keys that are not finite: if one of them was allowed, its score has made the gradient NaN.
"""
import triton
import triton.language as tl

NUMBERS = (
    "kv_batch", "q_heads", "kv_heads", "group", "q_len", "kv_len", "rows", "columns", "mask_heads", "list_rows", "section",
    "replicas", "q_tiles",
    # hole: numbers
)  # fmt: skip


@triton.jit
def walk_keys(
    d_q, q_tile, g_tile, k_at, v_at, top, log_sum, less, scale, b, h, q_idx, rows_inside, count, at, full_at, tail,
    indices, full_indices, k_row, k_column, v_row, v_column, kv_len, errors,
    # hole: parameters
    CHECKED: tl.constexpr, BLOCK_N: tl.constexpr, KV_BLOCK: tl.constexpr, LISTS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEAD_COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    FOLD: tl.constexpr, FUSED: tl.constexpr, HAS_SCORE: tl.constexpr, HAS_MASK: tl.constexpr,
    CHECK_READS: tl.constexpr, PRECISION: tl.constexpr,
):
    """Adds what `count` tiles of keys give to d_q."""
    TILES: tl.constexpr = (KV_BLOCK + BLOCK_N - 1) // BLOCK_N
    kv_rows = tl.arange(0, BLOCK_N)
    for it in range(0, count):
        block, full = listed(it, at, full_at, tail, indices, full_indices, CHECKED, LISTS, TILES)
        kv0 = block * KV_BLOCK + it % TILES * BLOCK_N
        inside = kv0 + kv_rows < tl.minimum((block + 1) * KV_BLOCK, kv_len)
        k_from, v_from = k_at + kv0.to(tl.int64) * k_row, v_at + kv0.to(tl.int64) * v_row
        k_tile = load_rows(k_from, kv_rows, k_row, k_column, inside, HEAD_COLUMNS, HEAD_DIM, CHECKED).to(q_tile.dtype)
        v_tile = load_rows(v_from, kv_rows, v_row, v_column, inside, VALUE_COLUMNS, VALUE_DIM, CHECKED).to(g_tile.dtype)
        score = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION, out_dtype=real)
        upward = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION, out_dtype=real)
        kv_idx = tl.minimum(kv0 + kv_rows, kv_len - 1)[None, :]
        _, grad, _ = gradients(
            score, upward, top, log_sum, less, scale, b, h, q_idx, kv_idx, rows_inside[:, None] & inside[None, :], full, errors,
            # hole: arguments
            CHECKED, FOLD, FUSED, HAS_SCORE, HAS_MASK, CHECK_READS, False, False,
        )
        d_q = tl.dot(grad.to(k_tile.dtype), k_tile, d_q, input_precision=PRECISION, out_dtype=real)
    return d_q


@triton.jit(do_not_specialize=NUMBERS)
def backward_q(
    q, k, v, grad_out, saved_max, saved_sum, delta, d_query, unsound, errors,
    offsets, indices, full_offsets, full_indices, order,
    q_b, q_h, q_row, q_column, k_b, k_h, k_row, k_column, v_b, v_h, v_row, v_column, g_b, g_h, g_row, g_column,
    scale: "fp64", kv_batch, q_heads, kv_heads, group, q_len, kv_len, rows, columns, mask_heads, list_rows, section, replicas,
    q_tiles,
    # hole: parameters
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, LISTS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEAD_COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, FOLD: tl.constexpr, FUSED: tl.constexpr, HAS_SCORE: tl.constexpr, HAS_MASK: tl.constexpr,
    CHECK_READS: tl.constexpr, PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
):
    if CAREFUL:
        if tl.load(unsound + tl.program_id(0)) == 0:
            return
    flat, tile, row_of_blocks, b, h = place_of(
        tl.program_id(0), order, rows, section, list_rows, replicas, q_heads, mask_heads, q_tiles, LISTS
    )
    q_first = row_of_blocks * Q_BLOCK + tile * BLOCK_M
    q_end = tl.minimum(row_of_blocks * Q_BLOCK + tl.minimum(Q_BLOCK, q_len), q_len)
    if q_first >= q_end:
        if not CAREFUL:
            tl.store(unsound + tl.program_id(0), 0)
        return
    q_rows = q_first + tl.arange(0, BLOCK_M)
    rows_inside = q_rows < q_end
    q_idx = tl.minimum(q_rows, q_len - 1)[:, None]
    scale = tl.full([], scale, real)

    kv_head, kv_b = h // group, tl.minimum(b, kv_batch - 1)
    of_tile, kv_rows = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    q_at = q + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h + q_first.to(tl.int64) * q_row
    g_at = grad_out + b.to(tl.int64) * g_b + h.to(tl.int64) * g_h + q_first.to(tl.int64) * g_row
    k_at = k + kv_b.to(tl.int64) * k_b + kv_head.to(tl.int64) * k_h
    v_at = v + kv_b.to(tl.int64) * v_b + kv_head.to(tl.int64) * v_h
    q_tile = load_rows(q_at, of_tile, q_row, q_column, rows_inside, HEAD_COLUMNS, HEAD_DIM, True)
    g_tile = load_rows(g_at, of_tile, g_row, g_column, rows_inside, VALUE_COLUMNS, VALUE_DIM, True)
    row = (b.to(tl.int64) * q_heads + h) * q_len + q_rows
    top = tl.load(saved_max + row, mask=rows_inside, other=0.0)[:, None]
    log_sum = tl.load(saved_sum + row, mask=rows_inside, other=float("inf"))[:, None]
    less = tl.load(delta + row, mask=rows_inside, other=0.0)[:, None]

    TILES: tl.constexpr = (KV_BLOCK + BLOCK_N - 1) // BLOCK_N
    at, full_at, partial, full_count, interior = row_range(
        offsets, full_offsets, full_indices, flat, columns, kv_len % KV_BLOCK != 0, LISTS, KV_BLOCK % BLOCK_N == 0
    )
    if CAREFUL:
        for column in tl.range(0, HEAD_DIM, CHUNK, num_stages=1):
            few = column + tl.arange(0, CHUNK)
            part = tl.zeros([BLOCK_M, CHUNK], real)
            for it in tl.range(0, (full_count + partial) * TILES, num_stages=1):
                block, full = listed(it, at, full_at, full_count, indices, full_indices, True, LISTS, TILES)
                kv0 = block * KV_BLOCK + it % TILES * BLOCK_N
                inside = kv0 + kv_rows < tl.minimum((block + 1) * KV_BLOCK, kv_len)
                k_from, v_from = k_at + kv0.to(tl.int64) * k_row, v_at + kv0.to(tl.int64) * v_row
                k_tile = load_rows(k_from, kv_rows, k_row, k_column, inside, HEAD_COLUMNS, HEAD_DIM, True)
                v_tile = load_rows(v_from, kv_rows, v_row, v_column, inside, VALUE_COLUMNS, VALUE_DIM, True)
                score = tl.dot(q_tile, tl.trans(k_tile.to(q_tile.dtype)), input_precision=PRECISION, out_dtype=real)
                upward = tl.dot(g_tile, tl.trans(v_tile.to(g_tile.dtype)), input_precision=PRECISION, out_dtype=real)
                kv_idx = tl.minimum(kv0 + kv_rows, kv_len - 1)[None, :]
                weights, grad, _ = gradients(
                    score, upward, top, log_sum, less, scale, b, h, q_idx, kv_idx,
                    rows_inside[:, None] & inside[None, :], full, errors,
                    # hole: arguments
                    True, FOLD, FUSED, HAS_SCORE, HAS_MASK, CHECK_READS, False, True,
                )
                k_few = load_few(k_at, kv0 + kv_rows, few, k_row, k_column, inside, HEAD_DIM).to(q_tile.dtype)
                part = tl.dot(grad.to(k_few.dtype), finite(k_few), part, input_precision=PRECISION, out_dtype=real)
            put_rows(d_query, row, rows_inside, part * scale, column, CHUNK, HEAD_DIM)
    else:
        d_q = tl.zeros([BLOCK_M, HEAD_COLUMNS], real)
        d_q = walk_keys(
            d_q, q_tile, g_tile, k_at, v_at, top, log_sum, less, scale, b, h, q_idx, rows_inside,
            interior * TILES, at, full_at, full_count, indices, full_indices, k_row, k_column, v_row, v_column, kv_len, errors,
            # hole: arguments
            False, BLOCK_N, KV_BLOCK, LISTS, HEAD_DIM, VALUE_DIM, HEAD_COLUMNS, VALUE_COLUMNS,
            FOLD, FUSED, HAS_SCORE, HAS_MASK, CHECK_READS, PRECISION,
        )
        tail = full_count - interior
        d_q = walk_keys(
            d_q, q_tile, g_tile, k_at, v_at, top, log_sum, less, scale, b, h, q_idx, rows_inside,
            (tail + partial) * TILES, at, full_at + interior, tail, indices, full_indices, k_row, k_column, v_row, v_column,
            kv_len, errors,
            # hole: arguments
            True, BLOCK_N, KV_BLOCK, LISTS, HEAD_DIM, VALUE_DIM, HEAD_COLUMNS, VALUE_COLUMNS,
            FOLD, FUSED, HAS_SCORE, HAS_MASK, CHECK_READS, PRECISION,
        )
        strange = any_of((d_q - d_q != 0) & rows_inside[:, None])
        tl.store(unsound + tl.program_id(0), strange)
        put_rows(d_query, row, rows_inside, d_q * scale, 0, HEAD_COLUMNS, HEAD_DIM)
