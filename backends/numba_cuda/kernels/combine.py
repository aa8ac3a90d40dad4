"""Merges the parts of rows whose keys were shared out (SPLIT in forward.py): one warp a row of query."""


@kernel
def combine(parts, out, lse, max_scores, row_maxima, log_sums, sizes):
    thread = int64(cuda.threadIdx.x)
    flat = int64(cuda.blockIdx.x) * (THREADS // LANES) + thread // LANES
    rows = sizes[BATCH] * sizes[Q_HEADS] * sizes[Q_LEN]
    if flat < rows:
        step = rows * (VALUE_WIDTH + 2)
        first = flat * (VALUE_WIDTH + 2)
        highest = -INF
        for split in range(sizes[SPLITS]):
            highest = maximum(parts[first + split * step], highest)
        base = select(highest == -INF, real(0), highest)
        total = real(0)
        for split in range(sizes[SPLITS]):
            at = first + split * step
            total += exp2((parts[at] - base) * LOG2E) * parts[at + 1]
        inverse = select(total == 0, real(0), real(1) / total)
        head = flat // sizes[Q_LEN]
        o_at = head // sizes[Q_HEADS] * sizes[O_B] + head % sizes[Q_HEADS] * sizes[O_H] + flat % sizes[Q_LEN] * sizes[O_ROW]
        for d in range(thread % LANES, VALUE_WIDTH, LANES):
            x = real(0)
            for split in range(sizes[SPLITS]):
                at = first + split * step
                x += exp2((parts[at] - base) * LOG2E) * parts[at + 2 + d]
            write_values(out, o_at + d * sizes[O_COL], x * inverse)
        if thread % LANES == 0:
            log_sum = math.log(total)
            lse[flat] = highest + log_sum
            if SAVES:
                row_maxima[flat] = highest
                log_sums[flat] = log_sum
            if MAX_SCORES:
                max_scores[flat] = select(total == total, highest, total)
