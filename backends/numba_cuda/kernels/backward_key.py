"""d key and d value: a block of threads has a tile of keys and values and visits the query rows that read them.

Rows of the tiles are keys here and columns are queries, so that weights and d scores lie as the products want them. All query
heads and batches that share the keys are visited one after the other: nothing is added from two sides, and the bits are the same
at every call. Per tile there are four products: scores, d weights, d value += weights x grad_out, d key += d scores x query.
"""


@kernel
def backward_key(
    q, k, v, g, dk, dv, row_maxima, log_sums, deltas, offsets, indices, full_offsets, full_indices, order, errors,
    sizes, dims, floats, ints,
    # hole: captured
):
    thread = int64(cuda.threadIdx.x)
    # hole: shared
    k_tile = shared[K_AT : K_AT + ROW_TILE * STEP_keys]
    v_tile = shared[V_AT : V_AT + ROW_TILE * STEP_values]
    q_tile = shared[Q_AT : Q_AT + COLUMN_TILE * STEP_queries]
    g_tile = shared[G_AT : G_AT + COLUMN_TILE * STEP_grads]
    weights = shared[WEIGHTS_AT : WEIGHTS_AT + WEIGHTS_SIZE]

    # which keys: of one batch and head, from kv0 on
    tiles_a_column = (smaller(sizes[KV_BLOCK], sizes[KV_LEN]) + ROW_TILE - 1) // ROW_TILE
    task = int64(cuda.blockIdx.x)
    head = task % sizes[KV_TASKS]
    task = task // sizes[KV_TASKS]
    column = task // tiles_a_column
    if HAS_LISTS:
        column = int64(order[column])
    kv0 = column * sizes[KV_BLOCK] + task % tiles_a_column * ROW_TILE
    kv_end = smaller(sizes[KV_LEN], (column + 1) * sizes[KV_BLOCK])
    if kv0 >= kv_end:
        return
    kv_b = head // sizes[KV_HEADS]
    kv_head = head % sizes[KV_HEADS]
    batches = sizes[BATCH] // sizes[KV_BATCH]
    tiles_a_block = (smaller(sizes[Q_BLOCK], sizes[Q_LEN]) + COLUMN_TILE - 1) // COLUMN_TILE
    scale = real(floats[0])

    my_row = row_of(thread)
    my_column = column_of(thread)
    kv_at = registers(ROWS)
    counts = registers(ROWS)
    places = registers(ROWS)
    factors = registers(ROWS)
    s = registers(ROWS, COLS)
    d = registers(ROWS, COLS)
    d_key = registers(ROWS, WIDE_queries)
    d_value = registers(ROWS, WIDE_grads)
    for i in unrolled(ROWS):
        counts[i] = True
        kv_at[i] = smaller(kv0 + my_row + down(i), kv_end - 1)
    fetch_keys(
        k_tile, ROW_TILE, k, kv_b * sizes[K_B] + kv_head * sizes[K_H] + kv0 * sizes[K_ROW], sizes[K_ROW], sizes[K_COL],
        kv_end - kv0, ROW_TILE, 0, thread,
    )
    fetch_values(
        v_tile, ROW_TILE, v, kv_b * sizes[V_B] + kv_head * sizes[V_H] + kv0 * sizes[V_ROW], sizes[V_ROW], sizes[V_COL],
        kv_end - kv0, ROW_TILE, 0, thread,
    )
    careful = False
    while True:
        for i in unrolled(ROWS):
            for e in unrolled(WIDE_queries):
                d_key[i, e] = real(0)
            for e in unrolled(WIDE_grads):
                d_value[i, e] = real(0)
        for turn in range(batches * sizes[GROUP]):
            b = kv_b + turn // sizes[GROUP]
            h = kv_head * sizes[GROUP] + turn % sizes[GROUP]
            q_base = b * sizes[Q_B] + h * sizes[Q_H]
            g_base = b * sizes[G_B] + h * sizes[G_H]
            list_row = (b * sizes[MASK_STEP_B] + h * sizes[MASK_STEP_H]) * sizes[MASK_COLUMNS] + column
            for t in range(tiles_listed(list_row, offsets, full_offsets, tiles_a_block)):
                q0, q_end, partial = listed(
                    t, list_row, offsets, indices, full_offsets, full_indices, tiles_a_block, sizes[Q_BLOCK],
                    COLUMN_TILE, sizes[Q_LEN],
                )
                cuda.syncthreads()
                fetch_queries(
                    q_tile, COLUMN_TILE, q, q_base + q0 * sizes[Q_ROW], sizes[Q_ROW], sizes[Q_COL], q_end - q0,
                    COLUMN_TILE, 0, thread,
                )
                fetch_grads(
                    g_tile, COLUMN_TILE, g, g_base + q0 * sizes[G_ROW], sizes[G_ROW], sizes[G_COL], q_end - q0,
                    COLUMN_TILE, 0, thread,
                )
                arrived()
                cuda.syncthreads()
                s = unpacked(product_keys(k_tile, q_tile, thread))
                if NEEDS_KEY:
                    d = unpacked(product_values(v_tile, g_tile, thread))
                else:
                    for i in unrolled(ROWS):
                        for j in unrolled(COLS):
                            d[i, j] = real(0)
                masked = (partial & HAS_MASK) | (kv_end - kv0 < ROW_TILE) | (q_end - q0 < COLUMN_TILE)
                if masked:
                    for j in unrolled(COLS):
                        q_at = smaller(q0 + my_column + across(j), q_end - 1)
                        flat = (b * sizes[Q_HEADS] + h) * sizes[Q_LEN] + q_at
                        row_max = row_maxima[flat]
                        log_sum = log_sums[flat] * LOG2E
                        delta = deltas[flat]
                        for i in unrolled(ROWS):
                            allowed = (q0 + my_column + across(j) < q_end) & (kv0 + my_row + down(i) < kv_end)
                            # hole: mask_call
                            x = s[i, j] * scale
                            # hole: grad_call
                else:
                    for j in unrolled(COLS):
                        q_at = smaller(q0 + my_column + across(j), q_end - 1)
                        flat = (b * sizes[Q_HEADS] + h) * sizes[Q_LEN] + q_at
                        row_max = row_maxima[flat]
                        log_sum = log_sums[flat] * LOG2E
                        delta = deltas[flat]
                        for i in unrolled(ROWS):
                            allowed = True
                            x = s[i, j] * scale
                            # hole: grad_call
                if NEEDS_VALUE:
                    if careful:
                        d_value = unpacked(
                            add_grads_carefully(packed(d_value), packed(s), g_tile, weights, real(0), thread)
                        )
                    else:
                        d_value = unpacked(add_grads(packed(d_value), packed(s), g_tile, weights, thread))
                if NEEDS_KEY:
                    if careful:
                        d_key = unpacked(
                            add_queries_carefully(packed(d_key), packed(d), q_tile, weights, real(0), thread)
                        )
                    else:
                        d_key = unpacked(add_queries(packed(d_key), packed(d), q_tile, weights, thread))

        # a number that is not finite may come from a masked query: once more, without the weights that are 0
        fine = True
        if NEEDS_KEY:
            fine = finite_queries(packed(d_key), packed(counts))
        if NEEDS_VALUE:
            fine = fine & finite_grads(packed(d_value), packed(counts))
        again = cuda.syncthreads_or(int32(not fine))
        if careful | (again == 0):
            break
        careful = True

    if NEEDS_KEY:
        for i in unrolled(ROWS):
            place = kv_b * sizes[DK_B] + kv_head * sizes[DK_H] + kv_at[i] * sizes[DK_ROW]
            places[i] = select(kv0 + my_row + down(i) < kv_end, place, int64(-1))
            factors[i] = scale
        store_queries(dk, packed(places), sizes[DK_COL], packed(d_key), packed(factors), my_column)
    if NEEDS_VALUE:
        for i in unrolled(ROWS):
            place = kv_b * sizes[DV_B] + kv_head * sizes[DV_H] + kv_at[i] * sizes[DV_ROW]
            places[i] = select(kv0 + my_row + down(i) < kv_end, place, int64(-1))
            factors[i] = real(1)
        store_grads(dv, packed(places), sizes[DV_COL], packed(d_value), packed(factors), my_column)
