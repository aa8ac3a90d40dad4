"""One tile of a score_mod: every score of T.scores (kv, q), rows T.lo to T.hi, becomes what the mod makes of it."""
from __future__ import annotations

import math

from numba import float32, float64, int8, int16, int32, int64, uint8

from flexref.backends.numba_cpu.kernels import maths
from flexref.backends.numba_cpu.kernels.layout import P, T
from flexref.backends.numba_cpu.kernels.machine import pointer, read_bfloat16, read_float16, select

real, INDEX = float32, int32
# hole: types
INF, NAN = real(math.inf), real(math.nan)


def score_tile(params, tile_at):
    sizes, tile = pointer(params, int64), pointer(tile_at, int64)
    captured, floats, ints = (
        pointer(sizes[P.captured], int64), pointer(sizes[P.floats], float64), pointer(sizes[P.ints], int64),
    )  # fmt: skip
    scores, live, ld, n = pointer(tile[T.scores], real), pointer(tile[T.live], uint8), tile[T.ld], tile[T.n]
    b, h, q0, kv0, masked = tile[T.b], tile[T.h], tile[T.q0], tile[T.kv0], tile[T.masked]
    # hole: captured
    wrong = int32(0)
    for j in range(tile[T.lo], tile[T.hi]):
        kv_at = kv0 + j
        kv_idx = INDEX(kv_at)
        for i in range(n):
            q_at = q0 + i
            q_idx = INDEX(q_at)
            score = scores[j * ld + i]
            # hole: concerned
            # hole: score_mod
            scores[j * ld + i] = real(modified)
    if wrong != 0:
        tile[T.error] = 1
