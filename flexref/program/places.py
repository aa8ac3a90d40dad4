"""Where a user's code is: the file and line of a mod, the statement that is running, the name of a tensor in it."""

from __future__ import annotations

import functools
import linecache
import os
import sys
from collections.abc import Callable
from types import CodeType

import torch
from torch import Tensor

from flexref.program.mod_objects import attribute

NAMELESS = "captured tensor"
_OURS = os.path.dirname(os.path.abspath(__file__))
_TORCH = os.path.dirname(os.path.abspath(str(torch.__file__)))


def trace_lines(error: Exception) -> list[str]:
    lines, frame = [], error.__traceback__
    while frame is not None:
        path = frame.tb_frame.f_code.co_filename
        if _is_users(path):
            lines.append(_place(path, frame.tb_lineno))
        frame = frame.tb_next
    return lines


def label(fn: Callable) -> str:
    """The name that a user gave the mod."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return f"`{attribute(fn, '__name__', type(fn).__name__)}`"


def definition(fn: Callable) -> str:
    """file:line of the mod's definition."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    code = code_of(fn)
    return _place(code.co_filename, code.co_firstlineno) if code else "an unknown place"


def code_of(fn: Callable) -> CodeType | None:
    """The code of a function, or of an object's __call__; None for what is not written in Python."""
    code = attribute(fn, "__code__") or attribute(vars(type(fn)).get("__call__"), "__code__")
    return code if isinstance(code, CodeType) else None


def user_line(fn: Callable) -> str:
    """file:line, and the text, of the user's statement that is running now."""
    frame = sys._getframe(1)
    while frame is not None:
        if _is_users(frame.f_code.co_filename):
            return _place(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return definition(fn)


def _is_users(path: str) -> bool:
    return not (path.startswith((_OURS + os.sep, _TORCH + os.sep)) or path.startswith("<frozen"))


def _place(path: str, line: int) -> str:
    text = linecache.getline(path, line).strip()
    text = text if len(text) <= 80 else text[:77] + "..."
    return f"{path}:{line}" + (f" `{text}`" if text else "")


def name_of(tensor: Tensor, fn: Callable) -> str:
    """The variable that holds `tensor`, in the statement that is running or in the mod's closure."""
    frame = sys._getframe(1)
    while frame is not None:
        if _is_users(frame.f_code.co_filename):
            for name, value in [*frame.f_locals.items(), *frame.f_globals.items()]:
                if value is tensor:
                    return name
                inner = _held_name(value, tensor) if name == "self" else None
                if inner:
                    return f"self.{inner}"
            break
        frame = frame.f_back
    return NAMELESS


def _held_name(holder: object, tensor: Tensor) -> str | None:
    """The attribute of an object, or the parameter or buffer of a module, that is `tensor`."""
    state = attribute(holder, "__dict__", {})
    for held in (state, state.get("_parameters"), state.get("_buffers")):
        for name, value in (held or {}).items():
            if value is tensor:
                return name
    return None
