"""maths.py for the simulator: the same functions of NumPy's numbers."""
from __future__ import annotations

import numpy as np
from numpy import ceil, exp, exp2, expm1, floor, fmod, int64, log, log1p, log2, sqrt, tanh, trunc  # noqa: F401
from numpy import floor_divide as float_floor_div  # noqa: F401
from numpy import remainder as float_remainder  # noqa: F401
from numpy import rint as round_even  # noqa: F401


def sign(x):
    """1, -1, or 0, also of NaN."""
    return type(x)(int(x > 0) - int(x < 0))


def floor_div(a, b):
    """Floor division; by 0 it is 0, where PyTorch raises."""
    return int64(0) if b == 0 else int64(a) // int64(b)


def trunc_div(a, b):
    quotient = floor_div(a, b)
    return quotient + 1 if quotient < 0 and quotient * b != a else quotient


def remainder(a, b):
    return int64(a) - floor_div(a, b) * int64(b)


def int_fmod(a, b):
    return int64(a) - trunc_div(a, b) * int64(b)


def to_int(x):
    return int64(x) if np.isfinite(x) else int64(np.iinfo(np.int64).min)
