"""What is taken as never changing: Python's, PyTorch's and flexref's own code, and what they give without asking any state."""

from __future__ import annotations

import abc
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

# classes of these packages are not walked; the state of their objects is
_PACKAGES = frozenset({"torch", "flexref", "collections", "_collections_abc", "abc", "enum", "typing", "numbers"})
# functions of these modules, and of those inside them, give the same for the same arguments and state of objects
_MODULES = """flexref collections _collections_abc enum torch.functional torch.nn torch.autograd.grad_mode torch._tensor
torch._jit_internal torch._linalg_utils torch.return_types torch.utils._contextlib""".split()
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
_PURE_MODULES = frozenset({"math", "cmath", "_operator", "operator"})
# what is written in C for torch.*: functions of tensors, but for those whose names begin like these
_OF_TENSORS = frozenset({None, *(getattr(torch._C, name) for name in ("_nn", "_special", "_linalg", "_fft"))})
_STATEFUL = ("_", "is_", "get_", "set_", "rand", "normal", "bernoulli", "poisson", "multinomial", "binomial", "empty")
_STATEFUL += ("from_file", "cudnn_is", "initial_seed")
_TESTS = frozenset({"is_tensor", "is_floating_point", "is_complex", "is_nonzero", "is_same_size", "is_signed", "typename"})
_FIELD = type(collections.namedtuple("_Pair", "first second").first)  # type: ignore[attr-defined]
_PURE_TYPES = (types.MethodDescriptorType, types.WrapperDescriptorType, types.GetSetDescriptorType)
_PURE_TYPES += (types.ClassMethodDescriptorType,)
# PyTorch's classes whose objects are what their key says: methods of them ask nothing else
VALUES = (torch._C.TensorBase, torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.finfo, torch.iinfo)
_METACLASSES = frozenset({type, abc.ABCMeta, enum.EnumMeta, type(Protocol), type(torch.nn.Parameter), type(torch.nn.Buffer)})


def package_of(module: Any) -> str:
    """`torch` of "torch.nn.functional", and of nothing that only begins like it."""
    return module.partition(".")[0] if isinstance(module, str) else ""


def own_module(scope: dict) -> str:
    """The name of the module that these globals are; "" of globals that only say so."""
    name = scope.get("__name__")
    # collections.abc shows a module that calls itself so
    module = sys.modules.get("_collections_abc" if name == "collections.abc" else name) if type(name) is str else None
    # torch.backends stands in for a module, which it calls m
    held = getattr(module, "__dict__", {})
    return name if held is scope or getattr(held.get("m"), "__dict__", None) is scope else ""  # type: ignore[return-value]


@lru_cache(maxsize=4096)
def is_steady_class(cls: type) -> bool:
    """Whether a class is one that such a package has under its own name."""
    module = sys.modules.get(cls.__module__) if package_of(cls.__module__) in _PACKAGES else None
    return module is not None and vars(module).get(cls.__qualname__) is cls


def is_steady_builtin(x: Any) -> bool:
    """Whether a function written in C always gives the same for the same arguments, its own `__self__` being no state."""
    if isinstance(x, _PURE_TYPES):
        return x.__objclass__ in BUILTIN_BASES or issubclass(x.__objclass__, VALUES)
    if isinstance(x, np.ufunc):
        # one of np.frompyfunc is a function of the user
        return getattr(np, x.__name__, None) is x
    if isinstance(x, _FIELD):
        return True
    if type(x) is not types.BuiltinFunctionType:
        return False
    if x.__name__ == "__new__":
        return x.__self__ in BUILTIN_BASES
    if x.__module__ in _PURE_MODULES or x is functools.reduce:
        return True
    return is_function_of_tensors(x)


def is_function_of_tensors(x: types.BuiltinFunctionType) -> bool:
    """Whether a function written in C is one of PyTorch's of tensors, and not one that asks or sets what PyTorch is set to."""
    if package_of(x.__module__) != "torch" or not (x.__self__ is None or isinstance(x.__self__, types.ModuleType)):
        return False
    return x.__self__ in _OF_TENSORS and (x.__name__ in _TESTS or not x.__name__.startswith(_STATEFUL))


def is_steady_function(fn: types.FunctionType) -> bool:
    """Whether the code of a Python function is PyTorch's, flexref's or Python's own; what it closes over is not meant."""
    return is_steady_code(own_module(fn.__globals__), fn.__code__)


def is_steady_code(module: str, code: types.CodeType) -> bool:
    """Whether code of a module (own_module) gives what it gives by arguments and objects alone."""
    return is_steady_module(module) or module == "torch" and code.co_name in _TESTS


@lru_cache(maxsize=4096)
def is_steady_module(name: str) -> bool:
    """Whether what code of this module gives is a matter of arguments and objects alone."""
    return any(name == known or name.startswith(f"{known}.") for known in _MODULES)


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
    return kind in _METACLASSES


GETTERS = (operator.attrgetter, operator.itemgetter, operator.methodcaller)
