"""From PyTorch's pointwise operators to the program's own: one row an operator.

A row gets the Builder and the operator's arguments, Refs or Python numbers, and returns a Ref. What has no row
is not pointwise, or not known; trace.py turns that into an error with the user's line.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from flexref.program.builder import Builder, Ref, type_of

Row = Callable[..., Ref]


def _same(name: str) -> Row:
    return lambda g, *args, **_: g.op(name, *args)


def _bitwise(logical: str, bitwise: str) -> Row:
    def row(g: Builder, *args, **_):
        return g.op(logical if all(g.type(a) == "bool" for a in args) else bitwise, *args)

    return row


def _identity(g: Builder, x, *_, **__) -> Ref:
    return x if isinstance(x, Ref) else Ref(g.const(x))


def _convert(g: Builder, x, dtype=None, **_) -> Ref:
    return _identity(g, x) if dtype is None else Ref(g.cast(x, type_of(dtype)))


def _full(g: Builder, _shape, value, dtype=None, **_) -> Ref:
    return _convert(g, value, dtype)


def _filled_like(value: int) -> Row:
    def row(g: Builder, x, dtype=None, **_):
        return Ref(g.const(value, type_of(dtype) if dtype else g.type(x)))

    return row


def _add(sign: str) -> Row:
    def row(g: Builder, a, b, alpha=1, **_):
        return g.op(sign, a, b if alpha == 1 else g.op("mul", b, alpha))

    return row


def _div(g: Builder, a, b, rounding_mode=None, **_) -> Ref:
    return g.op({None: "div", "floor": "floor_div", "trunc": "trunc_div"}[rounding_mode], a, b)


def _mul(g: Builder, a, b, **_) -> Ref:
    both_bool = g.type(a) == g.type(b) == "bool"
    return g.op("and" if both_bool else "mul", a, b)


def _pow(g: Builder, a, b, **_) -> Ref:
    if not isinstance(b, (int, float)) or b not in (1, 2, 3, 4):
        return g.op("pow", a, b)
    product = _identity(g, a)
    for _ in range(int(b) - 1):
        product = g.op("mul", product, a)
    return product


def _clamp(g: Builder, x, low=None, high=None, **_) -> Ref:
    """By selection, so that the derivative at a bound is 1, as PyTorch's is; maximum would share it out."""
    x = x if low is None else g.op("where", g.op("lt", x, low), low, x)
    return _identity(g, x if high is None else g.op("where", g.op("gt", x, high), high, x))


def _hardtanh(g: Builder, x, low=-1, high=1, **_) -> Ref:
    """A clamp whose derivative at a bound is 0."""
    x = g.op("where", g.op("le", x, low), low, x)
    return g.op("where", g.op("ge", x, high), high, x)


def _relu(g: Builder, x, **_) -> Ref:
    return g.op("where", g.op("le", x, 0), 0, x)


def _silu(g: Builder, x, **_) -> Ref:
    return g.op("mul", x, g.op("sigmoid", x))


def _gelu(g: Builder, x, approximate="none", **_) -> Ref:
    half = g.op("mul", x, 0.5)
    if approximate == "tanh":
        cube = g.op("mul", g.op("mul", x, x), x)
        inner = g.op("mul", g.op("add", x, g.op("mul", cube, 0.044715)), math.sqrt(2 / math.pi))
        return g.op("mul", half, g.op("add", g.op("tanh", inner), 1.0))
    return g.op("mul", half, g.op("add", g.op("erf", g.op("mul", x, math.sqrt(0.5))), 1.0))


def _leaky_relu(g: Builder, x, slope=0.01, **_) -> Ref:
    return g.op("where", g.op("gt", x, 0), x, g.op("mul", x, slope))


def _elu(g: Builder, x, alpha=1.0, scale=1.0, input_scale=1.0, **_) -> Ref:
    low = g.op("mul", g.op("expm1", g.op("mul", x, input_scale)), alpha * scale)
    return g.op("where", g.op("gt", x, 0), g.op("mul", x, scale), low)


def _reciprocal(g: Builder, x, **_) -> Ref:
    return g.op("div", 1.0, x)


def _log10(g: Builder, x, **_) -> Ref:
    return g.op("mul", g.op("log", x), 1 / math.log(10.0))


def _erfc(g: Builder, x, **_) -> Ref:
    return g.op("sub", 1.0, g.op("erf", x))


