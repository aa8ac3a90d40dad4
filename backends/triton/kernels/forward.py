"""Forward: one program walks the listed blocks of keys for one tile of query rows, with an online softmax in base 2.

Two walks: full blocks whose every position counts, with no mask and no check of bounds; then what has to be checked:
partial blocks, and the block that the length cuts off. PACK puts the query heads of one key head into one tile, and
SPLIT gives each program a share of the listed blocks, whose results combine.py joins: both are for decoding.
FOLD: without a score_mod, scale and log2(e) are one factor, and row_max is that of q @ k itself. FUSED: it is that times
the factor, so that a weight is one multiply-add and one power of 2; what rounding leaves over is the same for all of a row.

A program whose result is not finite says so in `unsound`. A second launch, CAREFUL, does those again: what is not finite
may come from a masked key. It is a launch of its own so that the first has registers to spare.
"""
import triton
import triton.language as tl

NUMBERS = (
    "kv_batch", "q_heads", "kv_heads", "group", "q_len", "kv_len", "rows", "columns", "mask_heads", "list_rows", "section",
    "replicas", "splits", "q_tiles",
    # hole: numbers
)  # fmt: skip


@triton.jit
def weigh(
    q_tile, k_tile, row_max, scale, b, h, q_idx, kv, kv_len, rows_inside, inside, full, errors,
    # hole: parameters
    CHECKED: tl.constexpr, FOLD: tl.constexpr, FUSED: tl.constexpr, HAS_SCORE: tl.constexpr, HAS_MASK: tl.constexpr,
    CHECK_READS: tl.constexpr, PRECISION: tl.constexpr,
):
    """The weights of a tile against the new row_max, the factor for what came before, and the positions seen."""
    score = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION, out_dtype=real)
    if not FOLD:
        score = score * scale
    kv_idx = tl.minimum(kv, kv_len - 1)[None, :]
    allowed = rows_inside[:, None] & inside[None, :]
    if CHECKED and HAS_MASK:
        mask, wrong = mask_mod(
            b, h, q_idx, kv_idx, allowed & (full == 0),
            # hole: arguments
        )
        allowed = allowed & (mask | full)
        if CHECK_READS:
            tl.store(errors + tl.zeros_like(wrong).to(tl.int32), 1, mask=wrong)
    if HAS_SCORE:
        score, wrong = score_mod(
            score, b, h, q_idx, kv_idx, allowed,
            # hole: arguments
        )
        if CHECK_READS:
            tl.store(errors + tl.zeros_like(wrong).to(tl.int32), 1, mask=wrong)
    if CHECKED:
        score = tl.where(allowed, score, float("-inf"))
    factor = scale * LOG2E if FOLD else tl.full([], LOG2E, real)
    top = tl.max(score, 1)
    fresh = tl.maximum(row_max, top * factor if FUSED else top)
    safe = tl.where(fresh == float("-inf"), 0.0, fresh)
    if FUSED:
        shrink = tl.exp2(row_max - safe)
        weights = tl.exp2(score * factor - safe[:, None])
    else:
        shrink = tl.exp2((row_max - safe) * factor)
        if FOLD:
            weights = tl.exp2((score - safe[:, None]) * factor)
        else:
            weights = tl.exp2(minus(score, tl.broadcast_to(safe[:, None], score.shape)) * factor)
    return weights, shrink, fresh, allowed & (score != float("-inf"))


