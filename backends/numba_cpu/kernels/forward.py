"""The forward driver: one worker's share of the tasks, each a tile of query rows of one head.

Everything is transposed, so that the query rows of a tile are the lanes of vectors: scores are (kv, q), the
accumulated output is (value_dim, q), and softmax runs down columns without any sum across a vector.
"""
from __future__ import annotations

import math

from numba import float32, float64, int32, int64, uint8

from flexref.backends.numba_cpu.kernels.helper import helper
from flexref.backends.numba_cpu.kernels.layout import P, T
from flexref.backends.numba_cpu.kernels.machine import call_tile, gemm, lanes_of, next_task, pointer, smaller, transpose
from flexref.backends.numba_cpu.kernels.machine import read_float32 as read_k
from flexref.backends.numba_cpu.kernels.machine import read_float32 as read_q
from flexref.backends.numba_cpu.kernels.machine import read_float32 as read_v
from flexref.backends.numba_cpu.kernels.machine import write_float32 as write_o
from flexref.backends.numba_cpu.kernels.maths import exp2_small_float32 as exp2

real, BYTES, Q_BYTES, K_BYTES, V_BYTES, K_IN_PLACE, V_IN_PLACE = float32, 4, 4, 4, 4, True, True
# hole: types
LANES = lanes_of(real)
LOG2E = real(1.4426950408889634)
INF = real(math.inf)


@helper
def pack_query(params, source, n, lanes, rows_at, columns_at):
    """Query rows times scale, as columns of `columns_at` (width, lanes); what is past n or width is 0."""
    scale = real(pointer(params, float64)[P.scale])
    sizes = pointer(params, int64)
    width, row_step, col_step, ld = sizes[P.width], sizes[P.q_row], sizes[P.q_col], sizes[P.q_tile]
    padded = (width + LANES - 1) // LANES * LANES
    rows = pointer(rows_at, real)
    for i in range(lanes):
        for e in range(padded):
            rows[i * padded + e] = real(0)
    for i in range(n):
        for e in range(width):
            rows[i * padded + e] = real(read_q(source, i * row_step + e * col_step)) * scale
    transpose(sizes[P.transpose], lanes, padded, rows_at, padded, columns_at, ld)


@helper
def softmax(scores_at, live_at, masked, lo, hi, lanes, ld, max_at, sum_at, shrink_at, fresh_at):
    """Scores become weights against the new row_max; returns whether any sum that came before must shrink."""
    scores, live = pointer(scores_at, real), pointer(live_at, uint8)
    row_max, row_sum = pointer(max_at, real), pointer(sum_at, real)
    shrink, fresh = pointer(shrink_at, real), pointer(fresh_at, real)
    for i in range(lanes):
        fresh[i] = row_max[i]
    if masked != 0:
        for j in range(lo, hi):
            for i in range(lanes):
                s = scores[j * ld + i] if live[j * ld + i] != 0 else -INF
                scores[j * ld + i] = s
                fresh[i] = s if s > fresh[i] else fresh[i]
    else:
        for j in range(lo, hi):
            for i in range(lanes):
                s = scores[j * ld + i]
                fresh[i] = s if s > fresh[i] else fresh[i]
    changed = 0
    for i in range(lanes):
        changed |= int32(fresh[i] != row_max[i])
        safe = fresh[i] if fresh[i] != -INF else real(0)
        shrink[i] = exp2((row_max[i] - safe) * LOG2E)
        row_max[i] = fresh[i]
        row_sum[i] *= shrink[i]
        fresh[i] = safe
    totals = pointer(fresh_at + BYTES * lanes, real)
    for i in range(lanes):
        totals[i] = real(0)
    for j in range(lo, hi):
        for i in range(lanes):
            p = exp2((scores[j * ld + i] - fresh[i]) * LOG2E)
            scores[j * ld + i] = p
            totals[i] += p
    for i in range(lanes):
        row_sum[i] += totals[i]
    return changed


@helper
def careful_product(scores_at, live_at, lo, hi, lanes, ld, v_at, v_row, v_col, width, o_at):
    """out += weights x values without the positions whose score is -inf: 0 x inf would be nan there (R4)."""
    p, live, v, o = pointer(scores_at, real), pointer(live_at, uint8), pointer(v_at, real), pointer(o_at, real)
    for j in range(lo, hi):
        for d in range(width):
            x = v[(j - lo) * v_row + d * v_col]
            for i in range(lanes):
                if live[j * ld + i] != 0:
                    o[d * ld + i] += p[j * ld + i] * x


