"""From PyTorch's pointwise operators to the program's own: one row an operator.

A row gets the Builder and the operator's arguments, Refs or Python numbers, and returns a Ref. What has no row
is not pointwise, or not known; trace.py turns that into an error with the user's line.
"""

from __future__ import annotations

import torch

from flexref.program.activations import ACTIVATIONS, clamp
from flexref.program.builder import Builder, Ref, type_of
from flexref.program.special import SPECIAL
from flexref.program.terms import Row, formula


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
    """A power that PyTorch computes in another way, which differs at 0 and at -inf, is that other thing here too."""
    if not isinstance(b, (int, float)) or b not in _POWERS:
        return g.op("pow", a, b)
    return _POWERS[b](g, a)


def _product(count: int) -> Row:
    def row(g: Builder, a, **_):
        product = _identity(g, a)
        for _ in range(count - 1):
            product = g.op("mul", product, a)
        return product

    return row


def _reciprocal(g: Builder, x, **_) -> Ref:
    return g.op("div", 1.0, x)


_POWERS: dict[float, Row] = {
    **{n: _product(n) for n in (1, 2, 3, 4)},
    0.5: _same("sqrt"),
    -0.5: _same("rsqrt"),
    -1: _reciprocal,
    -2: lambda g, a, **_: g.op("div", 1.0, g.op("mul", a, a)),
}


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
    "erfc",
    "lgamma",
    "hypot",
    "copysign",
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
    **ACTIVATIONS,
    **SPECIAL,
    "sgn": _same("sign"),
    "sign": _same("sign"),
    "floor": _if_float("floor"),
    "ceil": _if_float("ceil"),
    "trunc": _if_float("trunc"),
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
    "clamp": formula(clamp),
    "clamp_min": formula(clamp),
    "clamp_max": formula(lambda x, high, **_: clamp(x, None, high)),
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
            "conj_physical",
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


# arithmetic in these could wrap, or rounds as a program does not
INVALID_DTYPES = frozenset(
    {torch.complex64, torch.complex128, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32, torch.uint64}
)
_NEVER_WRAPS = frozenset({"bitwise_and", "bitwise_or", "bitwise_xor", "minimum", "maximum"})


def stays_small(name: str, dtype: torch.dtype, args: tuple) -> bool:
    """Whether an operator on small integers gives the same in 64 bits as in theirs."""
    if name not in _NEVER_WRAPS or dtype.is_complex:
        return False
    limits = torch.iinfo(dtype)
    return all(limits.min <= x <= limits.max for x in args if isinstance(x, int))
