"""The functions of a mod that `math` has not, or not with PyTorch's meaning, for float32 and float64 alike."""
from __future__ import annotations

import math

from llvmlite import ir
from numba import cuda
from numba.cuda import int64, types
from numba.cuda.extending import intrinsic

device = cuda.jit(device=True, forceinline=True)


def _rounded(direction: str):
    """An intrinsic for the whole number beside a float, in the float's own type."""

    def call(typingctx, x):
        def codegen(context, builder, signature, args):
            kind = context.get_value_type(x)
            name, letter = ("f32", "f") if x == types.float32 else ("f64", "d")
            text, constraint = f"cvt.{direction}.{name}.{name} $0, $1;", f"={letter},{letter}"
            return builder.call(ir.InlineAsm(ir.FunctionType(kind, [kind]), text, constraint, side_effect=False), args)

        return x(x), codegen

    return intrinsic(call)


floor, ceil, trunc, round_even = (_rounded(direction) for direction in ("rmi", "rpi", "rzi", "rni"))


@device
def sqrt(x):
    return math.sqrt(x)


@device
def exp(x):
    return math.exp(x)


@device
def exp2(x):
    return math.exp2(x)


@device
def expm1(x):
    return math.expm1(x)


@device
def log(x):
    return math.log(x)


@device
def log2(x):
    return math.log2(x)


@device
def log1p(x):
    return math.log1p(x)


@device
def tanh(x):
    return math.tanh(x)


@device
def fmod(x, y):
    return math.fmod(x, y)


@device
def sign(x):
    return math.copysign(type(x)(1), x) if abs(x) > 0 else type(x)(0)


@device
def float_floor_div(x, y):
    """PyTorch's floor division goes by the remainder: x / y may already be rounded to the next whole number."""
    one, zero = type(x)(1), type(x)(0)
    rest = math.fmod(x, y)
    quotient = (x - rest) / y
    quotient = quotient - one if rest != zero and (rest < zero) != (y < zero) else quotient
    below = floor(quotient)
    below = below + one if quotient - below > type(x)(0.5) else below
    return type(x)(x / y) if y == zero else type(x)(below)


@device
def float_remainder(x, y):
    """PyTorch's remainder: it has the sign of the divisor."""
    rest = math.fmod(x, y)
    return rest + y if rest != 0 and (rest < 0) != (y < 0) else rest


@device
def floor_div(a, b):
    """Floor division; by 0 it is 0, where PyTorch raises."""
    d = int64(1) if b == 0 else int64(b)
    return int64(0) if b == 0 else int64(a) // d


@device
def trunc_div(a, b):
    quotient = floor_div(a, b)
    return quotient + 1 if quotient < 0 and quotient * b != a else quotient


@device
def remainder(a, b):
    return int64(a) - floor_div(a, b) * int64(b)


@device
def int_fmod(a, b):
    return int64(a) - trunc_div(a, b) * int64(b)


@device
def to_int(x):
    return int64(x)
