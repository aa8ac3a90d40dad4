"""The forward kernel: a block of threads computes a tile of query rows, one tile of keys after the other.

A tile of rows is of PACK query heads that share a key head, Q_ROWS rows of each (PACK is 1 unless there are few queries).
With SPLIT the tiles of keys are shared out over several blocks of threads, whose parts combine.py merges.
"""


@device
def softmax(s_given, o_before, max_before, sum_before):
    """Weights of a tile's scores against the greatest so far, and what was added up before, shrunk to it."""
    s = registers(ROWS, COLS)
    o = registers(ROWS, WIDE_values)
    row_max = registers(ROWS)
    row_sum = registers(ROWS)
    s = unpacked(s_given)
    o = unpacked(o_before)
    row_max = unpacked(max_before)
    row_sum = unpacked(sum_before)
    for i in unrolled(ROWS):
        highest = row_max[i]
        for j in unrolled(COLS):
            highest = maximum(s[i, j], highest)
        highest = row_maximum(highest)
        base = select(highest == -INF, real(0), highest)
        shrink = exp2((row_max[i] - base) * LOG2E)
        row_max[i] = highest
        row_sum[i] *= shrink
        for j in unrolled(COLS):
            s[i, j] = exp2(minus(s[i, j], base) * LOG2E)
            row_sum[i] += s[i, j]
        for d in unrolled(WIDE_values):
            o[i, d] *= shrink
    return packed(s), packed(o), packed(row_max), packed(row_sum)


@device
def marked(s_given, p_given):
    """The weights, with -1 where a position is masked: no weight is negative."""
    s = registers(ROWS, COLS)
    p = registers(ROWS, COLS)
    s = unpacked(s_given)
    p = unpacked(p_given)
    for i in unrolled(ROWS):
        for j in unrolled(COLS):
            p[i, j] = select(s[i, j] == -INF, real(-1), p[i, j])
    return packed(p)


