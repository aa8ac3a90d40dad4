"""What a signal's handler raises is the caller's: whoever turns errors into words, or goes on after one, asks here first."""

from __future__ import annotations

import inspect
import signal
from itertools import pairwise
from types import CodeType, FrameType


def of_a_signal(error: BaseException | None) -> bool:
    """Whether `error`, or what it was raised from, came out of a Python signal handler and not out of what that interrupted."""
    handlers = _handlers()
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code in handlers or _handles(trace.tb_frame):
                return True
            trace = trace.tb_next
        error = error.__cause__
    return False


def _handles(frame: FrameType) -> bool:
    """Whether a frame's function was given a signal and the frame that it interrupted, as only a handler is: one may have
    uninstalled itself."""
    code = frame.f_code
    named = [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount]]
    rest = code.co_varnames[code.co_argcount + code.co_kwonlyargcount :][:1] if code.co_flags & inspect.CO_VARARGS else ()
    given = [*named, *(x for name in rest for x in frame.f_locals.get(name, ()))]
    return any(isinstance(number, int) and isinstance(at, FrameType) for number, at in pairwise(given))


def _handlers() -> set[CodeType]:
    """The code of every signal handler that is installed: of functions, methods, partials and objects that can be called."""
    found = set()
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        if callable(handler):
            for call in (handler, getattr(handler, "func", None), type(handler).__call__):
                code = getattr(getattr(call, "__func__", call), "__code__", None)
                if isinstance(code, CodeType):
                    found.add(code)
    return found
