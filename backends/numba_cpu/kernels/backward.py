"""The backward driver: one worker's share of the tasks, each the keys and values of one head for some tiles of query rows.

The walk is the forward's, tile by tile of query rows as lanes. Per kv tile there are five products: scores again,
d weights = value x grad_out, then d value, d key and d query. A task owns the key and value gradients that it adds to
(`partial`, one pair for each task: (kv_len, width) then (kv_len, value_width), rows padded to whole vectors), so
nothing is shared and the same call gives the same bits.

`grad_tile` of a score_mod is given raw scores in T.scores, d weights in T.grads and, in T.rows, row_max, delta and
log2(row_sum) of each lane (lse alone is too coarse where the scores of a row share a large offset). It leaves weights in
T.scores and d raw scores in T.grads, both exactly 0 where a position is masked.
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
def pack_rows(transpose_at, source, row_step, col_step, n, lanes, width, padded, scale, rows_at, columns_at, ld):
    """Rows times `scale`, as rows of `padded` numbers and as columns of `ld`; whether all of them are finite."""
    rows = pointer(rows_at, real)
    strange = real(0)
    for i in range(lanes):
        for e in range(padded):
            rows[i * padded + e] = real(0)
    for i in range(n):
        for e in range(width):
            x = real(read_q(source, i * row_step + e * col_step)) * scale
            rows[i * padded + e] = x
            strange += x * real(0)
    transpose(transpose_at, lanes, padded, rows_at, padded, columns_at, ld)
    return strange == real(0)


@helper
def finite_keys_and_values(params, k_head, v_head):
    """Whether every number of one head's keys and values is finite."""
    sizes = pointer(params, int64)
    strange = real(0)
    for j in range(sizes[P.kv_len]):
        for e in range(sizes[P.width]):
            strange += real(read_k(k_head, j * sizes[P.k_row] + e * sizes[P.k_col])) * real(0)
        for d in range(sizes[P.value_width]):
            strange += real(read_v(v_head, j * sizes[P.v_row] + d * sizes[P.v_col])) * real(0)
    return strange == real(0)


@helper
def statistics(params, b, h, q0, n, lanes, grads_at, rows_at):
    """row_max, delta = sum(grad_out * out) - grad_lse, and log2(row_sum) of each lane; 0 for lanes past the end."""
    sizes = pointer(params, int64)
    rows, grads = pointer(rows_at, real), pointer(grads_at, real)
    ld, width = sizes[P.q_tile], sizes[P.value_width]
    padded = (width + LANES - 1) // LANES * LANES
    row_max, log_sum = pointer(sizes[P.row_max], real), pointer(sizes[P.log_sum], real)
    lse_grad = pointer(sizes[P.lse_grad], real)
    out = sizes[P.o] + Q_BYTES * (b * sizes[P.o_b] + h * sizes[P.o_h] + q0 * sizes[P.o_row])
    start = (b * sizes[P.q_heads] + h) * sizes[P.q_len] + q0
    for i in range(lanes):
        rows[i] = real(0)
        rows[ld + i] = real(0)
        rows[2 * ld + i] = real(0)
    for i in range(n):
        total = real(0)
        for d in range(width):
            total += grads[i * padded + d] * real(read_q(out, i * sizes[P.o_row] + d * sizes[P.o_col]))
        rows[i] = row_max[start + i]
        rows[2 * ld + i] = log_sum[start + i] * LOG2E
        rows[ld + i] = total - lse_grad[start + i] if sizes[P.lse_grad] != 0 else total


@helper
def plain_grads(scores_at, grads_at, live_at, masked, rows_at, lo, hi, lanes, ld):
    """What grad_tile does where there is no score_mod."""
    s, g, live = pointer(scores_at, real), pointer(grads_at, real), pointer(live_at, uint8)
    rows = pointer(rows_at, real)
    for j in range(lo, hi):
        for i in range(lanes):
            score = s[j * ld + i]
            p = exp2((score - rows[i]) * LOG2E - rows[2 * ld + i])
            p = real(0) if score == -INF else p
            ds = p * (g[j * ld + i] - rows[ld + i])
            s[j * ld + i] = p
            g[j * ld + i] = real(0) if score == -INF else ds
    if masked:
        for j in range(lo, hi):
            for i in range(lanes):
                s[j * ld + i] = s[j * ld + i] if live[j * ld + i] != 0 else real(0)
                g[j * ld + i] = g[j * ld + i] if live[j * ld + i] != 0 else real(0)


@helper
def clear_lanes(scores_at, grads_at, lo, hi, n, lanes, ld):
    """Lanes past the last query row have no weights."""
    s, g = pointer(scores_at, real), pointer(grads_at, real)
    for j in range(lo, hi):
        for i in range(n, lanes):
            s[j * ld + i] = real(0)
            g[j * ld + i] = real(0)


