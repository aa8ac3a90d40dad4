"""Functions that a loop over lanes can use and still be vectorised: polynomials and bit patterns, no library calls.

Each takes and gives float32 or float64, is accurate to a few units in the last place, and lets nan through.
`exp2_small` is for softmax: it gives exactly 0 below the smallest normal power of two.
"""
from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import float32, float64, int32, int64, types
from numba.extending import intrinsic

from flexref.backends.numba_cpu.kernels.helper import helper
from flexref.backends.numba_cpu.kernels.machine import bits, from_bits


def _polynomial(*coefficients: float):
    """An intrinsic for c0 + c1 x + c2 x^2 + ..., as a chain of fused multiply-adds in the type of x."""

    def evaluate(typingctx, x):
        def codegen(context, builder, signature, args):
            kind = context.get_value_type(x)
            result = ir.Constant(kind, _rounded(coefficients[-1], x))
            for c in coefficients[-2::-1]:
                result = builder.fma(result, args[0], ir.Constant(kind, _rounded(c, x)))
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
    power = from_bits(int32((bits(shifted) << int32(23)) + int32(0x3F800000)))
    value = _exp2_float32(x - (shifted - float32(12582912.0))) * power
    return float32(0) if x < float32(-126) else value


@helper
def exp2_small_float64(x):
    """2^x for x <= 0, the same with 52 bits."""
    shifted = x + float64(6755399441055744.0)
    power = from_bits((bits(shifted) << int64(52)) + int64(0x3FF0000000000000))
    value = _exp2_float64(x - (shifted - float64(6755399441055744.0))) * power
    return float64(0) if x < float64(-1022) else value


def _constant(single: float, double: float | None = None):
    """An intrinsic that gives a constant in the type of its argument."""

    def give(typingctx, x):
        def codegen(context, builder, signature, args):
            value = _rounded(single, x) if x == types.float32 else (single if double is None else double)
            return ir.Constant(context.get_value_type(x), value)

        return x(x), codegen

    return intrinsic(give)


def _llvm(name: str, count: int):
    """An intrinsic for an LLVM function of `count` arguments of one float type."""

    def call(typingctx, *kinds):
        def codegen(context, builder, signature, args):
            kind = context.get_value_type(kinds[0])
            function = builder.module.declare_intrinsic(f"llvm.{name}", [kind], ir.FunctionType(kind, [kind] * count))
            return builder.call(function, args)

        return kinds[0](*kinds), codegen

    if count == 1:
        return intrinsic(lambda typingctx, x: call(typingctx, x))
    if count == 2:
        return intrinsic(lambda typingctx, x, y: call(typingctx, x, y))
    return intrinsic(lambda typingctx, x, y, z: call(typingctx, x, y, z))


floor, ceil, trunc, round_even, sqrt = (_llvm(name, 1) for name in ("floor", "ceil", "trunc", "rint", "sqrt"))
_fma, _copysign = _llvm("fma", 3), _llvm("copysign", 2)
_zero, _one, _two, _half = _constant(0.0), _constant(1.0), _constant(2.0), _constant(0.5)
_log2e, _ln2_high = _constant(1.4426950408889634), _constant(0.693359375)
_ln2_low = _constant(-2.1219444005469057e-4)
_ln2 = _constant(0.6931471805599453)
_exp_low, _exp_high = _constant(-104.0, -746.0), _constant(89.0, 710.0)
_exp2_low, _exp2_high = _constant(-150.0, -1076.0), _constant(128.5, 1024.5)
_tanh_end = _constant(10.0, 20.0)
# exp(r) - 1 = r * (1 + r / 2 + r^2 / 6 + ...), to more terms than |r| <= ln(2) / 2 needs in each type
_expm1_series = _polynomial(*(1.0 / math.factorial(k + 1) for k in range(14)))


