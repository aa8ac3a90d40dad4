"""Mods that are objects, so that what is made of mods still prints, compares, pickles and moves between devices."""
from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor


class CallableMod:
    """Base of mods that are objects: what identifies one is its type and its attributes."""

    @property
    def __name__(self) -> str:
        return repr(self)

    def __repr__(self) -> str:
        held = vars(self).items()
        return f"{type(self).__name__}({', '.join(f'{k}={_printed(v)}' for k, v in held if v is not None)})"

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return type(self) is type(other) and same_mod(tuple(vars(self).values()), tuple(vars(other).values()))

    def __hash__(self) -> int:
        return hash((type(self), *(v for v in vars(self).values() if isinstance(v, (int, float, str)))))

    def to(self, device: torch.device | str) -> CallableMod:
        """The same mod with every tensor that it holds on `device`."""
        copy = object.__new__(type(self))
        vars(copy).update({k: moved(v, device) for k, v in vars(self).items()})
        return copy


def name_of(mod: object) -> str:
    """What to call a mod in a message."""
    return str(getattr(mod, "__name__", None) or repr(mod))


def same_mod(a: object, b: object) -> bool:
    """Whether two mods, or what they hold, are the same: identical, equal by value, or one function imported twice."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.device == b.device and torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same_mod, a, b))
    if isinstance(a, types.FunctionType) and isinstance(b, types.FunctionType):
        return _same_function(a, b)
    return type(a) is type(b) and bool(a == b)


def _same_function(a: types.FunctionType, b: types.FunctionType) -> bool:
    names = (a.__module__, a.__qualname__) == (b.__module__, b.__qualname__)
    bound = any(f.__closure__ or f.__defaults__ or f.__kwdefaults__ for f in (a, b))
    return names and not bound and a.__code__ == b.__code__ and a.__globals__ is b.__globals__


def moved(value, device: torch.device | str) -> Any:
    """`value` with every tensor in it on `device`: a tensor, a mod, a tuple of them, or a function by its closure."""
    if isinstance(value, (Tensor, CallableMod)):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(moved(v, device) for v in value)
    if isinstance(value, types.FunctionType) and value.__closure__:
        return _moved_function(value, device)
    return value


def _moved_function(fn: types.FunctionType, device: torch.device | str) -> types.FunctionType:
    try:
        held = [cell.cell_contents for cell in fn.__closure__ or ()]
    except ValueError:  # a cell not filled yet
        return fn
    new = held if any(x is fn for x in held) else [moved(x, device) for x in held]
    if all(x is y for x, y in zip(held, new, strict=True)):
        return fn
    cells = tuple(types.CellType(x) for x in new)
    copy = types.FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, cells)
    copy.__kwdefaults__, copy.__qualname__, copy.__module__ = fn.__kwdefaults__, fn.__qualname__, fn.__module__
    return copy


def _printed(value: object) -> str:
    if isinstance(value, Tensor):
        return f"<{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}>" if value.dim() else f"{value.item()}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_printed, value))})"
    return name_of(value) if callable(value) else repr(value)
