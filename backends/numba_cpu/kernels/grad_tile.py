"""One tile of a score_mod and its derivative, for the backward driver.

Raw scores in T.scores become weights, d weights in T.grads become d raw scores; both are exactly 0 where a position is
masked. T.rows holds row_max, delta and log2(row_sum)
of each lane. Gradients of captured tensors are added to T.accumulators, in float64.
"""
from __future__ import annotations

import math

from numba import float32, float64, int8, int16, int32, int64, uint8

from flexref.backends.numba_cpu.kernels import maths
from flexref.backends.numba_cpu.kernels.layout import P, T
from flexref.backends.numba_cpu.kernels.machine import pointer, read_bfloat16, read_float16, select
from flexref.backends.numba_cpu.kernels.maths import exp2_small_float32 as exp2

real, INDEX = float32, int32
# hole: types
INF, NAN = real(math.inf), real(math.nan)
LOG2E = real(1.4426950408889634)


def grad_tile(params, tile_at):
    sizes, tile = pointer(params, int64), pointer(tile_at, int64)
    captured, floats, ints = (
        pointer(sizes[P.captured], int64), pointer(sizes[P.floats], float64), pointer(sizes[P.ints], int64),
    )  # fmt: skip
    scores, grads, rows = pointer(tile[T.scores], real), pointer(tile[T.grads], real), pointer(tile[T.rows], real)
    live, ld, n = pointer(tile[T.live], uint8), tile[T.ld], tile[T.n]
    b, h, q0, kv0, masked = tile[T.b], tile[T.h], tile[T.q0], tile[T.kv0], tile[T.masked]
    accumulators = pointer(tile[T.accumulators], float64)
    # hole: captured
    wrong = int32(0)
    for j in range(tile[T.lo], tile[T.hi]):
        kv_at = kv0 + j
        kv_idx = INDEX(kv_at)
        for i in range(n):
            q_at = q0 + i
            q_idx = INDEX(q_at)
            score = scores[j * ld + i]
            concerned = (masked == 0) | (live[j * ld + i] != 0)
            # hole: score_mod
            seen = concerned & (modified != -INF)
            weight = select(seen, exp2((real(modified) - rows[i]) * LOG2E - rows[2 * ld + i]), real(0))
            grad = select(seen, weight * (grads[j * ld + i] - rows[ld + i]), real(0))
            # hole: derivative
            scores[j * ld + i] = weight
            grads[j * ld + i] = select(seen, real(d_score), real(0))
            # hole: d_captured
    if wrong != 0:
        tile[T.error] = 1
