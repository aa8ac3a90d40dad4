"""Mods that are objects, so that what is made of mods still prints, compares, pickles and moves between devices."""
from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexref.interrupts import of_a_signal

# what functions carry beside their meaning, and functools.update_wrapper sets
LABELS = frozenset((*functools.WRAPPER_ASSIGNMENTS, "__wrapped__", "__annotations__", "__signature__"))


class CallableMod:
    """Base of mods that are objects: what identifies one is its type and its attributes.

    A name, docstring and so on may be set, as on a function: they are LABELS, which print and are no part of what it is.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("flexref."):
            # loading one runs no code: torch.load(weights_only=True) may
            torch.serialization.add_safe_globals([cls])

    @property
    def __name__(self) -> str:
        return vars(self).get("__name__") or repr(self)

    @__name__.setter
    def __name__(self, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(f"__name__ of a mod must be a str, as of a function, got {type(name).__name__}")
        vars(self)["__name__"] = name

    def __repr__(self) -> str:
        name = vars(self).get("__name__")
        return f"<{name}: {self._text()}>" if name else self._text()

    def _text(self) -> str:
        held = self._held().items()
        return f"{type(self).__name__}({', '.join(f'{k}={_printed(v)}' for k, v in held if v is not None)})"

    def _held(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in LABELS}

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return type(self) is type(other) and same_mod(self._held(), other._held())  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash((type(self), *(v for v in self._held().values() if isinstance(v, (int, float, str)))))

    def __getstate__(self) -> dict[str, Any]:
        # what it wraps may be a local function, which could not be pickled
        return {k: v for k, v in vars(self).items() if k != "__wrapped__"}

    def to(self, device: torch.device | str) -> CallableMod:
        """The same mod with every tensor that it holds on `device`."""
        copy = object.__new__(type(self))
        vars(copy).update({k: v if k in LABELS else moved(v, device) for k, v in vars(self).items()})
        return copy


def attribute(x: object, name: str, default: Any = None) -> Any:
    """An attribute that an object of anybody's may have, whose own __getattr__ may raise whatever it likes."""
    try:
        return getattr(x, name, default)
    except Exception as error:
        if of_a_signal(error):
            raise
        return default


def signature_of(fn: Callable, follow_wrapped: bool = False) -> inspect.Signature:
    """How `fn` is called. Raises TypeError or ValueError where nobody can tell."""
    try:
        return inspect.signature(fn, follow_wrapped=follow_wrapped)
    except (TypeError, ValueError):
        raise
    except Exception as error:
        if of_a_signal(error):
            raise
        raise ValueError(f"{type(fn).__name__} does not tell how it is called: {type(error).__name__}: {error}") from error


def name_of(mod: object) -> str:
    """What to call a mod in a message."""
    return str(attribute(mod, "__name__") or repr(mod))


def same_mod(a: object, b: object) -> bool:
    """Whether two mods, or what they hold, are the same: identical, equal by value, or one function imported twice."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.device == b.device and torch.equal(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and type(a) is type(b):
        return len(a) == len(b) and all(map(same_mod, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_mod(a[k], b[k]) for k in a)
    if isinstance(a, types.FunctionType) and isinstance(b, types.FunctionType):
        return _same_function(a, b)
    try:
        return type(a) is type(b) and bool(a == b)
    except (RuntimeError, TypeError, ValueError):  # an array, or what else does not compare to one bool
        return False


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
