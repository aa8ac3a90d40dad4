"""The vocabulary of a program: every operation, its argument and result types, its meaning.

Three types are enough, because a program is pointwise and a backend chooses the width:
`bool`, `int` (64-bit meaning) and `float` (the accumulation type: float32, or float64 for float64 inputs).
Adding an operation adds a row here and a row in each emitter; a test names the one that is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

TYPES = ("bool", "int", "float")


class Op(NamedTuple):
    """`signature` has one letter an argument, then the result: f float, i int, b bool, n int or float (all the same)."""

    signature: str
    meaning: Callable[..., torch.Tensor]


def _floor_div(a, b):
    return torch.div(a, b, rounding_mode="floor")


def _trunc_div(a, b):
    return torch.div(a, b, rounding_mode="trunc")


OPS: dict[str, Op] = {
    "add": Op("nnn", torch.add),
    "sub": Op("nnn", torch.sub),
    "mul": Op("nnn", torch.mul),
    "neg": Op("nn", torch.neg),
    "abs": Op("nn", torch.abs),
    "sign": Op("nn", torch.sign),
    "minimum": Op("nnn", torch.minimum),
    "maximum": Op("nnn", torch.maximum),
    "floor_div": Op("nnn", _floor_div),
    "trunc_div": Op("nnn", _trunc_div),
    "remainder": Op("nnn", torch.remainder),
    "fmod": Op("nnn", torch.fmod),
    "div": Op("fff", torch.div),
    "pow": Op("fff", torch.pow),
    "atan2": Op("fff", torch.atan2),
    "hypot": Op("fff", torch.hypot),
    "copysign": Op("fff", torch.copysign),
    "sqrt": Op("ff", torch.sqrt),
    "rsqrt": Op("ff", torch.rsqrt),
    "exp": Op("ff", torch.exp),
    "exp2": Op("ff", torch.exp2),
    "expm1": Op("ff", torch.expm1),
    "log": Op("ff", torch.log),
    "log2": Op("ff", torch.log2),
    "log1p": Op("ff", torch.log1p),
    "sin": Op("ff", torch.sin),
    "cos": Op("ff", torch.cos),
    "tan": Op("ff", torch.tan),
    "asin": Op("ff", torch.asin),
    "acos": Op("ff", torch.acos),
    "atan": Op("ff", torch.atan),
    "sinh": Op("ff", torch.sinh),
    "cosh": Op("ff", torch.cosh),
    "tanh": Op("ff", torch.tanh),
    "asinh": Op("ff", torch.asinh),
    "acosh": Op("ff", torch.acosh),
    "atanh": Op("ff", torch.atanh),
    "sigmoid": Op("ff", torch.sigmoid),
    "erf": Op("ff", torch.erf),
    "erfc": Op("ff", torch.erfc),
    "lgamma": Op("ff", torch.lgamma),
    "floor": Op("ff", torch.floor),
    "ceil": Op("ff", torch.ceil),
    "trunc": Op("ff", torch.trunc),
    "round": Op("ff", torch.round),
    "lt": Op("nnb", torch.lt),
    "le": Op("nnb", torch.le),
    "gt": Op("nnb", torch.gt),
    "ge": Op("nnb", torch.ge),
    "eq": Op("nnb", torch.eq),
    "ne": Op("nnb", torch.ne),
    "isnan": Op("fb", torch.isnan),
    "isinf": Op("fb", torch.isinf),
    "and": Op("bbb", torch.logical_and),
    "or": Op("bbb", torch.logical_or),
    "xor": Op("bbb", torch.logical_xor),
    "not": Op("bb", torch.logical_not),
    "bit_and": Op("iii", torch.bitwise_and),
    "bit_or": Op("iii", torch.bitwise_or),
    "bit_xor": Op("iii", torch.bitwise_xor),
    "bit_not": Op("ii", torch.bitwise_not),
    "shift_left": Op("iii", torch.bitwise_left_shift),
    "shift_right": Op("iii", torch.bitwise_right_shift),
    "where": Op("bttt", torch.where),
    "int_to_float": Op("if", lambda a: a.to(torch.get_default_dtype())),
    "detach": Op("ff", torch.Tensor.detach),
    "float_to_int": Op("fi", lambda a: a.to(torch.int64)),
    "bool_to_int": Op("bi", lambda a: a.to(torch.int64)),
}
