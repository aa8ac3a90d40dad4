"""delta = sum over d of grad_out * out, less what lse's gradient adds: one warp a row of query, in the accumulation type."""


@kernel
def delta(out, g, lse_grad, deltas, sizes):
    thread = int64(cuda.threadIdx.x)
    flat = int64(cuda.blockIdx.x) * (THREADS // LANES) + thread // LANES
    if flat < sizes[BATCH] * sizes[Q_HEADS] * sizes[Q_LEN]:
        head = flat // sizes[Q_LEN]
        row = flat % sizes[Q_LEN]
        b = head // sizes[Q_HEADS]
        h = head % sizes[Q_HEADS]
        o_at = b * sizes[O_B] + h * sizes[O_H] + row * sizes[O_ROW]
        g_at = b * sizes[G_B] + h * sizes[G_H] + row * sizes[G_ROW]
        total = real(0)
        for d in range(thread % LANES, VALUE_WIDTH, LANES):
            total += read_queries(out, o_at + d * sizes[O_COL]) * read_grads(g, g_at + d * sizes[G_COL])
        for step in unrolled(LANE_BITS):
            total += shuffle_xor(total, 1 << step)
        if thread % LANES == 0:
            if HAS_LSE_GRAD:
                total -= lse_grad[flat]
            deltas[flat] = total