def _if_float(name: str) -> Row:
    """Rounding an int leaves it as it is."""
    return lambda g, x, **_: g.op(name, x) if g.type(x) == "float" else _identity(g, x)


def _unary_test(name: str) -> Row:
    return lambda g, x, **_: g.op(name, g.op("add", x, 0.0) if g.type(x) != "float" else x)


_SAME = [
    "neg",
    "abs",
    "minimum",
    "maximum",
    "remainder",
    "fmod",
    "atan2",
    "sqrt",
    "rsqrt",
    "exp",
    "exp2",
    "expm1",
    "log",
    "log2",
    "log1p",
    "sin",
    "cos",
    "tan",
    "asin",
    "acos",
    "atan",
    "sinh",
    "cosh",
    "tanh",
    "asinh",
    "acosh",
    "atanh",
    "sigmoid",
    "erf",
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
    "where",
]

LOWERING: dict[str, Row] = {
    **{name: _same(name) for name in _SAME},
    "sgn": _same("sign"),
    "sign": _same("sign"),
    "floor": _if_float("floor"),
    "ceil": _if_float("ceil"),
    "trunc": _if_float("trunc"),
    "round": _if_float("round"),
    "isnan": _unary_test("isnan"),
    "isinf": _unary_test("isinf"),
    "add": _add("add"),
    "sub": _add("sub"),
    "rsub": lambda g, a, b, alpha=1, **_: _add("sub")(g, b, a, alpha),
    "mul": _mul,
    "div": _div,
    "true_divide": _div,
    "pow": _pow,
    "reciprocal": _reciprocal,
    "floor_divide": lambda g, a, b, **_: g.op("floor_div", a, b),
    "logical_and": _same("and"),
    "logical_or": _same("or"),
    "logical_xor": _same("xor"),
    "logical_not": _same("not"),
    "bitwise_and": _bitwise("and", "bit_and"),
    "bitwise_or": _bitwise("or", "bit_or"),
    "bitwise_xor": _bitwise("xor", "bit_xor"),
    "bitwise_not": _bitwise("not", "bit_not"),
    "bitwise_left_shift": _same("shift_left"),
    "bitwise_right_shift": _same("shift_right"),
    "__lshift__": _same("shift_left"),
    "__rshift__": _same("shift_right"),
    "clamp": _clamp,
    "clamp_min": lambda g, x, low, **_: _clamp(g, x, low),
    "clamp_max": lambda g, x, high, **_: _clamp(g, x, None, high),
    "hardtanh": _hardtanh,
    "relu": _relu,
    "silu": _silu,
    "gelu": _gelu,
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "log10": _log10,
    "erfc": _erfc,
    "detach": _if_float("detach"),
    "_to_copy": _convert,
    "to": _convert,
    "convert_element_type": _convert,
    "scalar_tensor": _convert,
    "full": _full,
    "full_like": lambda g, x, value, dtype=None, **_: Ref(g.cast(value, type_of(dtype) if dtype else g.type(x))),
    "new_full": lambda g, _x, _s, value, dtype=None, **__: _convert(g, value, dtype),
    "new_zeros": lambda g, x, _s, dtype=None, **__: _filled_like(0)(g, x, dtype),
    "new_ones": lambda g, x, _s, dtype=None, **__: _filled_like(1)(g, x, dtype),
    "masked_fill": lambda g, x, mask, value, **_: g.op("where", mask, value, x),
    "zeros_like": _filled_like(0),
    "ones_like": _filled_like(1),
    "zeros": lambda g, _s, dtype=None, **__: _full(g, (), 0.0, dtype),
    "ones": lambda g, _s, dtype=None, **__: _full(g, (), 1.0, dtype),
    **dict.fromkeys(
        [
            "clone",
            "alias",
            "lift_fresh_copy",
            "lift_fresh",
            "view",
            "_unsafe_view",
            "expand",
            "squeeze",
            "unsqueeze",
            "reshape",
            "contiguous",
            "positive",
            "real",
            "permute",
        ],
        _identity,
    ),
}


def operator_name(target) -> str:
    """`add` of aten.add.Tensor; the name under which LOWERING knows an operator."""
    packet = getattr(target, "overloadpacket", target)
    name = getattr(packet, "__name__", str(packet))
    return "true_divide" if name == "truediv" else name


INVALID_DTYPES = frozenset({torch.complex64, torch.complex128, torch.uint8, torch.int8, torch.int16})
