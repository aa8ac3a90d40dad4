"""What an object is: its class, by all members, and all that it holds, in attributes, slots and as a container."""

from __future__ import annotations

import enum
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexref.program import steady
from flexref.program.mod_objects import attribute

# of a class: data that speaks of the class itself, and that no code reads that is understood (code_reads.py)
_UNREAD = frozenset(
    """__doc__ __module__ __qualname__ __annotations__ __slots__ __dataclass_fields__ __dataclass_params__ __abstractmethods__
    _abc_impl __orig_bases__ __parameters__ __static_attributes__ __firstlineno__ __annotate__ __annotate_func__
    __annotations_cache__""".split()
)
# methods that a mod hardly ever runs: their code alone is in the key, and if one runs, watch.py sees code that was not walked
_MAKES = frozenset({"__init__", "__new__", "__post_init__"})
_SELDOM = frozenset(
    """__repr__ __str__ __format__ __init_subclass__ __set_name__ __class_getitem__ __reduce__ __reduce_ex__ __getstate__
    __setstate__ __getnewargs__ __getnewargs_ex__ __copy__ __deepcopy__ __replace__ __del__ __dir__ __sizeof__""".split()
)
# what a container or a number holds, past any method of a class of one's own
_CONTENTS: dict[type, Callable[[Any], Any]] = {
    dict: lambda x: list(dict.items(x)),
    list: lambda x: list(list.__iter__(x)),
    tuple: lambda x: list(tuple.__iter__(x)),
    set: lambda x: list(set.__iter__(x)),
    frozenset: lambda x: list(frozenset.__iter__(x)),
    int: int.__pos__,
    float: float.__pos__,
    complex: complex.__pos__,
    str: str.__str__,
    bytes: lambda x: b"".join((x,)),
    deque: lambda x: (list(deque.__iter__(x)), deque.maxlen.__get__(x)),  # type: ignore[attr-defined]
    OrderedDict: lambda x: list(OrderedDict.items(x)),
    defaultdict: lambda x: defaultdict.default_factory.__get__(x),  # type: ignore[attr-defined]
}


class NotUnderstood(Exception):
    """Something that may change unseen; its words say what."""


class ObjectState:
    """The half of closure.py's walk that looks at objects and classes."""

    def __init__(self) -> None:
        self.classes: dict[tuple[type, bool], int] = {}

    def visit(self, x: Any, depth: int) -> Any:
        """The part of the key that `x` gives. Raises NotUnderstood."""
        raise NotImplementedError

    def cls(self, cls: type, depth: int, as_value: bool) -> Any:
        """A class by its members and those of its bases; `as_value`: the code may make an object of it, too."""
        known = cls in steady.BUILTIN_BASES or id(cls) in steady.SAFE_BUILTINS
        if known or as_value and steady.is_steady_class(cls):
            return "class", cls
        if (cls, as_value) in self.classes:
            return "class", self.classes[cls, as_value]
        self.classes[cls, as_value] = len(self.classes)
        if not steady.is_plain_metaclass(type(cls)):
            raise NotUnderstood(f"the class {cls.__name__} has the metaclass {type(cls).__name__}")
        parts: list[Any] = [cls, cls.__name__, cls.__qualname__]
        for base in cls.__mro__:
            if base in steady.BUILTIN_BASES or base is enum.Enum:
                continue
            if not steady.is_python_class(base):
                raise NotUnderstood(f"the class {base.__name__} is not written in Python")
            if not steady.is_steady_class(base):
                parts += self.members(base, depth, as_value)
        return tuple(parts)

    def members(self, cls: type, depth: int, as_value: bool) -> list:
        seldom = _SELDOM if as_value else _SELDOM | _MAKES
        made_by_dataclass = "__dataclass_fields__" in vars(cls)
        parts = []
        for name, member in vars(cls).items():
            if isinstance(member, types.MemberDescriptorType) or name in _UNREAD:
                continue
            if name in ("__dict__", "__weakref__"):
                if not isinstance(member, types.GetSetDescriptorType):
                    raise NotUnderstood(f"the class {cls.__name__} has a {name} of its own")
                continue
            function = member.__func__ if type(member) in (staticmethod, classmethod) else member
            code = function.__code__ if type(function) is types.FunctionType else None
            # what a dataclass generates compares and prints
            generated = made_by_dataclass and code is not None and code.co_filename == "<string>" and name not in _MAKES
            # what a closure holds may be another for each method of one code
            alike = code is not None and set(code.co_freevars) <= {"__class__"}
            shallow = generated or name in seldom and (alike or made_by_dataclass)
            parts.append((name, code if shallow else self.visit(member, depth)))
        return parts

    def named(self, attributes: dict, depth: int) -> tuple:
        """Attributes by name; a name is no text that the mod could read an attribute by."""
        return tuple([(n if type(n) is str else self.visit(n, depth), self.visit(x, depth)) for n, x in attributes.items()])

    def object(self, x: Any, kind: type, depth: int) -> tuple:
        """An object of a class that was written in Python: its class, its attributes and slots, and what a container holds."""
        if isinstance(x, torch.nn.Module) and _hooked():
            raise NotUnderstood("PyTorch's global module hooks are in use")
        if not (isinstance(x, enum.Enum) or steady.is_python_class(kind)) or isinstance(x, Tensor):
            name = attribute(x, "__name__")
            label = f"`{name}`" if isinstance(name, str) else "an object"
            raise NotUnderstood(f"{label} of type {kind.__module__}.{kind.__qualname__} may change unseen")
        parts: list[Any] = [kind, self.cls(kind, depth, as_value=False)]
        try:
            parts.append(self.named(object.__getattribute__(x, "__dict__"), depth))
        except AttributeError:
            parts.append(None)
        for base in kind.__mro__:
            slots = [n for n, m in vars(base).items() if isinstance(m, types.MemberDescriptorType)]
            for name in slots:
                try:
                    parts.append((name, self.visit(vars(base)[name].__get__(x), depth)))
                except AttributeError:
                    parts.append((name, "absent"))
        for base, held in _CONTENTS.items():
            if issubclass(kind, base):
                parts.append(self.visit(held(x), depth))
        return tuple(parts)


def _hooked() -> bool:
    module = torch.nn.modules.module
    return any(vars(module)[n] for n in ("_global_forward_hooks", "_global_forward_pre_hooks") if n in vars(module))