@intrinsic
def _power(typingctx, n):
    """2^n for a whole float n within the normal range."""

    def codegen(context, builder, signature, args):
        single = n == types.float32
        whole = ir.IntType(32 if single else 64)
        biased = builder.add(builder.fptosi(args[0], whole), ir.Constant(whole, 127 if single else 1023))
        shifted = builder.shl(biased, ir.Constant(whole, 23 if single else 52))
        return builder.bitcast(shifted, context.get_value_type(n))

    return n(n), codegen


@intrinsic
def fmod(typingctx, x, y):
    """The rest of a division that rounds to zero."""

    def codegen(context, builder, signature, args):
        return builder.frem(*args)

    return x(x, y), codegen


@helper
def _bounded(x, low, high):
    """x kept within bounds; nan stays nan."""
    x = low if x < low else x
    return high if x > high else x


@helper
def _scaled(x, n):
    """x * 2^n in two steps, so that neither overflows before the result does."""
    first = trunc(n * _half(n))
    return x * _power(first) * _power(n - first)


@helper
def exp(x):
    """e^x."""
    y = _bounded(x, _exp_low(x), _exp_high(x))
    n = round_even(y * _log2e(x))
    r = _fma(-n, _ln2_low(x), _fma(-n, _ln2_high(x), y))
    return _scaled(_one(x) + r * _expm1_series(r), n)


@helper
def exp2(x):
    """2^x."""
    y = _bounded(x, _exp2_low(x), _exp2_high(x))
    n = round_even(y)
    r = (y - n) * _ln2(x)
    return _scaled(_one(x) + r * _expm1_series(r), n)


@helper
def expm1(x):
    """e^x - 1, exact near 0."""
    y = _bounded(x, _exp_low(x), _exp_high(x))
    n = round_even(y * _log2e(x))
    r = _fma(-n, _ln2_low(x), _fma(-n, _ln2_high(x), y))
    small = r * _expm1_series(r)
    large = _scaled(small + _one(x), n) - _one(x)
    return small if n == _zero(x) else large


@helper
def tanh(x):
    """tanh x = e / (e + 2) with e = exp(2 |x|) - 1, and the sign of x."""
    y = _bounded(abs(x), _zero(x), _tanh_end(x))
    e = expm1(y + y)
    return _copysign(e / (e + _two(x)), x) if x == x else x


@helper
def log(x):
    return math.log(x)


@helper
def log2(x):
    return math.log2(x)


@helper
def log1p(x):
    return math.log1p(x)


@helper
def sign(x):
    return _copysign(_one(x), x) if abs(x) > _zero(x) else _zero(x)


@helper
def float_floor_div(x, y):
    """PyTorch's floor division goes by the remainder: x / y may already be rounded to the next whole number."""
    rest = fmod(x, y)
    quotient = (x - rest) / y
    quotient = quotient - _one(x) if rest != _zero(x) and (rest < _zero(x)) != (y < _zero(x)) else quotient
    below = floor(quotient)
    below = below + _one(x) if quotient - below > _one(x) / (_one(x) + _one(x)) else below
    return x / y if y == _zero(x) else below


@helper
def float_remainder(x, y):
    """PyTorch's remainder: it has the sign of the divisor."""
    rest = fmod(x, y)
    return rest + y if rest != _zero(rest) and (rest < _zero(rest)) != (y < _zero(y)) else rest


@helper
def floor_div(a, b):
    """Floor division; by 0 it is 0, where PyTorch raises."""
    d = int64(1) if b == 0 else int64(b)
    return int64(0) if b == 0 else int64(a) // d


@helper
def trunc_div(a, b):
    quotient = floor_div(a, b)
    return quotient + 1 if quotient < 0 and quotient * b != a else quotient


@helper
def remainder(a, b):
    return int64(a) - floor_div(a, b) * int64(b)


@helper
def int_fmod(a, b):
    return int64(a) - trunc_div(a, b) * int64(b)


@helper
def to_int(x):
    return int64(x)
