"""machine.py for Numba's simulator: a warp is LANES threads, and what its lanes do together goes through a table.

The matrix instructions are exact models of the PTX manual's: each lane holds only its own fragment, so a wrong layout shows.
"""
from __future__ import annotations

import math as _math
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy import float32, float64, int32, int64, uint8, uint16  # noqa: F401

zero_bits = uint16(0)
unsigned = int
math = SimpleNamespace(
    inf=_math.inf, nan=_math.nan, exp=np.exp, log=np.log, sqrt=np.sqrt, tanh=np.tanh, fmod=np.fmod,
    sin=np.sin, cos=np.cos, tan=np.tan, asin=np.arcsin, acos=np.arccos, atan=np.arctan, atan2=np.arctan2,
    sinh=np.sinh, cosh=np.cosh, asinh=np.arcsinh, acosh=np.arccosh, atanh=np.arctanh,
    hypot=np.hypot, copysign=np.copysign, erf=lambda x: type(x)(_math.erf(x)), erfc=lambda x: type(x)(_math.erfc(x)),
    lgamma=lambda x: type(x)(_math.inf if x <= 0 and x == np.floor(x) else _math.lgamma(x)),
)  # fmt: skip


def device(function):
    """A function that kernels call."""
    return function


def array_of(kind):
    """The type of a shared array's elements."""
    return np.dtype(kind)


def kernel(function):
    return function


def select(condition, yes, no):
    return yes if condition else no


def maximum(x, y):
    """The greater number; if one is nan, the other."""
    return x if x > y or y != y else y


def exp2_float32(x):
    """2^x; 0 where that would be subnormal."""
    return np.exp2(x) if not x < -126 else float32(0)


exp2_float64 = np.exp2


def minus_float32(a, b):
    """a - b; NumPy rounds every product that may be in `a`."""
    return a - b


minus_float64 = minus_float32


def _warp(value) -> tuple[list, int]:
    """What every lane of the warp gave to the same call, and which lane this is."""
    me: Any = threading.current_thread()
    first = me.thread_id // me.lanes * me.lanes
    me.table[me.thread_id] = value
    me.wait("warp")
    found = me.table[first : first + me.lanes]
    me.wait("warp")
    return found, me.thread_id - first


def shuffle_xor(x, mask):
    values, lane = _warp(x)
    return values[lane ^ mask]


def shuffle(x, lane):
    return _warp(x)[0][int(lane)]


def sync_warp():
    me: Any = threading.current_thread()
    me.wait("warp")


def ldmatrix(tile, at, further):
    """Lane l gets, of each 8 x 8 matrix, the elements 2 (l % 4) and the next of row l // 4."""
    places, lane = _warp(int(at) + further)
    rows = [tile[places[8 * m + lane // 4] :][:8] for m in range(4)]
    return tuple(_register(row[lane % 4 * 2], row[lane % 4 * 2 + 1]) for row in rows)


def ldmatrix_down(tile, at, further):
    """The same of the transposed matrices."""
    places, lane = _warp(int(at) + further)
    pairs = [[tile[places[8 * m + lane % 4 * 2 + i] + lane // 4] for i in range(2)] for m in range(4)]
    return tuple(_register(*pair) for pair in pairs)


def _register(low, high) -> int:
    return int(low) | int(high) << 16


def _mma(c0, c1, c2, c3, a0, a1, a2, a3, b0, b1, read):
    warp, lane = _warp((a0, a1, a2, a3, b0, b1))
    a, b = np.zeros((16, 16), float64), np.zeros((16, 8), float64)
    for number, (*left, right0, right1) in enumerate(warp):
        group, pair = number // 4, number % 4 * 2
        for register, word in enumerate(left):
            for half in range(2):
                a[group + register % 2 * 8, pair + register // 2 * 8 + half] = read(uint16(word >> 16 * half & 0xFFFF))
        for register, word in enumerate((right0, right1)):
            for half in range(2):
                b[pair + register * 8 + half, group] = read(uint16(word >> 16 * half & 0xFFFF))
    d = a @ b
    group, pair = lane // 4, lane % 4 * 2
    places = ((group, pair), (group, pair + 1), (group + 8, pair), (group + 8, pair + 1))
    return tuple(float32(c + d[place]) for c, place in zip((c0, c1, c2, c3), places, strict=True))


def mma_float16(*registers):
    return _mma(*registers, read=from_float16)


def mma_bfloat16(*registers):
    return _mma(*registers, read=from_bfloat16)


def copy16(tile, at, source, start, inside):
    for i in range(8):
        tile[at + i] = source[start + i] if inside else zero_bits


def wait_copies():
    pass


def from_float16(x):
    return float32(x.view(np.float16))


def from_bfloat16(x):
    return np.uint32(int(x) << 16).view(float32)


def to_float16(x):
    return np.float16(x).view(uint16)


def to_bfloat16(x):
    """Round to nearest even; nan stays nan."""
    whole = int(float32(x).view(np.uint32))
    return uint16(0x7FC0) if x != x else uint16(whole + 0x7FFF + (whole >> 16 & 1) >> 16)


def pack_float16(low, high):
    return _register(to_float16(low), to_float16(high))


def pack_bfloat16(low, high):
    return _register(to_bfloat16(low), to_bfloat16(high))
