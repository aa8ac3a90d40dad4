"""A torch.autograd.Function that a mod calls: a program would not know its backward, so the call is seen and refused."""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.autograd import Function

# until torch 2.13 it is written in Python, and then in C
_APPLY = getattr(getattr(Function.apply, "__func__", None), "__code__", None)


@contextmanager
def refused(error: Callable[[], Exception]) -> Iterator[None]:
    """Within it, whoever applies a Function gets `error()`.

    A Function may do nothing that PyTorch tells a mode of (it may return its argument), so Python is asked for every call.
    """

    def watch(frame: Any, event: str, called: Any) -> None:
        if event == "call":
            applies = frame.f_code is _APPLY
        elif event == "c_call" and called.__name__ == "apply":
            owner = called.__self__
            applies = isinstance(owner, type) and issubclass(owner, Function)
        else:
            return
        if applies:
            raise error()

    before: Any = sys.getprofile()
    resume = _resumption(before)
    if resume is None:
        yield
        return
    sys.setprofile(watch)
    try:
        yield
    finally:
        resume()


def _resumption(profiler: Any) -> Callable[[], Any] | None:
    """What makes a profiler that is at work go on afterwards; None for one that nobody but itself can start."""
    if profiler is None or callable(profiler):
        return lambda: sys.setprofile(profiler)
    # cProfile before Python 3.12
    return getattr(profiler, "enable", None)
