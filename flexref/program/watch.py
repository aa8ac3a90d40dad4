"""The second look at a mod: what ran while it was traced, beside what the walk over all that it reaches had seen before.

The walk (closure.py) reads what code may do, and Python calls code in more ways than that: type(self)(), a default factory, a
text. What does run Python tells a profiler. So a program is kept only if every function that ran was walked, is steady, or was
called by one that is steady.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import torch

from flexref.program import steady
from flexref.program.closure import Leaves
from flexref.program.code_reads import within

# what PyTorch's own functions ask PyTorch while a mod runs: the tracer sets it, or it asks who takes part in a call
_ASKED = frozenset(
    """is_grad_enabled set_grad_enabled _set_grad_enabled is_inference_mode_enabled _get_tracing_state _log_api_usage_once
    _is_torch_function_enabled _is_torch_function_mode_enabled _has_torch_function _has_torch_function_unary
    _has_torch_function_variadic _disabled_torch_function_impl
    _len_torch_function_stack _get_function_stack_at _push_on_torch_function_stack _pop_torch_function_stack""".split()
)
# these run whenever an object is freed
_OF_THE_COLLECTOR = frozenset({"weakref", "_weakrefset"})


class Watch:
    """Within it the calls of this thread are looked at.

    `why`: the first thing that ran and was neither walked nor steady; None as long as there is none.
    """

    def __init__(self, leaves: Leaves | None) -> None:
        self.needed = leaves is not None and leaves.why is None
        self.walked = {id(code) for outer in leaves.codes for code in within(outer)} if leaves and self.needed else set()
        # the collector runs at any time, and runs what is no part of the mod
        self.collecting, self.thread = False, threading.get_ident()
        # torch._VF is no module
        self.steady = {id(getattr(told, "__code__", None)) for told in gc.callbacks}
        self.steady.add(id(type(torch._VF).__getattr__.__code__))
        # flexref's own code, which asks PyTorch for what it has set
        self.tracer: set[int] = set()
        self.why: str | None = None
        self.resume: Callable[[], Any] | None = None

    def __enter__(self) -> None:
        if not self.needed:
            return
        before: Any = sys.getprofile()
        self.resume = resumption(before)
        if self.resume is None:
            self.why = "a profiler that cannot be stopped for it is at work, so that its calls are not seen"
            return

        def both(frame: Any, event: str, called: Any) -> None:
            see(frame, event, called)
            before(frame, event, called)

        see = self.see()
        gc.callbacks.insert(0, self.collector)
        sys.setprofile(both if callable(before) else see)

    def __exit__(self, *error: object) -> None:
        if self.resume is not None:
            self.resume()
            gc.callbacks.remove(self.collector)

    def collector(self, phase: str, info: dict) -> None:
        """Told by the collector, in whichever thread it runs."""
        if threading.get_ident() == self.thread:
            self.collecting = phase == "start"

    def see(self) -> Callable[[Any, str, Any], None]:
        """What Python tells of each call, as a function of few steps, for there are hundreds."""
        known, tracer = self.steady | self.walked, self.tracer

        def see(frame: types.FrameType, event: str, called: Any) -> None:
            if self.collecting:
                return
            if event == "call":
                code = frame.f_code
                if id(code) not in known:
                    if not self.trusted(frame):
                        place = f"{os.path.basename(code.co_filename)}:{code.co_firstlineno}"
                        self.why = self.why or f"it ran {code.co_qualname} ({place}), which was found in nothing that it reaches"
                    elif id(code) in self.steady:
                        known.add(id(code))
            elif event == "c_call" and id(frame.f_code) not in tracer and asks_pytorch(called) and not self.by_tracer(frame):
                self.why = self.why or f"it asks PyTorch for {called.__name__}"

        return see

    def by_tracer(self, frame: types.FrameType | None) -> bool:
        """Whether flexref's tracer called what asks: an operator on tensors, whose result a kept program makes anew."""
        while frame is not None and id(frame.f_code) not in self.walked:
            if id(frame.f_code) in self.tracer:
                return True
            frame = frame.f_back
        return False

    def trusted(self, frame: types.FrameType | None) -> bool:
        """Whether code that was not walked is steady, or was called by steady code and not, by way of others, by the user's."""
        own = True
        while frame is not None and id(frame.f_code) not in self.walked:
            module = steady.own_module(frame.f_globals)
            package = steady.package_of(module)
            if own and (steady.is_steady_code(module, frame.f_code) or module in _OF_THE_COLLECTOR or _of_a_named_tuple(frame)):
                self.steady.add(id(frame.f_code))
                if package == "flexref":
                    self.tracer.add(id(frame.f_code))
                return True
            # what an import runs; the mod itself has none
            if package in ("importlib", "flexref"):
                return package == "importlib"
            own = own and (package == "torch" or package in sys.stdlib_module_names)
            frame = frame.f_back
        return False


def _of_a_named_tuple(frame: types.FrameType) -> bool:
    """Whether it makes an object of a collections.namedtuple: code without a module and without builtins."""
    scope = frame.f_globals
    return str(scope.get("__name__")).startswith("namedtuple_") and scope.get("__builtins__") == {}


def asks_pytorch(called: Any) -> bool:
    """Whether a function written in C is one of PyTorch's that gives more than its arguments say."""
    if type(called) is not types.BuiltinFunctionType:
        return False
    owner = called.__self__
    if owner is None or isinstance(owner, (types.ModuleType, type)):
        foreign = steady.package_of(called.__module__) == "torch" and not steady.is_function_of_tensors(called)
        return foreign and called.__name__ not in _ASKED
    return steady.package_of(type(owner).__module__) == "torch" and not isinstance(owner, steady.VALUES)


def resumption(profiler: Any) -> Callable[[], Any] | None:
    """What makes a profiler that is at work go on afterwards; None for one that nobody but itself can start."""
    if profiler is None or callable(profiler):
        return lambda: sys.setprofile(profiler)
    # cProfile before Python 3.12
    return getattr(profiler, "enable", None)
