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
    """Walk what `fn` reaches: closure, defaults, the globals that it names, attributes that it names, bound objects.

    An object is looked at by every attribute name in all code that is reached, so a helper's `config.size` counts too;
    a walk that met code with other names is done once more with those.
    """
    names = _reached_names.get(_root(fn), frozenset())
    while True:
        walk = _Walk(names)
        key = walk.visit(fn)
        if walk.found <= names:
            break
        names = names | walk.found
        if len(_reached_names) > 4096:
            _reached_names.clear()
        _reached_names[_root(fn)] = names
    walk.leaves.key = (key,)
    walk.leaves.numbers = tuple(walk.numbers)
    # what these look up, nobody can see from outside
    if not names.isdisjoint(("getattr", "globals", "vars", "eval", "exec", "locals")):
        walk.leaves.cacheable = False
    return walk.leaves


_reached_names: dict[object, frozenset[str]] = {}


def _root(fn: Callable) -> object:
    return getattr(fn, "__code__", None) or type(fn)


class _Walk:
    """One walk, looking at objects by `names`; `found` are the names in the code that it met."""

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        self.found: set[str] = set()
        self.leaves = Leaves()
        self.numbers: list[int | float] = []
        self.seen: dict[int, int] = {}

    def visit(self, x: Any) -> Any:
        """The part of the key that `x` gives."""
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
            return ("method", self.visit(x.__func__), self.visit(x.__self__))
        if isinstance(x, partial):
            return ("partial", self.visit(x.func), self.visit(x.args), self.visit(x.keywords))
        if isinstance(x, (tuple, list)):
            return (kind, *(self.visit(i) for i in x))
        if isinstance(x, dict):
            return (dict, *((self.visit(k), self.visit(v)) for k, v in x.items()))
        return self.other(x)

    def function(self, fn: types.FunctionType):
        names = _code_names(fn.__code__)
        self.found |= names
        reached: list[Any] = [fn.__code__]
        for cell in fn.__closure__ or ():
            try:
                reached.append(self.visit(cell.cell_contents))
            except ValueError:
                reached.append("empty")
        reached.append(self.visit(fn.__defaults__))
        reached.append(self.visit(fn.__kwdefaults__))
        scope = fn.__globals__
        reached += [self.visit(scope[name]) for name in sorted(names) if name in scope]
        return tuple(reached)

    def other(self, x: Any):
        """Modules, classes and objects: by what the code names."""
        if isinstance(x, types.ModuleType):
            if x.__name__.partition(".")[0] in _STEADY_MODULES:
                return x.__name__
            return (x.__name__, *(self.visit(vars(x)[n]) for n in sorted(self.names) if n in vars(x)))
        if isinstance(x, (types.BuiltinFunctionType, types.BuiltinMethodType)) or type(x).__module__ == "torch._ops":
            return ("builtin", id(x))
        if isinstance(x, type):
            return (x, *(self.visit(member) for member in _members(x, self.names)))
        return self.object(x)

    def object(self, x: Any):
        call = inspect.getattr_static(type(x), "__call__", None)
        state = getattr(x, "__dict__", None)
        dynamic = hasattr(type(x), "__getattr__") and not isinstance(x, torch.nn.Module)
        if state is None or dynamic or type(x).__module__.partition(".")[0] == "numpy":
            # nothing tells when such an object changes, so its mod is traced at each call
            self.leaves.cacheable = False
            return None
        parts: list = [type(x), self.visit(call) if isinstance(call, types.FunctionType) else None]
        for holder in (state, state.get("_parameters"), state.get("_buffers"), state.get("_modules")):
            parts += [(n, self.visit(holder[n])) for n in sorted(self.names) if holder and n in holder]
        parts += [self.visit(member) for member in _members(type(x), self.names)]
        return tuple(parts)


def _members(cls: type, names: frozenset[str]) -> list:
    """The functions, properties and plain class attributes that the code names, also inherited ones."""
    found = []
    for name in sorted(names):
        for base in cls.__mro__:
            if name in vars(base) and not base.__module__.startswith("torch"):
                member = vars(base)[name]
                found.append(member.fget if isinstance(member, property) else getattr(member, "__func__", member))
                break
    return found


@cache
def _code_names(code: types.CodeType) -> frozenset[str]:
    """Globals and attributes that the code, or a function written inside it, names."""
    inner = [_code_names(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return frozenset(code.co_names).union(*inner)