@triton.jit
def walk_keys(
    acc, row_max, row_sum, q_tile, k_at, v_at, k_tiles, v_tiles, kv_b, kv_head, scale, b, h, q_idx, rows_inside, first, last,
    at, full_at, tail, indices, full_indices, k_row, k_column, v_row, v_column, kv_len, errors,
    # hole: parameters
    CHECKED: tl.constexpr, BLOCK_N: tl.constexpr, KV_BLOCK: tl.constexpr, LISTS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEAD_COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    FOLD: tl.constexpr, FUSED: tl.constexpr, HAS_SCORE: tl.constexpr, HAS_MASK: tl.constexpr,
    CHECK_READS: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):
    """Adds tiles `first` to `last` of a walk to acc, row_max and row_sum."""
    TILES: tl.constexpr = (KV_BLOCK + BLOCK_N - 1) // BLOCK_N
    kv_rows = tl.arange(0, BLOCK_N)
    following = first
    if LISTS and not CHECKED:
        following = tl.load(full_indices + full_at + first // TILES, mask=first < last, other=0)
    for it in range(first, last):
        if LISTS and not CHECKED:
            # which block comes next is asked for before it is needed
            block, full = following, full_at >= 0
            following = tl.load(full_indices + full_at + (it + 1) // TILES, mask=it + 1 < last, other=0)
        else:
            block, full = listed(it, at, full_at, tail, indices, full_indices, CHECKED, LISTS, TILES)
        kv0 = block * KV_BLOCK + it % TILES * BLOCK_N
        inside = kv0 + kv_rows < tl.minimum((block + 1) * KV_BLOCK, kv_len)
        k_tile = load_tile(
            k_at, k_tiles, kv_b, kv_head, kv0, kv_rows, k_row, k_column, inside, BLOCK_N, HEAD_COLUMNS, HEAD_DIM, CHECKED, TMA
        )
        weights, shrink, row_max, _ = weigh(
            q_tile, k_tile.to(q_tile.dtype), row_max, scale, b, h, q_idx, kv0 + kv_rows, kv_len, rows_inside, inside, full,
            errors,
            # hole: arguments
            CHECKED, FOLD, FUSED, HAS_SCORE, HAS_MASK, CHECK_READS, PRECISION,
        )
        v_tile = load_tile(
            v_at, v_tiles, kv_b, kv_head, kv0, kv_rows, v_row, v_column, inside, BLOCK_N, VALUE_COLUMNS, VALUE_DIM, CHECKED, TMA
        )
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(q_tile.dtype), v_tile.to(q_tile.dtype), acc, input_precision=PRECISION, out_dtype=real)
    return acc, row_max, row_sum


@triton.jit
def walk_with_care(
    few, q_tile, k_at, v_at, scale, b, h, q_idx, rows_inside, first, last, at, full_at, tail, indices, full_indices,
    k_row, k_column, v_row, v_column, kv_len, errors,
    # hole: parameters
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KV_BLOCK: tl.constexpr, LISTS: tl.constexpr, CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEAD_COLUMNS: tl.constexpr,
    FOLD: tl.constexpr, HAS_SCORE: tl.constexpr, HAS_MASK: tl.constexpr, CHECK_READS: tl.constexpr, PRECISION: tl.constexpr,
):
    """The whole walk for the columns `few` of the values, to which a masked key gives exactly nothing."""
    TILES: tl.constexpr = (KV_BLOCK + BLOCK_N - 1) // BLOCK_N
    kv_rows = tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, CHUNK], real)
    row_max, row_sum = tl.full([BLOCK_M], float("-inf"), real), tl.zeros([BLOCK_M], real)
    for it in tl.range(first, last, num_stages=1):
        block, full = listed(it, at, full_at, tail, indices, full_indices, True, LISTS, TILES)
        kv0 = block * KV_BLOCK + it % TILES * BLOCK_N
        inside = kv0 + kv_rows < tl.minimum((block + 1) * KV_BLOCK, kv_len)
        k_from = k_at + kv0.to(tl.int64) * k_row
        k_tile = load_rows(k_from, kv_rows, k_row, k_column, inside, HEAD_COLUMNS, HEAD_DIM, True)
        weights, shrink, row_max, seen = weigh(
            q_tile, k_tile.to(q_tile.dtype), row_max, scale, b, h, q_idx, kv0 + kv_rows, kv_len, rows_inside, inside, full,
            errors,
            # hole: arguments
            True, FOLD, False, HAS_SCORE, HAS_MASK, CHECK_READS, PRECISION,
        )
        v_few = load_few(v_at, kv0 + kv_rows, few, v_row, v_column, inside, VALUE_DIM)
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        acc = careful_dot(weights, seen, v_few.to(q_tile.dtype), acc * shrink[:, None], PRECISION)
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=NUMBERS)
def forward(
    q, k, v, k_tiles, v_tiles, out, lse, max_scores, saved_max, saved_sum, part, unsound, errors,
    offsets, indices, full_offsets, full_indices, order,
    q_b, q_h, q_row, q_column, k_b, k_h, k_row, k_column, v_b, v_h, v_row, v_column,
    scale: "fp64", kv_batch, q_heads, kv_heads, group, q_len, kv_len, rows, columns, mask_heads, list_rows, section,
    replicas, splits, q_tiles,
    # hole: parameters
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, LISTS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEAD_COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, FOLD: tl.constexpr, FUSED: tl.constexpr, HAS_SCORE: tl.constexpr, HAS_MASK: tl.constexpr,
    CHECK_READS: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, PACK: tl.constexpr, SPLIT: tl.constexpr,
    SAVE: tl.constexpr, MAX_SCORES: tl.constexpr, CAREFUL: tl.constexpr,
):
    split = tl.program_id(1)
    program = tl.program_id(0) * splits + split
    if CAREFUL:
        if tl.load(unsound + program) == 0:
            return
    flat, tile, row_of_blocks, b, h = place_of(
        tl.program_id(0), order, rows, section, list_rows, replicas, kv_heads if PACK else q_heads, mask_heads, q_tiles, LISTS
    )
    kv_head = h if PACK else h // group
    q_first = row_of_blocks * Q_BLOCK
    span = tl.minimum(Q_BLOCK, q_len - q_first)
    index = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if PACK:
        rows_inside = index < group * span
        head, q_rows = tl.minimum(h * group + index // span, q_heads - 1), q_first + index % span
    else:
        rows_inside = index < span
        head, q_rows = h + index * 0, q_first + index
    if tile * BLOCK_M >= (group * span if PACK else span):
        if not CAREFUL:
            tl.store(unsound + program, 0)
        return
    q_rows = tl.minimum(q_rows, q_len - 1)
    q_idx = q_rows[:, None]
    h_idx = head[:, None] if PACK else h
    scale = tl.full([], scale, real)

    q_columns = tl.arange(0, HEAD_COLUMNS)
    q_at = q + b.to(tl.int64) * q_b + (head.to(tl.int64) * q_h + q_rows.to(tl.int64) * q_row)[:, None]
    q_there = rows_inside[:, None] & (q_columns < HEAD_DIM)[None, :]
    q_tile = tl.load(q_at + step(q_columns, q_column)[None, :], mask=q_there, other=0.0)
    kv_b = tl.minimum(b, kv_batch - 1)
    k_at = k + kv_b.to(tl.int64) * k_b + kv_head.to(tl.int64) * k_h
    v_at = v + kv_b.to(tl.int64) * v_b + kv_head.to(tl.int64) * v_h

    TILES: tl.constexpr = (KV_BLOCK + BLOCK_N - 1) // BLOCK_N
    at, full_at, partial, full_count, interior = row_range(
        offsets, full_offsets, full_indices, flat, columns, kv_len % KV_BLOCK != 0, LISTS, KV_BLOCK % BLOCK_N == 0
    )
    free, total = interior * TILES, (full_count + partial) * TILES
    first, last = total * 0, total
    if SPLIT:
        first = (total.to(tl.int64) * split // splits).to(tl.int32)
        last = (total.to(tl.int64) * (split + 1) // splits).to(tl.int32)

    row = (b.to(tl.int64) * q_heads + head) * q_len + q_rows
    if CAREFUL:
        for column in tl.range(0, VALUE_DIM, CHUNK, num_stages=1):
            acc, row_max, row_sum = walk_with_care(
                column + tl.arange(0, CHUNK), q_tile, k_at, v_at, scale, b, h_idx, q_idx, rows_inside, first, last,
                at, full_at, full_count, indices, full_indices, k_row, k_column, v_row, v_column, kv_len, errors,
                # hole: arguments
                BLOCK_M, BLOCK_N, KV_BLOCK, LISTS, CHUNK, HEAD_DIM, VALUE_DIM, HEAD_COLUMNS,
                FOLD, HAS_SCORE, HAS_MASK, CHECK_READS, PRECISION,
            )
            if FUSED:
                row_max = row_max * (scale * LOG2E)
            write(
                acc, row_max, row_sum, row, rows_inside, out, lse, max_scores, saved_max, saved_sum, row * VALUE_DIM, scale,
                column, part, split, splits, FOLD, FUSED, SPLIT, CHUNK, VALUE_DIM, SAVE, MAX_SCORES,
            )
    else:
        acc = tl.zeros([BLOCK_M, VALUE_COLUMNS], real)
        row_max, row_sum = tl.full([BLOCK_M], float("-inf"), real), tl.zeros([BLOCK_M], real)
        acc, row_max, row_sum = walk_keys(
            acc, row_max, row_sum, q_tile, k_at, v_at, k_tiles, v_tiles, kv_b, kv_head, scale, b, h_idx, q_idx, rows_inside,
            tl.minimum(first, free), tl.minimum(last, free), at, full_at, full_count, indices, full_indices,
            k_row, k_column, v_row, v_column, kv_len, errors,
            # hole: arguments
            False, BLOCK_N, KV_BLOCK, LISTS, HEAD_DIM, VALUE_DIM, HEAD_COLUMNS, VALUE_COLUMNS,
            FOLD, FUSED, HAS_SCORE, HAS_MASK, CHECK_READS, PRECISION, TMA,
        )
        acc, row_max, row_sum = walk_keys(
            acc, row_max, row_sum, q_tile, k_at, v_at, k_tiles, v_tiles, kv_b, kv_head, scale, b, h_idx, q_idx, rows_inside,
            tl.maximum(first - free, 0), tl.maximum(last - free, 0), at, full_at + interior, full_count - interior,
            indices, full_indices, k_row, k_column, v_row, v_column, kv_len, errors,
            # hole: arguments
            True, BLOCK_N, KV_BLOCK, LISTS, HEAD_DIM, VALUE_DIM, HEAD_COLUMNS, VALUE_COLUMNS,
            FOLD, FUSED, HAS_SCORE, HAS_MASK, CHECK_READS, PRECISION, TMA,
        )
        strange = any_of((acc - acc != 0) & rows_inside[:, None])
        # a row of great numbers may lose its sum to what FUSED leaves over
        lost = (row_sum == float("inf")) | ((row_sum < 1e-30) & (row_max != float("-inf")))
        strange |= tl.max(lost.to(tl.int32), 0)
        tl.store(unsound + program, strange)
        write(
            acc, row_max, row_sum, row, rows_inside, out, lse, max_scores, saved_max, saved_sum, row * VALUE_DIM, scale, 0, part,
            split, splits, FOLD, FUSED, SPLIT, VALUE_COLUMNS, VALUE_DIM, SAVE, MAX_SCORES,
        )
