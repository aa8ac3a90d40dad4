"""What a function reaches from outside: the tensors and numbers that it captures, and a key that says when they changed.

Tracing costs milliseconds, so a mod is traced once for each key. The key holds all that tracing could see: code,
captured numbers by value, captured tensors by dtype, shape and device. The tensors themselves are fetched anew each call,
so a factory that is called again with another tensor needs no new trace.
"""

from __future__ import annotations

import inspect
import struct
import types
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

_PLAIN = (str, bytes, type(None), torch.dtype, torch.device, torch.layout, type(Ellipsis), complex)
_STEADY_MODULES = (
    "torch",
    "math",
    "numpy",
    "flexref",
    "builtins",
    "functools",
    "operator",
    "collections",
    "typing",
)


class Leaves:
    """The tensors and numbers reached from a function, in a fixed order, and the key."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.numbers: tuple[int | float, ...] = ()
        self.key: tuple = ()
        self.cacheable = True


def leaves_of(fn: Callable) -> Leaves:
    """Walk what `fn` reaches: closure, defaults, the globals that it names, attributes that it names, bound objects."""
    walk = _Walk()
    key = walk.visit(fn, frozenset())
    walk.leaves.key = (key,)
    walk.leaves.numbers = tuple(walk.numbers)
    return walk.leaves


class _Walk:
    def __init__(self) -> None:
        self.leaves = Leaves()
        self.numbers: list[int | float] = []
        self.seen: dict[int, int] = {}

    def visit(self, x: Any, names: frozenset[str]) -> Any:
        """The part of the key that `x` gives; `names` are the attributes that the code around it names."""
        kind = type(x)
        if kind is int or kind is float or kind is bool:
            if kind is not bool:
                self.numbers.append(x)
            return (kind, struct.pack("<d", x) if kind is float else x)
        if isinstance(x, _PLAIN):
            return x
        if id(x) in self.seen:
            return ("seen", self.seen[id(x)])
        self.seen[id(x)] = len(self.seen)
        if isinstance(x, Tensor):
            self.leaves.tensors.append(x)
            return (x.dtype, x.shape, x.device, x.requires_grad)
        if isinstance(x, types.FunctionType):
            return self.function(x)
        if isinstance(x, types.MethodType):
            return (
                "method",
                self.visit(x.__func__, names),
                self.visit(x.__self__, names | _names(x.__func__)),
            )
        if isinstance(x, partial):
            return (
                "partial",
                self.visit(x.func, names),
                self.visit(x.args, names),
                self.visit(x.keywords, names),
            )
        if isinstance(x, (tuple, list)):
            return (kind, *(self.visit(i, names) for i in x))
        if isinstance(x, dict):
            return (dict, *((self.visit(k, names), self.visit(v, names)) for k, v in x.items()))
        return self.other(x, names)

    def function(self, fn: types.FunctionType):
        code, names = fn.__code__, _names(fn)
        reached: list[Any] = [code]
        for cell in fn.__closure__ or ():
            try:
                reached.append(self.visit(cell.cell_contents, names))
            except ValueError:
                reached.append("empty")
        reached.append(self.visit(fn.__defaults__, names))
        reached.append(self.visit(fn.__kwdefaults__, names))
        scope = fn.__globals__
        reached += [self.visit(scope[name], names) for name in sorted(names) if name in scope]
        return tuple(reached)

    def other(self, x: Any, names: frozenset[str]):
        """Modules, classes and objects: by what the code around them names."""
        if isinstance(x, types.ModuleType):
            if x.__name__.partition(".")[0] in _STEADY_MODULES:
                return x.__name__
            return (x.__name__, *(self.visit(vars(x)[n], names) for n in sorted(names) if n in vars(x)))
        if isinstance(x, (types.BuiltinFunctionType, types.BuiltinMethodType)) or type(x).__module__ == "torch._ops":
            return ("builtin", id(x))
        if isinstance(x, type):
            held = [vars(x)[n] for n in sorted(names) if n in vars(x) and not x.__module__.startswith("torch")]
            return (x, *(self.visit(i, names) for i in held))
        return self.object(x, names)

    def object(self, x: Any, names: frozenset[str]):
        call = inspect.getattr_static(type(x), "__call__", None)
        if isinstance(call, types.FunctionType):
            names = names | _names(call)
        state = getattr(x, "__dict__", None)
        if state is None or type(x).__module__.partition(".")[0] == "numpy":
            # nothing tells when such an object changes, so its mod is traced at each call
            self.leaves.cacheable = False
            return None
        parts: list = [type(x), self.visit(call, names) if isinstance(call, types.FunctionType) else None]
        for holder in (state, state.get("_parameters"), state.get("_buffers"), state.get("_modules")):
            parts += [(n, self.visit(holder[n], names)) for n in sorted(names) if holder and n in holder]
        parts += [self.visit(member, names) for member in _members(type(x), names)]
        return tuple(parts)


def _members(cls: type, names: frozenset[str]) -> list:
    """The functions, properties and plain class attributes that the code names."""
    found = []
    for name in sorted(names):
        for base in cls.__mro__:
            if name in vars(base) and not base.__module__.startswith("torch"):
                member = vars(base)[name]
                found.append(member.fget if isinstance(member, property) else getattr(member, "__func__", member))
                break
    return found


def _names(fn: types.FunctionType) -> frozenset[str]:
    return _code_names(fn.__code__)


@cache
def _code_names(code: types.CodeType) -> frozenset[str]:
    """Globals and attributes that the code, or a function written inside it, names."""
    inner = [_code_names(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return frozenset(code.co_names).union(*inner)