@helper
def careful_rows(weights_at, lo, hi, n, ld, rows_at, width, padded, target_at):
    """target[j] += weights[j, i] * rows[i] without the weights that are 0: 0 x inf would be nan there (R4)."""
    w, rows, target = pointer(weights_at, real), pointer(rows_at, real), pointer(target_at, real)
    for j in range(lo, hi):
        for i in range(n):
            x = w[j * ld + i]
            if x != real(0):
                for d in range(width):
                    target[(j - lo) * padded + d] += x * rows[i * padded + d]


@helper
def careful_columns(weights_at, lo, hi, n, ld, k_at, k_row, k_col, width, target_at):
    """target[e, i] += key[j, e] * weights[j, i], likewise."""
    w, k, target = pointer(weights_at, real), pointer(k_at, real), pointer(target_at, real)
    for j in range(lo, hi):
        for i in range(n):
            x = w[j * ld + i]
            if x != real(0):
                for e in range(width):
                    target[e * ld + i] += k[(j - lo) * k_row + e * k_col] * x


@helper
def write_query_grads(params, b, h, q0, n, lanes, columns_at, rows_at):
    """d query of one tile, times scale, from columns (width, lanes)."""
    sizes = pointer(params, int64)
    scale = real(pointer(params, float64)[P.scale])
    width, ld = sizes[P.width], sizes[P.q_tile]
    padded = (width + LANES - 1) // LANES * LANES
    transpose(sizes[P.transpose], padded, lanes, columns_at, ld, rows_at, padded)
    rows = pointer(rows_at, real)
    target = sizes[P.dq] + Q_BYTES * (b * sizes[P.dq_b] + h * sizes[P.dq_h] + q0 * sizes[P.dq_row])
    for i in range(n):
        for e in range(width):
            write_o(target, i * sizes[P.dq_row] + e * sizes[P.dq_col], rows[i * padded + e] * scale)


