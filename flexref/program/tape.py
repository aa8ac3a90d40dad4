"""Records PyTorch operators into a Builder: what trace.py and derive.py share.

A Value is a 0-d tensor without storage that stands for a node. PyTorch does the rest as for any tensor (type promotion,
autograd, composite functions), and each operator that arrives at the bottom becomes nodes. This needs no fake mode of
PyTorch's, whose import alone takes more than a second.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flexref.program.builder import Builder, Ref, type_of
from flexref.program.lowering import INVALID_DTYPES, LOWERING, operator_name, stays_small

# PyTorch's functions and methods whose arguments, where all are positional, are those of the row of LOWERING.
# trace.py applies these itself: the first operator that PyTorch dispatches to Python costs half a second of imports.
_PLAIN = """abs acos acosh add asin asinh atan atan2 atanh bitwise_and bitwise_left_shift bitwise_not bitwise_or
bitwise_right_shift bitwise_xor ceil clamp clone cos cosh detach div eq erf erfc exp exp2 expm1 floor floor_divide fmod ge gt
isinf isnan le log log10 log1p log2 logical_and logical_not logical_or logical_xor lt maximum minimum mul ne neg positive pow
reciprocal relu remainder round rsqrt sgn sigmoid sign sin sinh sqrt sub tan tanh true_divide trunc where""".split()
_SPELLINGS = {
    "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "invert": "bitwise_not", "mod": "remainder",
    "truediv": "div", "floordiv": "floor_divide", "lshift": "bitwise_left_shift", "rshift": "bitwise_right_shift", "neg": "neg",
    "pos": "positive", "absolute": "abs", "multiply": "mul", "subtract": "sub", "divide": "div", "negative": "neg",
    "clip": "clamp", "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne", "fix": "trunc",
}  # fmt: skip
_CONVERSIONS = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16,
                "long": torch.int64, "int": torch.int32, "bool": torch.bool}  # fmt: skip
_KEYWORDS = frozenset({"rounding_mode", "alpha"})


def plain_call(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value | None:
    """The Value of a call that needs no dispatch; None if it needs one, or stands for nothing in _PLAIN."""
    name = getattr(func, "__name__", "")
    reflected = False
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        reflected = name.startswith("r") and name[1:] in _REFLECTED
        name = name[1:] if reflected else name
    if name in _CONVERSIONS and len(args) == 1 and not kwargs:
        return _converted(args[0], _CONVERSIONS[name])
    if name == "to" and len(args) == 2 and isinstance(args[-1], torch.dtype) and not kwargs:
        return _converted(args[0], args[-1])
    name = _SPELLINGS.get(name, name)
    if name not in _PLAIN or not kwargs.keys() <= _KEYWORDS:
        return None
    if reflected:
        return apply(name, lambda a, b: func(b, a), tuple(reversed(args)), kwargs)
    return apply(name, func, args, kwargs)


_REFLECTED = frozenset(
    {"add", "sub", "mul", "truediv", "div", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"}
)


def _converted(x: Value, dtype: torch.dtype) -> Value:
    if dtype in INVALID_DTYPES:
        raise NotPointwise("to", f"it gives {dtype}; use bool, int32, int64 or a float type")
    return Value(x.builder, Ref(x.builder.cast(x.ref, type_of(dtype))), dtype)


class NotPointwise(Exception):
    """An operator that has no row in LOWERING, or whose result is no plain number."""

    def __init__(self, operator: str, why: str = ""):
        super().__init__(operator)
        self.operator, self.why = operator, why


class Value(Tensor):
    """A 0-d tensor that stands for the node `ref` of `builder`."""

    ref: Ref
    builder: Builder

    @staticmethod
    def __new__(cls, builder: Builder, ref: Ref, dtype: torch.dtype):
        return Tensor._make_wrapper_subclass(cls, (), dtype=dtype, device="cpu")  # type: ignore[attr-defined]

    def __init__(self, builder: Builder, ref: Ref, dtype: torch.dtype):
        self.builder, self.ref = builder, ref

    def __repr__(self):
        return f"<a traced {type_of(self.dtype)}>"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operator_name(func)
        in_place = name.endswith("_") and name[:-1] in LOWERING
        name = name[:-1] if in_place else name
        if name not in LOWERING:
            if func not in _decompositions():
                raise NotPointwise(name)
            try:
                return _decompositions()[func](*args, **kwargs)
            except NotPointwise as inner:
                # what the mod wrote, not what PyTorch makes of it
                raise NotPointwise(name, inner.why) from None
        value = apply(name, func, args, kwargs)
        if in_place:
            # only autograd's own formulas come here, also to write a Value into a constant, as in `1 - x`;
            # a mod that changes a tensor was refused by trace.py
            args[0].ref = value.ref
            return args[0]
        return value


def apply(name: str, func: Callable, args: tuple, kwargs: dict) -> Value:
    """The Value of one operator: its row of LOWERING says what it means, PyTorch says what dtype it gives."""
    builder = next(x.builder for x in flatten((args, tuple(kwargs.values()))) if isinstance(x, Value))
    example = func(*map_leaves(args, _example), **{k: _example(v) for k, v in kwargs.items()})
    dtype = _result_dtype(name, example, args)
    row_args = map_leaves(args, _row_argument)
    ref = LOWERING[name](builder, *row_args, **{k: _row_argument(v) for k, v in kwargs.items()})
    return Value(builder, Ref(builder.cast(ref, type_of(dtype))), dtype)


@cache
def _decompositions() -> dict:
    from torch._decomp import decomposition_table

    return decomposition_table


def _result_dtype(name: str, result, args: tuple) -> torch.dtype:
    if not isinstance(result, Tensor) or result.dim() > 0:
        shape = tuple(result.shape) if isinstance(result, Tensor) else "more than one"
        raise NotPointwise(name, f"it gives a tensor of shape {shape}")
    if result.dtype in INVALID_DTYPES and not stays_small(name, result.dtype, args):
        raise NotPointwise(name, f"it gives {result.dtype}; use bool, int32, int64 or a float type")
    return result.dtype


def _example(x):
    """A real number in place of a Value: PyTorch then says what dtype the operator gives."""
    if isinstance(x, Value):
        return torch.ones((), dtype=x.dtype, device="cpu")
    return x.clone() if isinstance(x, Tensor) else x


def _row_argument(x):
    """What a row of LOWERING is given for an operator's argument: a Ref for a tensor, other things as they are."""
    if isinstance(x, Value) or hasattr(x, "ref"):
        return x.ref
    if isinstance(x, Tensor):
        if x.dim() > 0:
            raise NotPointwise("a tensor with dimensions", f"of shape {tuple(x.shape)}, made inside the mod")
        return x.item()
    return x


def returned(builder: Builder, x, type: str) -> int:
    """The node of a function's result, cast to `type`."""
    return builder.cast(_row_argument(x), type)


def flatten(x):
    """The leaves of nested tuples and lists."""
    if isinstance(x, (tuple, list)):
        for item in x:
            yield from flatten(item)
    else:
        yield x


def map_leaves(x, function):
    """`function` on the leaves of nested tuples and lists."""
    return type(x)(map_leaves(i, function) for i in x) if type(x) in (tuple, list) else function(x)
