"""One tile of a mask_mod: which positions are allowed, and the range of kv rows that has any.

Writes T.live (kv, q) for all rows, then narrows T.lo and T.hi to the rows with an allowed position and counts those
positions in T.allowed: a driver multiplies no row that nobody looks at.
"""
from __future__ import annotations

import math

from numba import float32, float64, int8, int16, int32, int64, uint8

from flexref.backends.numba_cpu.kernels import maths
from flexref.backends.numba_cpu.kernels.layout import P, T
from flexref.backends.numba_cpu.kernels.machine import pointer, read_bfloat16, read_float16, select, smaller

real, INDEX = float32, int32
# hole: types
INF, NAN = real(math.inf), real(math.nan)


def mask_tile(params, tile_at):
    sizes, tile = pointer(params, int64), pointer(tile_at, int64)
    captured, floats, ints = (
        pointer(sizes[P.captured], int64), pointer(sizes[P.floats], float64), pointer(sizes[P.ints], int64),
    )  # fmt: skip
    live, ld, n, rows = pointer(tile[T.live], uint8), tile[T.ld], tile[T.n], tile[T.hi]
    b, h, q0, kv0 = tile[T.b], tile[T.h], tile[T.q0], tile[T.kv0]
    # hole: captured
    first, last, total, wrong = rows, int64(0), int64(0), int32(0)
    for j in range(rows):
        kv_at = kv0 + j
        kv_idx = INDEX(kv_at)
        count = int32(0)
        for i in range(n):
            q_at = q0 + i
            q_idx = INDEX(q_at)
            concerned = True
            # hole: mask_mod
            allowed = uint8(mask)
            live[j * ld + i] = allowed
            count += int32(allowed)
        total += count
        first = smaller(first, j) if count != 0 else first
        last = j + 1 if count != 0 else last
    tile[T.lo] = first
    tile[T.hi] = last
    tile[T.allowed] = total
    if wrong != 0:
        tile[T.error] = 1
