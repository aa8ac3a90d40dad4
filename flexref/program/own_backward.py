"""A torch.autograd.Function that a mod calls: a program would not know its backward, so the call is seen and refused."""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

from torch.autograd import Function

from flexref.program.watch import resumption

# until torch 2.13 it is written in Python, and tells a mode of itself; from 2.14 on it is written in C
_APPLY = getattr(getattr(Function.apply, "__func__", None), "__code__", None)


def refuse_around(error: Callable[[], Exception], tracer: CodeType) -> None:
    """Raise `error()` in a call that a Function made, between `tracer`, the code that called the mod, and here.

    One further out, such as a checkpoint around the whole call, is the caller's own.
    """
    frame = sys._getframe(1) if _APPLY is not None else None
    while frame is not None and frame.f_code is not tracer:
        if frame.f_code is _APPLY:
            raise error()
        frame = frame.f_back


@contextmanager
def refused(error: Callable[[], Exception]) -> Iterator[None]:
    """Within it, whoever applies a Function that is written in C gets `error()`.

    It may do nothing that PyTorch tells a mode of (return its argument), so Python is asked for every call that is made.
    """

    def watch(frame: Any, event: str, called: Any) -> None:
        if event == "c_call" and called.__name__ == "apply":
            owner = called.__self__
            if isinstance(owner, type) and issubclass(owner, Function):
                raise error()

    before: Any = sys.getprofile()
    resume = resumption(before) if _APPLY is None else None
    if resume is None:
        yield
        return
    sys.setprofile(watch)
    try:
        yield
    finally:
        resume()

