"""Functions that a loop over lanes can use and still be vectorised: polynomials and bit patterns, no library calls.

Each takes and gives float32 or float64, is accurate to a few units in the last place, and lets nan through.
`exp2_small` is for softmax: it gives exactly 0 below the smallest normal power of two.
"""
from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import float32, float64, int32, int64, njit, types
from numba.extending import intrinsic

from flexref.backends.numba_cpu.kernels.machine import bits, from_bits

helper = njit(nogil=True, error_model="numpy", fastmath={"contract"}, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def _polynomial(*coefficients: float):
    """An intrinsic for c0 + c1 x + c2 x^2 + ..., as a chain of fused multiply-adds in the type of x."""

    def evaluate(typingctx, x):
        def codegen(context, builder, signature, args):
            kind = context.get_value_type(x)
            fma = builder.module.declare_intrinsic("llvm.fma", [kind])
            result = ir.Constant(kind, _rounded(coefficients[-1], x))
            for c in coefficients[-2::-1]:
                result = builder.call(fma, [result, args[0], ir.Constant(kind, _rounded(c, x))])
            return result

        return x(x), codegen

    return intrinsic(evaluate)


def _rounded(value: float, kind) -> float:
    """A constant that this type can hold exactly, as LLVM demands."""
    return np.float32(value).item() if kind == types.float32 else value


_exp2_float32 = _polynomial(
    1.0, 0.6931471880262288, 0.24022650760568126, 0.05550357114219078, 0.009618082557277852,
    0.0013390863364671234, 0.0001545316294512069,
)  # fmt: skip
_exp2_float64 = _polynomial(
    1.0, 0.6931471805599453, 0.24022650695910072, 0.055504108664821625, 0.00961812910762848,
    0.001333355814640647, 0.00015403530393370734, 1.5252733841556773e-05, 1.3215486808705563e-06,
    1.0178057087733941e-07, 7.0548973041554995e-09, 4.4558179083360645e-10, 2.5729324177362305e-11,
)  # fmt: skip


@helper
def exp2_small_float32(x):
    """2^x for x <= 0. Adding 1.5 * 2^23 rounds x to a whole number and leaves that number in the low bits."""
    shifted = x + float32(12582912.0)
    power = from_bits((bits(shifted) << int32(23)) + int32(0x3F800000))
    value = _exp2_float32(x - (shifted - float32(12582912.0))) * power
    return float32(0) if x < float32(-126) else value


@helper
def exp2_small_float64(x):
    """2^x for x <= 0, the same with 52 bits."""
    shifted = x + float64(6755399441055744.0)
    power = from_bits((bits(shifted) << int64(52)) + int64(0x3FF0000000000000))
    value = _exp2_float64(x - (shifted - float64(6755399441055744.0))) * power
    return float64(0) if x < float64(-1022) else value
