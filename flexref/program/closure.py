"""What a function reaches from outside: the tensors and numbers that it captures, and a key that says when they changed.

Tracing costs milliseconds, so a program is kept, but only if everything that the mod can reach was understood completely.
The key then holds all that tracing could see: code, state of objects and numbers by value, tensors by dtype, shape and
device. Whatever is not understood, or too large to be looked at in each call, is told in `why`, and the mod is traced at
each call. The tensors are fetched anew each call, so a factory that is called again with another tensor needs no new trace.
"""

from __future__ import annotations

import gc
import operator
import struct
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from functools import WRAPPER_ASSIGNMENTS, cached_property, partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._device import DeviceContext

from flexref.program import steady
from flexref.program.code_reads import leads_out, literals_of, reads_of
from flexref.program.object_state import NotUnderstood, ObjectState
from flexref.program.places import code_of

# a mod that reaches more is quicker traced than looked at
_MOST_OBJECTS, _DEEPEST = 2000, 60
_CONSTANTS = frozenset(
    {bytes, type(None), type(Ellipsis), type(NotImplemented)}
    | {torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size}
)
_ITEMS = frozenset({tuple, list, set, frozenset})
_TENSORS = frozenset({Tensor, torch.nn.Parameter, torch.nn.Buffer})


def _first(items: Iterable) -> list:
    # one more than is looked at, which items() refuses
    return list(islice(items, _MOST_OBJECTS + 1))


def _added(x: Any) -> dict:
    # attributes beside those that Python gives it
    return {name: held for name, held in vars(x).items() if name not in _GIVEN}


_GIVEN = frozenset((*WRAPPER_ASSIGNMENTS, "__wrapped__", "__annotate__", "func", "attrname", "lock"))
# what each of these is made of, and nothing else
_PARTS: dict[type, Callable[[Any], tuple]] = {
    slice: lambda x: (x.start, x.stop, x.step),
    range: lambda x: (x.start, x.stop, x.step),
    deque: lambda x: (_first(x), x.maxlen),
    OrderedDict: lambda x: (_first(x.items()), vars(x)),
    defaultdict: lambda x: (_first(x.items()), x.default_factory),
    # a mapping that it shows, which may be of a class of one's own
    types.MappingProxyType: lambda x: tuple(gc.get_referents(x)),
    types.MethodType: lambda x: (x.__func__, x.__self__),
    partial: lambda x: (x.func, x.args, x.keywords, vars(x)),
    property: lambda x: (x.fget, x.fset, x.fdel),
    staticmethod: lambda x: (x.__func__, _added(x)),
    classmethod: lambda x: (x.__func__, _added(x)),
    cached_property: lambda x: (x.func, _added(x)),
    operator.attrgetter: lambda x: x.__reduce__()[1],
    operator.itemgetter: lambda x: x.__reduce__()[1],
    operator.methodcaller: lambda x: _called_with(*x.__reduce__()),
}


