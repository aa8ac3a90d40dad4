"""What is taken as never changing: Python's, PyTorch's and flexref's own code, and what they give without asking any state."""

from __future__ import annotations

import builtins
import collections
import enum
import functools
import operator
import sys
import types
from functools import lru_cache
from typing import Any, Generic, Protocol

import numpy as np
import torch

# code of these packages is not walked; the state of their objects is
_PACKAGES = frozenset({"torch", "flexref", "collections", "_collections_abc", "abc", "enum", "typing", "numbers"})
# Python's classes that add nothing but methods to what their contents say
BUILTIN_BASES = frozenset(
    {object, int, float, complex, str, bytes, tuple, list, dict, set, frozenset, Generic, Protocol}
    | {collections.OrderedDict, collections.defaultdict, collections.deque}
)
_SAFE = """abs all any bool complex dict divmod enumerate filter float frozenset getattr hasattr int isinstance issubclass iter
len list map max min next object pow property range repr reversed round set slice sorted staticmethod classmethod str sum super
tuple zip print bytes format callable ArithmeticError AssertionError AttributeError Exception IndexError KeyError LookupError
NotImplemented NotImplementedError OverflowError RuntimeError StopIteration TypeError ValueError ZeroDivisionError""".split()
SAFE_BUILTINS = {id(x): name for name in _SAFE for x in (vars(builtins)[name],)}
TEXT_BUILTINS = frozenset({id(str), id(repr), id(format)})
_PURE_MODULES = frozenset({"math", "cmath", "_operator", "operator"})
_STATEFUL = ("get_", "set_", "are_", "rand", "manual_", "seed", "initial_seed", "use_", "default", "normal", "bernoulli", "empty")
_TESTS = frozenset({"is_tensor", "is_floating_point", "is_complex", "is_nonzero", "is_same_size", "is_signed"})
_FIELD = type(collections.namedtuple("_Pair", "first second").first)  # type: ignore[attr-defined]
_PURE_TYPES = (types.MethodDescriptorType, types.WrapperDescriptorType, types.GetSetDescriptorType)
_PURE_TYPES += (types.ClassMethodDescriptorType,)


def package_of(module: Any) -> str:
    """`torch` of "torch.nn.functional", and of nothing that only begins like it."""
    return module.partition(".")[0] if isinstance(module, str) else ""


def is_steady_module(module: object) -> bool:
    """Whether code was written in a package that is taken as it is."""
    return package_of(module) in _PACKAGES


@lru_cache(maxsize=4096)
def is_steady_class(cls: type) -> bool:
    """Whether a class is one that such a package has under its own name."""
    module = sys.modules.get(cls.__module__) if is_steady_module(cls.__module__) else None
    return module is not None and vars(module).get(cls.__qualname__) is cls


def is_steady_builtin(x: Any) -> bool:
    """Whether a function written in C always gives the same for the same arguments, its own `__self__` being no state."""
    if isinstance(x, _PURE_TYPES):
        owner = x.__objclass__
        return owner in BUILTIN_BASES or package_of(owner.__module__) == "torch"
    if isinstance(x, (np.ufunc, _FIELD)):
        return True
    if type(x) is types.BuiltinFunctionType and x.__name__ == "__new__":
        return x.__self__ in BUILTIN_BASES
    if type(x) is not types.BuiltinFunctionType or not (x.__self__ is None or isinstance(x.__self__, types.ModuleType)):
        return False
    if package_of(x.__module__) == "torch":
        return _asks_no_state(x.__name__)
    return x.__module__ in _PURE_MODULES or x is functools.reduce


def is_steady_function(fn: types.FunctionType) -> bool:
    """Whether the code of a Python function is PyTorch's, flexref's or Python's own; what it closes over is not meant."""
    return is_steady_module(fn.__globals__.get("__name__")) and _asks_no_state(fn.__name__)


def _asks_no_state(name: str) -> bool:
    return name in _TESTS or not name.startswith((*_STATEFUL, "is_"))


@lru_cache(maxsize=4096)
def is_python_class(cls: type) -> bool:
    """Whether a class was written in Python, so that an object of it is its attributes and nothing else."""
    hidden = (types.MethodDescriptorType, types.WrapperDescriptorType, types.BuiltinFunctionType, types.ClassMethodDescriptorType)
    members = vars(cls)
    if not cls.__flags__ & (1 << 9):
        return False
    slots = any(isinstance(x, types.GetSetDescriptorType) and n not in ("__dict__", "__weakref__") for n, x in members.items())
    foreign = any(isinstance(x, hidden) and n not in ("__new__", "_new_member_") for n, x in members.items())
    return not slots and not foreign


def is_plain_metaclass(kind: type) -> bool:
    """Whether classes made by it look attributes up as `type` does."""
    return kind is type or kind in (enum.EnumMeta, torch.nn.Parameter.__class__) or (
        kind.__module__ in ("abc", "typing") and kind.__getattribute__ is type.__getattribute__
    )


GETTERS = (operator.attrgetter, operator.itemgetter, operator.methodcaller)
