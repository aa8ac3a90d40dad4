"""d query, and the gradients of captured tensors: the forward's walk over query rows, without a softmax to wait for.

Per tile of keys there are three products: the scores again, d weights = grad_out x value, and d query += d scores x key.
"""


@kernel
def backward_query(
    q, k, v, g, dq, row_maxima, log_sums, deltas, offsets, indices, full_offsets, full_indices, order, errors,
    sizes, dims, floats, ints,
    # hole: captured
):
    thread = int64(cuda.threadIdx.x)
    # hole: shared
    q_tile = shared[Q_AT : Q_AT + ROW_TILE * STEP_queries]
    g_tile = shared[G_AT : G_AT + ROW_TILE * STEP_grads]
    k_tile = shared[K_AT : K_AT + COLUMN_TILE * STEP_keys]
    v_tile = shared[V_AT : V_AT + COLUMN_TILE * STEP_values]
    weights = shared[WEIGHTS_AT : WEIGHTS_AT + WEIGHTS_SIZE]

    b, h, row, q0 = row_task(int64(cuda.blockIdx.x), sizes, order)
    q_end = smaller(sizes[Q_LEN], (row + 1) * sizes[Q_BLOCK])
    if q0 >= q_end:
        return
    kv_head = h // sizes[GROUP]
    k_base = b * sizes[K_B] + kv_head * sizes[K_H]
    v_base = b * sizes[V_B] + kv_head * sizes[V_H]
    list_row = (b * sizes[MASK_STEP_B] + h * sizes[MASK_STEP_H]) * sizes[MASK_ROWS] + row
    tiles_a_block = (smaller(sizes[KV_BLOCK], sizes[KV_LEN]) + COLUMN_TILE - 1) // COLUMN_TILE
    tiles = tiles_listed(list_row, offsets, full_offsets, tiles_a_block)
    scale = real(floats[0])

    my_row = row_of(thread)
    my_column = column_of(thread)
    q_at = registers(ROWS)
    row_max = registers(ROWS)
    log_sum = registers(ROWS)
    delta = registers(ROWS)
    counts = registers(ROWS)
    places = registers(ROWS)
    factors = registers(ROWS)
    s = registers(ROWS, COLS)
    d = registers(ROWS, COLS)
    acc = registers(ROWS, WIDE_keys)
    part = registers(PARTS)
    place = registers(PARTS)
    for i in unrolled(ROWS):
        q_at[i] = smaller(q0 + my_row + down(i), q_end - 1)
        flat = (b * sizes[Q_HEADS] + h) * sizes[Q_LEN] + q_at[i]
        row_max[i] = row_maxima[flat]
        log_sum[i] = log_sums[flat] * LOG2E
        delta[i] = deltas[flat]
        counts[i] = True
    for c in unrolled(PARTS):
        part[c] = float64(0)
        place[c] = int64(0)

    fetch_queries(
        q_tile, ROW_TILE, q, b * sizes[Q_B] + h * sizes[Q_H] + q0 * sizes[Q_ROW], sizes[Q_ROW], sizes[Q_COL], q_end - q0,
        ROW_TILE, 0, thread,
    )
    fetch_grads(
        g_tile, ROW_TILE, g, b * sizes[G_B] + h * sizes[G_H] + q0 * sizes[G_ROW], sizes[G_ROW], sizes[G_COL], q_end - q0,
        ROW_TILE, 0, thread,
    )
    careful = False
    while True:
        for i in unrolled(ROWS):
            for e in unrolled(WIDE_keys):
                acc[i, e] = real(0)
        for t in range(tiles):
            kv0, kv_end, partial = listed(
                t, list_row, offsets, indices, full_offsets, full_indices, tiles_a_block, sizes[KV_BLOCK],
                COLUMN_TILE, sizes[KV_LEN],
            )
            cuda.syncthreads()
            fetch_keys(
                k_tile, COLUMN_TILE, k, k_base + kv0 * sizes[K_ROW], sizes[K_ROW], sizes[K_COL], kv_end - kv0,
                COLUMN_TILE, 0, thread,
            )
            fetch_values(
                v_tile, COLUMN_TILE, v, v_base + kv0 * sizes[V_ROW], sizes[V_ROW], sizes[V_COL], kv_end - kv0,
                COLUMN_TILE, 0, thread,
            )
            arrived()
            cuda.syncthreads()
            s = unpacked(product_keys(q_tile, k_tile, thread))
            d = unpacked(product_values(g_tile, v_tile, thread))
            masked = (partial & HAS_MASK) | (kv_end - kv0 < COLUMN_TILE) | (q_end - q0 < ROW_TILE)
            if masked:
                for j in unrolled(COLS):
                    kv_at = smaller(kv0 + my_column + across(j), kv_end - 1)
                    for i in unrolled(ROWS):
                        allowed = (kv0 + my_column + across(j) < kv_end) & (q0 + my_row + down(i) < q_end)
                        # hole: mask_call
                        x = s[i, j] * scale
                        # hole: grad_call
            else:
                for j in unrolled(COLS):
                    kv_at = smaller(kv0 + my_column + across(j), kv_end - 1)
                    for i in unrolled(ROWS):
                        allowed = True
                        x = s[i, j] * scale
                        # hole: grad_call
            if NEEDS_QUERY:
                if careful:
                    acc = unpacked(add_keys_carefully(packed(acc), packed(d), k_tile, weights, real(0), thread))
                else:
                    acc = unpacked(add_keys(packed(acc), packed(d), k_tile, weights, thread))

        # a number that is not finite may come from a masked key: once more, without the scores that got no gradient
        again = cuda.syncthreads_or(int32(not finite_keys(packed(acc), packed(counts))))
        if careful | (again == 0):
            break
        careful = True

    if NEEDS_QUERY:
        for i in unrolled(ROWS):
            place = b * sizes[DQ_B] + h * sizes[DQ_H] + q_at[i] * sizes[DQ_ROW]
            places[i] = select(q0 + my_row + down(i) < q_end, place, int64(-1))
            factors[i] = scale
        store_keys(dq, packed(places), sizes[DQ_COL], packed(acc), packed(factors), my_column)
    for c in unrolled(PARTS):
        for step in unrolled(LANE_BITS):
            part[c] += shuffle_xor(part[c], 1 << step)
    # hole: shared_sums