class Leaves:
    """The tensors and numbers reached from a function, in a fixed order, and the key.

    `why`: None if all of it was understood; else what was not, and then `literals` are the numbers written in the mod's code.
    `codes`: the code of the functions that were walked.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.numbers: list[int | float] = []
        self.codes: list[types.CodeType] = []
        self.literals: frozenset = frozenset()
        self.key: tuple = ()
        self.why: str | None = None


def leaves_of(fn: Callable) -> Leaves:
    """Walk all that `fn` can reach: closure, defaults, globals that its code names, and the whole state of objects."""
    walk = _Walk()
    try:
        # a number that the mod makes a tensor of is rounded to the default dtype
        walk.leaves.key = walk.visit(fn, 0), torch.get_default_dtype(), _modes()
    except NotUnderstood as what:
        walk.leaves.why = str(what)
        code = code_of(fn)
        walk.leaves.literals = frozenset() if code is None else literals_of(code)
    return walk.leaves


def _modes() -> tuple:
    """The default device, which is a mode that PyTorch asks at each operation; another mode may do anything."""
    count = torch._C._len_torch_function_stack()
    if torch._C._len_torch_dispatch_stack():
        raise NotUnderstood("a TorchDispatchMode stands between it and PyTorch")
    modes = [torch._C._get_function_stack_at(i) for i in range(count)] if count else []
    for mode in modes:
        if type(mode) is not DeviceContext:
            raise NotUnderstood(f"{type(mode).__name__} stands between it and PyTorch")
    return tuple([mode.device for mode in modes])


def _called_with(made_by: Any, args: tuple) -> tuple:
    # with keywords it is made by a partial that holds them and the name
    return (args, *((made_by.args, made_by.keywords) if type(made_by) is partial else ()))


class _Walk(ObjectState):
    def __init__(self) -> None:
        super().__init__()
        self.leaves = Leaves()
        self.seen: dict[int, int] = {}
        # what is made on the way must not leave its id to something else
        self.alive: list[Any] = []

    def visit(self, x: Any, depth: int) -> Any:
        """The part of the key that `x` gives. Raises NotUnderstood."""
        kind = type(x)
        if kind is int or kind is float:
            self.leaves.numbers.append(x)
            return kind, struct.pack("<d", x) if kind is float else x
        if kind is str:
            if "_" in x and leads_out(x):
                raise NotUnderstood(f"it reaches the text {x!r}, which names what is not looked at")
            return kind, x
        if kind is bool or kind in _CONSTANTS:
            return kind, x
        if kind is complex:
            return kind, struct.pack("<dd", x.real, x.imag)
        if id(x) in self.seen:
            return "seen", self.seen[id(x)]
        self.seen[id(x)] = len(self.seen)
        self.alive.append(x)
        if len(self.seen) > _MOST_OBJECTS or depth > _DEEPEST:
            raise NotUnderstood("it reaches too many objects to look at each")
        return self.looked_at(x, kind, depth + 1)

    def looked_at(self, x: Any, kind: type, depth: int) -> Any:
        if kind in _TENSORS:
            return self.tensor(x, depth)
        if kind is types.FunctionType:
            return self.function(x, depth)
        if kind in _ITEMS:
            return self.items(x, depth)
        if kind is dict:
            return self.mapping(x, depth)
        if kind in _PARTS:
            return kind, *[self.visit(part, depth) for part in _PARTS[kind](x)]
        if kind is types.SimpleNamespace:
            return kind, self.named(vars(x), depth)
        if issubclass(kind, (np.number, np.bool_)) and kind.__module__ == "numpy" and not issubclass(kind, np.timedelta64):
            return kind, x.tobytes()
        if isinstance(x, type):
            return self.cls(x, depth, as_value=True)
        if kind is types.ModuleType:
            raise NotUnderstood(f"the module {x.__name__} is used as a value")
        if steady.is_steady_builtin(x):
            return "builtin", x
        if id(x) in steady.SAFE_BUILTINS:
            return "builtin", steady.SAFE_BUILTINS[id(x)]
        if kind is types.BuiltinFunctionType and not isinstance(x.__self__, (types.ModuleType, type, type(None))):
            return "bound", x.__name__, self.visit(x.__self__, depth)
        return self.object(x, kind, depth)

    def tensor(self, x: Tensor, depth: int) -> tuple:
        if x.is_nested:
            raise NotUnderstood("it reaches a nested tensor")
        self.leaves.tensors.append(x)
        state = self.named(vars(x), depth) if vars(x) else None
        steps = x.stride() if x.layout is torch.strided else None
        return type(x), x.dtype, x.shape, x.device, x.layout, steps, x.requires_grad, x.is_leaf, state

    def items(self, x: Any, depth: int) -> tuple:
        if len(x) > _MOST_OBJECTS:
            raise NotUnderstood(f"it reaches a {type(x).__name__} of {len(x)} items")
        return type(x), *[self.visit(item, depth) for item in x]

    def mapping(self, x: Any, depth: int) -> tuple:
        if len(x) > _MOST_OBJECTS:
            raise NotUnderstood(f"it reaches a {type(x).__name__} of {len(x)} items")
        return type(x), *[(self.visit(k, depth), self.visit(v, depth)) for k, v in x.items()]

    def function(self, fn: types.FunctionType, depth: int) -> tuple:
        # its name is in its text
        parts: list[Any] = [fn.__code__, fn.__qualname__]
        if not steady.is_steady_function(fn):
            self.leaves.codes.append(fn.__code__)
            parts += self.looked_up(fn, depth)
        elif steady.package_of(fn.__globals__.get("__name__")) == "torch" and fn.__closure__ is None and not vars(fn):
            return "steady", fn
        for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            parts.append(self.cell(fn, name, cell, depth))
        for held in (fn.__defaults__, fn.__kwdefaults__):
            parts.append(self.visit(held, depth) if held else None)
        parts.append(self.named(vars(fn), depth) if vars(fn) else None)
        return tuple(parts)

    def cell(self, fn: types.FunctionType, name: str, cell: types.CellType, depth: int) -> Any:
        try:
            held = cell.cell_contents
        except ValueError:
            return "empty"
        if isinstance(held, types.ModuleType):
            # what is read from it stands among the chains; of PyTorch's own code nothing is looked at
            steady_code = steady.is_steady_function(fn) or any(c[:2] == ("free", name) for c in reads_of(fn.__code__).chains)
            return held.__name__ if steady_code else self.visit(held, depth)
        # super() needs the class of the method, and makes no object of it
        return self.cls(held, depth, as_value=False) if name == "__class__" else self.visit(held, depth)

    def looked_up(self, fn: types.FunctionType, depth: int) -> list:
        """What the code of `fn` looks up by name: globals, and attributes of modules."""
        reads = reads_of(fn.__code__)
        if reads.hidden:
            raise NotUnderstood(f"the code of {fn.__name__} uses {reads.hidden}")
        scopes = fn.__globals__, fn.__builtins__
        if any(type(scope) is not dict for scope in scopes):
            raise NotUnderstood(f"the globals of {fn.__name__} are no plain dict")
        free = dict(zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True))
        parts: list[Any] = []
        for root, name, *attributes in reads.chains:
            if root == "free":
                cell = free.get(name)
                if cell is not None and cell != types.CellType() and isinstance(cell.cell_contents, types.ModuleType):
                    parts.append(self.attribute(cell.cell_contents, attributes, depth))
                continue
            scope = scopes[name not in scopes[0]]
            parts.append((name, self.attribute(scope[name], attributes, depth) if name in scope else "absent"))
        return parts

    def attribute(self, x: Any, attributes: list[str], depth: int) -> Any:
        """x.a.b as far as x, x.a ... are modules; an object is looked at whole."""
        for name in attributes:
            # of a class of its own, it may have properties
            if type(x) is not types.ModuleType:
                break
            if name not in vars(x):
                raise NotUnderstood(f"the module {x.__name__} makes {name} when it is asked")
            x = vars(x)[name]
        return self.visit(x, depth)