@kernel
def forward(
    q, k, v, out, lse, max_scores, row_maxima, log_sums, parts, offsets, indices, full_offsets, full_indices, order, errors,
    sizes, dims, floats, ints,
    # hole: captured
):
    thread = int64(cuda.threadIdx.x)
    # hole: shared
    q_tile = shared[Q_AT : Q_AT + ROW_TILE * STEP_queries]
    k_tile = shared[K_AT : K_AT + COLUMN_TILE * STEP_keys]
    v_tile = shared[V_AT : V_AT + COLUMN_TILE * STEP_values]
    weights = shared[WEIGHTS_AT : WEIGHTS_AT + WEIGHTS_SIZE]

    # which rows: of one batch, of PACK heads from h0, from q0 on
    task = int64(cuda.blockIdx.x)
    split = task % sizes[SPLITS]
    task = task // sizes[SPLITS]
    b, h0, row, q0 = row_task(task, sizes, order)
    q_end = smaller(sizes[Q_LEN], (row + 1) * sizes[Q_BLOCK])
    if q0 >= q_end:
        return
    kv_head = h0 // sizes[GROUP]
    k_base = b * sizes[K_B] + kv_head * sizes[K_H]
    v_base = b * sizes[V_B] + kv_head * sizes[V_H]
    list_row = (b * sizes[MASK_STEP_B] + h0 * sizes[MASK_STEP_H]) * sizes[MASK_ROWS] + row
    tiles_a_block = (smaller(sizes[KV_BLOCK], sizes[KV_LEN]) + COLUMN_TILE - 1) // COLUMN_TILE
    tiles = tiles_listed(list_row, offsets, full_offsets, tiles_a_block)
    first = tiles * split // sizes[SPLITS]
    last = tiles * (split + 1) // sizes[SPLITS]
    scale = real(floats[0])

    my_row = row_of(thread)
    my_column = column_of(thread)
    h = registers(ROWS)
    q_at = registers(ROWS)
    s = registers(ROWS, COLS)
    o = registers(ROWS, WIDE_values)
    row_max = registers(ROWS)
    row_sum = registers(ROWS)
    counts = registers(ROWS)
    places = registers(ROWS)
    factors = registers(ROWS)
    there = registers(ROWS)
    for i in unrolled(ROWS):
        there[i] = q0 + (my_row + down(i)) % Q_ROWS < q_end
        h[i] = h0 + (my_row + down(i)) // Q_ROWS
        q_at[i] = smaller(q0 + (my_row + down(i)) % Q_ROWS, q_end - 1)

    fetch_queries(
        q_tile, ROW_TILE, q, b * sizes[Q_B] + h0 * sizes[Q_H] + q0 * sizes[Q_ROW], sizes[Q_ROW], sizes[Q_COL],
        q_end - q0, Q_ROWS, sizes[Q_H], thread,
    )
    careful = False
    while True:
        for i in unrolled(ROWS):
            row_max[i] = -INF
            row_sum[i] = real(0)
            for d in unrolled(WIDE_values):
                o[i, d] = real(0)
        kv0, kv_end, partial = int64(0), int64(0), False
        if first < last:
            kv0, kv_end, partial = listed(
                first, list_row, offsets, indices, full_offsets, full_indices, tiles_a_block, sizes[KV_BLOCK],
                COLUMN_TILE, sizes[KV_LEN],
            )
            fetch_keys(
                k_tile, COLUMN_TILE, k, k_base + kv0 * sizes[K_ROW], sizes[K_ROW], sizes[K_COL], kv_end - kv0,
                COLUMN_TILE, 0, thread,
            )
        for t in range(first, last):
            arrived()
            cuda.syncthreads()
            fetch_values(
                v_tile, COLUMN_TILE, v, v_base + kv0 * sizes[V_ROW], sizes[V_ROW], sizes[V_COL], kv_end - kv0,
                COLUMN_TILE, 0, thread,
            )
            s = unpacked(product_keys(q_tile, k_tile, thread))

            # scores after both mods; -inf where masked
            if (partial & HAS_MASK) | (kv_end - kv0 < COLUMN_TILE) | (q_end - q0 < Q_ROWS):
                for j in unrolled(COLS):
                    kv_at = kv0 + my_column + across(j)
                    inside = kv_at < kv_end
                    kv_at = smaller(kv_at, kv_end - 1)
                    for i in unrolled(ROWS):
                        allowed = inside & there[i]
                        # hole: mask_call
                        x = s[i, j] * scale
                        # hole: score_call
                        s[i, j] = select(allowed, x, -INF)
            else:
                for j in unrolled(COLS):
                    kv_at = kv0 + my_column + across(j)
                    for i in unrolled(ROWS):
                        allowed = True
                        x = s[i, j] * scale
                        # hole: score_call
                        s[i, j] = x

            p, o_now, max_now, sum_now = softmax(packed(s), packed(o), packed(row_max), packed(row_sum))
            row_max = unpacked(max_now)
            row_sum = unpacked(sum_now)

            arrived()
            cuda.syncthreads()
            if t + 1 < last:
                kv0, kv_end, partial = listed(
                    t + 1, list_row, offsets, indices, full_offsets, full_indices, tiles_a_block, sizes[KV_BLOCK],
                    COLUMN_TILE, sizes[KV_LEN],
                )
                fetch_keys(
                    k_tile, COLUMN_TILE, k, k_base + kv0 * sizes[K_ROW], sizes[K_ROW], sizes[K_COL], kv_end - kv0,
                    COLUMN_TILE, 0, thread,
                )
            if careful:
                o = unpacked(add_values_carefully(o_now, marked(packed(s), p), v_tile, weights, real(-1), thread))
            else:
                o = unpacked(add_values(o_now, p, v_tile, weights, thread))

        # a number that is not finite may come from a masked value: once more, position by position;
        # a row whose sum of weights is nan shall be nan
        for i in unrolled(ROWS):
            row_sum[i] = row_total(row_sum[i])
            counts[i] = row_sum[i] == row_sum[i]
        again = cuda.syncthreads_or(int32(not finite_values(packed(o), packed(counts))))
        if careful | (again == 0):
            break
        careful = True

    for i in unrolled(ROWS):
        flat = (b * sizes[Q_HEADS] + h[i]) * sizes[Q_LEN] + q_at[i]
        inside = q0 + (my_row + down(i)) % Q_ROWS < q_end
        first_lane = inside & (thread % SPREAD == 0)
        if SPLIT:
            place = (split * sizes[BATCH] * sizes[Q_HEADS] * sizes[Q_LEN] + flat) * (VALUE_WIDTH + 2)
            places[i] = select(inside, place + 2, int64(-1))
            if first_lane:
                parts[place] = row_max[i]
                parts[place + 1] = row_sum[i]
        else:
            place = b * sizes[O_B] + h[i] * sizes[O_H] + q_at[i] * sizes[O_ROW]
            places[i] = select(inside, place, int64(-1))
            factors[i] = select(row_sum[i] == 0, real(0), real(1) / row_sum[i])
            if first_lane:
                log_sum = math.log(row_sum[i])
                lse[flat] = row_max[i] + log_sum
                if SAVES:
                    row_maxima[flat] = row_max[i]
                    log_sums[flat] = log_sum
                if MAX_SCORES:
                    max_scores[flat] = select(row_sum[i] == row_sum[i], row_max[i], row_sum[i])
    if SPLIT:
        for i in unrolled(ROWS):
            if places[i] >= 0:
                for d in unrolled(WIDE_values):
                    if my_column + across(d) < VALUE_WIDTH:
                        parts[places[i] + my_column + across(d)] = o[i, d]
    else:
        store_values(out, packed(places), sizes[O_COL], packed(o), packed(factors), my_column)
