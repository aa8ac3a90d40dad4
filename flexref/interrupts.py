"""What a signal's handler raises is the caller's: whoever turns errors into words, or goes on after one, asks here first."""

from __future__ import annotations

import signal
from types import CodeType


def of_a_signal(error: BaseException | None) -> bool:
    """Whether `error`, or what it was raised from, came out of a Python signal handler and not out of what that interrupted."""
    handlers = _handlers()
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code in handlers:
                return True
            trace = trace.tb_next
        error = error.__cause__
    return False


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