@helper
def mark_live(scores_at, live_at, masked, lo, hi, lanes, ld):
    """Mark the positions that take part: allowed, and not given -inf by a score_mod (R5)."""
    s, live = pointer(scores_at, real), pointer(live_at, uint8)
    for j in range(lo, hi):
        for i in range(lanes):
            seen = masked == 0 or live[j * ld + i] != 0
            live[j * ld + i] = seen and s[j * ld + i] != -INF


@helper
def write_rows(params, b, h, q0, n, o_at, rows_at, max_at, sum_at, lanes, careful):
    """Divide by row_sum, write out, lse and max_scores, and return 1; or write nothing and return 0: not all finite."""
    sizes = pointer(params, int64)
    ld, width, q_len = sizes[P.q_tile], sizes[P.value_width], sizes[P.q_len]
    padded = (width + LANES - 1) // LANES * LANES
    o, rows, row_max, row_sum = pointer(o_at, real), pointer(rows_at, real), pointer(max_at, real), pointer(sum_at, real)
    inverse = pointer(max_at + BYTES * ld * 2, real)
    for i in range(lanes):
        inverse[i] = real(1) / row_sum[i] if row_sum[i] != real(0) else real(0)
    strange = real(0)
    for d in range(width):
        for i in range(lanes):
            x = o[d * ld + i] * inverse[i]
            o[d * ld + i] = x
            strange = strange if x - x == real(0) else real(1)
    if strange != real(0) and careful == 0:
        return int64(0)
    transpose(sizes[P.transpose], padded, lanes, o_at, ld, rows_at, padded)
    row_step, col_step = sizes[P.o_row], sizes[P.o_col]
    target = sizes[P.o] + Q_BYTES * (b * sizes[P.o_b] + h * sizes[P.o_h] + q0 * row_step)
    for i in range(n):
        for d in range(width):
            write_o(target, i * row_step + d * col_step, rows[i * padded + d])
    lse, max_scores = pointer(sizes[P.lse], real), pointer(sizes[P.max_scores], real)
    start = (b * sizes[P.q_heads] + h) * q_len + q0
    for i in range(n):
        total = row_sum[i]
        log_sum = real(math.log(total)) if total != real(0) else -INF
        lse[start + i] = row_max[i] + log_sum
        if sizes[P.row_max] != 0:
            pointer(sizes[P.row_max], real)[start + i] = row_max[i]
            pointer(sizes[P.log_sum], real)[start + i] = log_sum
        if sizes[P.max_scores] != 0:
            max_scores[start + i] = row_max[i] if total == total else total
    return int64(1)