def backward(params, worker):
    sizes = pointer(params, int64)
    gemm_at = sizes[P.gemm]
    scratch = sizes[P.scratch] + worker * sizes[P.scratch_size]
    tile_at = scratch + sizes[P.at_tile]
    tile = pointer(tile_at, int64)
    q_at, q_t_at, g_at, g_t_at = (
        scratch + sizes[P.at_q], scratch + sizes[P.at_q_t], scratch + sizes[P.at_g], scratch + sizes[P.at_g_t],
    )  # fmt: skip
    dq_t_at, scores_at, grads_at = scratch + sizes[P.at_o_t], scratch + sizes[P.at_scores], scratch + sizes[P.at_grads]
    live_at, rows_at = scratch + sizes[P.at_live], scratch + sizes[P.at_rows]
    k_copy, v_copy = scratch + sizes[P.at_k], scratch + sizes[P.at_v]
    dq_t = pointer(dq_t_at, real)
    scale = real(pointer(params, float64)[P.scale])
    ld, kv_tile, width, value_width = sizes[P.q_tile], sizes[P.kv_tile], sizes[P.width], sizes[P.value_width]
    padded = (width + LANES - 1) // LANES * LANES
    value_padded = (value_width + LANES - 1) // LANES * LANES
    k_row, k_col, v_row, v_col = sizes[P.k_row], sizes[P.k_col], sizes[P.v_row], sizes[P.v_col]
    kv_heads = sizes[P.q_heads] // sizes[P.group]
    tiles_a_row = (sizes[P.q_block] + ld - 1) // ld
    batches = sizes[P.batch] // sizes[P.kv_batch]
    tile[T.error] = 0
    tile[T.ticks] = 0
    tile[T.last] = 0
    tile[T.ld] = ld
    tile[T.scores] = scores_at
    tile[T.grads] = grads_at
    tile[T.live] = live_at
    tile[T.rows] = rows_at
    tile[T.accumulators] = sizes[P.accumulators] + worker * sizes[P.accumulators_size]
    step = int64(0)
    while True:
        # captured gradients are added up per worker, so then every worker has the same tasks each time
        task = worker + step * sizes[P.workers] if sizes[P.static] != 0 else next_task(params + 8 * P.counter)
        step += 1
        if task >= sizes[P.tasks] or sizes[P.stop] != 0:
            break
        head, split = task // sizes[P.splits], task % sizes[P.splits]
        kv_b, kv_head = head // kv_heads, head % kv_heads
        k_head = sizes[P.k] + K_BYTES * (kv_b * sizes[P.k_b] + kv_head * sizes[P.k_h])
        v_head = sizes[P.v] + V_BYTES * (kv_b * sizes[P.v_b] + kv_head * sizes[P.v_h])
        dk_at = sizes[P.partial] + BYTES * task * sizes[P.kv_len] * (padded + value_padded)
        dv_at = dk_at + BYTES * sizes[P.kv_len] * padded
        finite = finite_keys_and_values(params, k_head, v_head)
        # the last rows first: under a causal mask they are the most work
        for turn in range(split, batches * sizes[P.group] * sizes[P.tiles], sizes[P.splits]):
            b = kv_b + turn // (sizes[P.group] * sizes[P.tiles])
            h = kv_head * sizes[P.group] + turn // sizes[P.tiles] % sizes[P.group]
            t = sizes[P.tiles] - 1 - turn % sizes[P.tiles]
            row = t // tiles_a_row
            q0 = row * sizes[P.q_block] + t % tiles_a_row * ld
            n = smaller(ld, smaller((row + 1) * sizes[P.q_block], sizes[P.q_len]) - q0)
            if n <= 0:
                continue
            if sizes[P.stop] != 0:
                break
            lanes = (n + LANES - 1) // LANES * LANES
            tile[T.b] = b
            tile[T.h] = h
            tile[T.q0] = q0
            tile[T.n] = n
            q_source = sizes[P.q] + Q_BYTES * (b * sizes[P.q_b] + h * sizes[P.q_h] + q0 * sizes[P.q_row])
            g_source = sizes[P.g] + Q_BYTES * (b * sizes[P.g_b] + h * sizes[P.g_h] + q0 * sizes[P.g_row])
            fine = pack_rows(
                sizes[P.transpose], q_source, sizes[P.q_row], sizes[P.q_col], n, lanes, width, padded, scale,
                q_at, q_t_at, ld,
            )  # fmt: skip
            fine &= pack_rows(
                sizes[P.transpose], g_source, sizes[P.g_row], sizes[P.g_col], n, lanes, value_width, value_padded,
                real(1), g_at, g_t_at, ld,
            )  # fmt: skip
            careful = not (fine and finite)
            statistics(params, b, h, q0, n, lanes, g_at, rows_at)
            for i in range(padded * ld):
                dq_t[i] = real(0)
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
                        lo, hi, masked = int64(0), smaller(kv_tile, block_end - kv0), False
                        tile[T.kv0] = kv0
                        tile[T.lo] = lo
                        tile[T.hi] = hi
                        if not full and sizes[P.mask_tile] != 0:
                            call_tile(sizes[P.mask_tile], params, tile_at)
                            lo, hi = tile[T.lo], tile[T.hi]
                            masked = tile[T.allowed] != (hi - lo) * n
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
                        v_at, v_step, v_next = v_head + V_BYTES * (kv0 + lo) * v_row, v_row, v_col
                        if not V_IN_PLACE:
                            copy = pointer(v_copy, real)
                            for j in range(hi - lo):
                                for d in range(value_width):
                                    copy[j * value_width + d] = real(read_v(v_at, j * v_row + d * v_col))
                            v_at, v_step, v_next = v_copy, value_width, int64(1)
                        s_used, g_used = scores_at + BYTES * lo * ld, grads_at + BYTES * lo * ld
                        gemm(gemm_at, hi - lo, lanes, width, k_at, k_step, k_next, q_t_at, ld, s_used, ld, 0)
                        gemm(gemm_at, hi - lo, lanes, value_width, v_at, v_step, v_next, g_t_at, ld, g_used, ld, 0)
                        if sizes[P.grad_tile] != 0:
                            call_tile(sizes[P.grad_tile], params, tile_at)
                        else:
                            plain_grads(scores_at, grads_at, live_at, masked, rows_at, lo, hi, lanes, ld)
                        if n < lanes:
                            clear_lanes(scores_at, grads_at, lo, hi, n, lanes, ld)
                        dk_rows, dv_rows = dk_at + BYTES * (kv0 + lo) * padded, dv_at + BYTES * (kv0 + lo) * value_padded
                        if careful:
                            careful_rows(scores_at, lo, hi, n, ld, g_at, value_width, value_padded, dv_rows)
                            careful_rows(grads_at, lo, hi, n, ld, q_at, width, padded, dk_rows)
                            careful_columns(grads_at, lo, hi, n, ld, k_at, k_step, k_next, width, dq_t_at)
                        else:
                            gemm(
                                gemm_at, hi - lo, value_padded, lanes, s_used, ld, 1, g_at, value_padded,
                                dv_rows, value_padded, 1,
                            )  # fmt: skip
                            gemm(gemm_at, hi - lo, padded, lanes, g_used, ld, 1, q_at, padded, dk_rows, padded, 1)
                            gemm(gemm_at, width, lanes, hi - lo, k_at, k_next, k_step, g_used, ld, dq_t_at, ld, 1)
            if sizes[P.dq] != 0:
                write_query_grads(params, b, h, q0, n, lanes, dq_t_at, q_at)
    if tile[T.error] != 0:
        next_task(params + 8 * P.errors)