def forward(params, worker):
    sizes = pointer(params, int64)
    gemm_at = sizes[P.gemm]
    scratch = sizes[P.scratch] + worker * sizes[P.scratch_size]
    tile_at = scratch + sizes[P.at_tile]
    tile = pointer(tile_at, int64)
    q_at, q_t_at, o_t_at = scratch + sizes[P.at_q], scratch + sizes[P.at_q_t], scratch + sizes[P.at_o_t]
    scores_at, live_at = scratch + sizes[P.at_scores], scratch + sizes[P.at_live]
    max_at, sum_at = scratch + sizes[P.at_row_max], scratch + sizes[P.at_row_sum]
    shrink_at, fresh_at = scratch + sizes[P.at_shrink], scratch + sizes[P.at_fresh]
    k_copy, v_copy = scratch + sizes[P.at_k], scratch + sizes[P.at_v]
    row_max, row_sum, shrink, o_t = (
        pointer(max_at, real), pointer(sum_at, real), pointer(shrink_at, real), pointer(o_t_at, real),
    )  # fmt: skip
    ld, kv_tile, width, value_width = sizes[P.q_tile], sizes[P.kv_tile], sizes[P.width], sizes[P.value_width]
    value_padded = (value_width + LANES - 1) // LANES * LANES
    k_row, k_col, v_row, v_col = sizes[P.k_row], sizes[P.k_col], sizes[P.v_row], sizes[P.v_col]
    tile[T.error] = 0
    tile[T.ticks] = 0
    tile[T.last] = 0
    tile[T.ld] = ld
    tile[T.scores] = scores_at
    tile[T.live] = live_at
    tiles_a_row = (sizes[P.q_block] + ld - 1) // ld
    careful = int64(0)
    task = int64(-1)
    while True:
        if careful == 0:
            task = next_task(params + 8 * P.counter)
        if task >= sizes[P.tasks] or sizes[P.stop] != 0:
            break
        # the last rows first: under a causal mask they are the most work
        head, t = task // sizes[P.tiles], sizes[P.tiles] - 1 - task % sizes[P.tiles]
        b, h = head // sizes[P.q_heads], head % sizes[P.q_heads]
        row = t // tiles_a_row
        q0 = row * sizes[P.q_block] + t % tiles_a_row * ld
        n = smaller(ld, smaller((row + 1) * sizes[P.q_block], sizes[P.q_len]) - q0)
        if n <= 0:
            continue
        lanes = (n + LANES - 1) // LANES * LANES
        tile[T.b] = b
        tile[T.h] = h
        tile[T.q0] = q0
        tile[T.n] = n
        q_source = sizes[P.q] + Q_BYTES * (b * sizes[P.q_b] + h * sizes[P.q_h] + q0 * sizes[P.q_row])
        pack_query(params, q_source, n, lanes, q_at, q_t_at)
        for i in range(lanes):
            row_max[i] = -INF
            row_sum[i] = real(0)
        for i in range(value_padded * ld):
            o_t[i] = real(0)
        kv_head = h // sizes[P.group]
        k_head = sizes[P.k] + K_BYTES * (b * sizes[P.k_b] + kv_head * sizes[P.k_h])
        v_head = sizes[P.v] + V_BYTES * (b * sizes[P.v_b] + kv_head * sizes[P.v_h])
        list_row = b * sizes[P.row_step_b] + h * sizes[P.row_step_h] + row
        for full in range(2):
            first, last = int64(0), int64(full)
            offsets = pointer(sizes[P.full_offsets] if full else sizes[P.offsets], int64)
            starts = pointer(sizes[P.full_starts] if full else sizes[P.indices], int32)
            counts = pointer(sizes[P.full_counts], int32)
            if sizes[P.offsets] != 0:
                first, last = offsets[list_row], offsets[list_row + 1]
            for at in range(first, last):
                block, many = int64(0), int64(1)
                if sizes[P.offsets] != 0:
                    block = int64(starts[at])
                    # full blocks are listed as runs
                    many = int64(counts[at]) if full else many
                block_end = smaller((block + many) * sizes[P.kv_block], sizes[P.kv_len])
                for kv0 in range(block * sizes[P.kv_block], block_end, kv_tile):
                    if worker == sizes[P.poller]:
                        call_tile(sizes[P.poll], params, tile_at)
                    if sizes[P.stop] != 0:
                        break
                    lo, hi, masked = int64(0), smaller(kv_tile, block_end - kv0), int64(0)
                    tile[T.kv0] = kv0
                    tile[T.lo] = lo
                    tile[T.hi] = hi
                    if not full and sizes[P.mask_tile] != 0:
                        call_tile(sizes[P.mask_tile], params, tile_at)
                        lo, hi = tile[T.lo], tile[T.hi]
                        masked = int64(tile[T.allowed] != (hi - lo) * n)
                        if lo >= hi:
                            continue
                    tile[T.masked] = masked
                    k_at, k_step, k_next = k_head + K_BYTES * (kv0 + lo) * k_row, k_row, k_col
                    if not K_IN_PLACE:
                        copy = pointer(k_copy, real)
                        for j in range(hi - lo):
                            for e in range(width):
                                copy[j * width + e] = real(read_k(k_at, j * k_row + e * k_col))
                        k_at, k_step, k_next = k_copy, width, int64(1)
                    used = scores_at + BYTES * lo * ld
                    gemm(gemm_at, hi - lo, lanes, width, k_at, k_step, k_next, q_t_at, ld, used, ld, 0)
                    if sizes[P.score_tile] != 0:
                        call_tile(sizes[P.score_tile], params, tile_at)
                    if careful != 0:
                        mark_live(scores_at, live_at, masked, lo, hi, lanes, ld)
                    changed = softmax(
                        scores_at, live_at, masked | careful, lo, hi, lanes, ld, max_at, sum_at, shrink_at, fresh_at
                    )
                    if changed != 0:
                        for d in range(value_width):
                            for i in range(lanes):
                                o_t[d * ld + i] *= shrink[i]
                    v_at, v_step, v_next = v_head + V_BYTES * (kv0 + lo) * v_row, v_row, v_col
                    if not V_IN_PLACE:
                        copy = pointer(v_copy, real)
                        for j in range(hi - lo):
                            for d in range(value_width):
                                copy[j * value_width + d] = real(read_v(v_at, j * v_row + d * v_col))
                        v_at, v_step, v_next = v_copy, value_width, int64(1)
                    if careful != 0:
                        careful_product(
                            scores_at, live_at, lo, hi, lanes, ld, v_at, v_step, v_next, value_width, o_t_at
                        )
                    else:
                        gemm(gemm_at, value_width, lanes, hi - lo, v_at, v_next, v_step, used, ld, o_t_at, ld, 1)
        # a number that is not finite may come from a masked value: once more, position by position
        careful = 1 - write_rows(params, b, h, q0, n, o_t_at, q_at, max_at, sum_at, lanes, careful)
    if tile[T.error] != 0:
        next_task(params + 8 * P.errors)
