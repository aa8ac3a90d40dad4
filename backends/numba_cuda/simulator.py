"""Numba's simulator, with threads that take turns.

The simulator runs each CUDA thread as a Python thread, and its barrier polls, which takes milliseconds. Here a thread that
comes to the barrier wakes the next one and sleeps: the same threads and the same barrier, one running at a time, always in the
same order. What CUDA leaves undefined is an error: a barrier that not all threads reach, or that they reach at different lines.
Shared memory is full of NaN at first, and an index of global memory that is out of range or negative is an error.
"""
from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

VARIABLE = "NUMBA_ENABLE_CUDASIM"
# the simulator runs one kernel at a time
_lock = threading.RLock()


def unavailable() -> list[str]:
    """Numba decides between a GPU and its simulator when numba.cuda is first imported."""
    if "numba.cuda" in sys.modules and not _simulating():
        return [f"numba.cuda is already loaded for a GPU in this process: set {VARIABLE}=1 before it starts"]
    return []


def _simulating() -> bool:
    from numba.cuda.core import config

    return bool(config.ENABLE_CUDASIM)


@cache
def cuda() -> Any:
    """The module numba.cuda, as a simulator."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1"
    try:
        from numba import cuda as module
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
    assert _simulating(), "; ".join(unavailable())
    return module


class Flat:
    """A one-dimensional array in global memory, which can be read and written within its bounds only."""

    __slots__ = ("array", "size")

    def __init__(self, array: np.ndarray):
        assert array.ndim == 1
        self.array, self.size = array, len(array)

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(f"read at {index} of {self.size} elements")
        return self.array[index]

    def __setitem__(self, index, value):
        if not 0 <= index < self.size:
            raise IndexError(f"written at {index} of {self.size} elements")
        self.array[index] = value


def run(function: Callable, grid: int, threads: int, lanes: int, shared_bytes: int, arguments: list) -> None:
    """Launch `function` in the simulator; warps have `lanes` threads."""
    with _lock, _turns(lanes):
        cuda().jit(function)[grid, threads, 0, shared_bytes](*arguments)


@contextmanager
def _turns(lanes: int):
    from numba.cuda.simulator import kernel

    plain = kernel.BlockManager
    kernel.BlockManager = _manager(lanes)
    try:
        yield
    finally:
        kernel.BlockManager = plain


@cache
def _manager(lanes: int) -> type:
    from numba.cuda.simulator import kernel

    class Turns(kernel.BlockManager):
        """Runs the threads of a block one after the other, from barrier to barrier; a warp goes ahead as far as it can."""

        def run(self, grid_point, *args):
            self._f.__globals__["cuda"]._shared._dynshared[:] = -1
            count = self._block_dim[0]
            self.failure: BaseException | None = None
            self.table: list = [None] * count
            self.threads = [_thread_class()(self, grid_point, i, lanes, args) for i in range(count)]
            for thread in self.threads:
                thread.start()
            self.threads[0].turn.release()
            for thread in self.threads:
                thread.join()
            if self.failure is not None:
                raise self.failure

        def next_turn(self, thread) -> None:
            """Open the barrier that this thread has completed, and wake the next thread that need not wait."""
            first = thread.thread_id // lanes * lanes
            warp = self.threads[first : first + lanes]
            if thread.waits != "end":
                scope = self.threads if thread.waits == "block" else warp
                if all(other.waits == thread.waits for other in scope):
                    self._open(scope)
            for other in (*warp, *self.threads):
                if other.waits is None:
                    return other.turn.release()
            if any(other.waits != "end" for other in self.threads):
                self._fail()

        def _open(self, scope) -> None:
            if len({other.place for other in scope}) > 1:
                return self._fail()
            for other in scope:
                other.waits = None

        def _fail(self) -> None:
            places = sorted({other.place for other in self.threads})
            self.end(RuntimeError(f"the threads of a block wait at different places: {places}"))

        def end(self, failure: BaseException) -> None:
            """Wake all threads, which then end."""
            self.failure = self.failure or failure
            for other in self.threads:
                other.turn.release()

    return Turns


@cache
def _thread_class() -> type:
    from numba.cuda.simulator import kernel

    class Thread(kernel.BlockThread):
        """A CUDA thread; `turn` is released when it may run; `waits` at a barrier of its "warp" or "block", or at the "end"."""

        def __init__(self, manager, grid_point, number: int, lanes: int, args):
            super().__init__(None, manager, grid_point, (number, 0, 0), False)
            self._arguments = args
            self.lanes, self.table = lanes, manager.table
            self.waits: str | None = None
            self.place = "the beginning"
            self.turn = threading.Semaphore(0)

        def run(self):
            manager = self._manager
            self.turn.acquire()
            try:
                if manager.failure is None:
                    with np.errstate(all="ignore"):
                        manager._f(*self._arguments)
                self.waits, self.place = "end", "the end"
                manager.next_turn(self)
            except BaseException as error:  # noqa: BLE001
                manager.end(error)

        def syncthreads(self):
            self.wait("block")

        def wait(self, scope: str) -> None:
            """Until all threads of the "warp" or "block" are here."""
            manager = self._manager
            frame: Any = sys._getframe(1)
            while frame.f_globals is not manager._f.__globals__:
                frame = frame.f_back
            self.waits, self.place = scope, f"line {frame.f_lineno} of {frame.f_code.co_name}"
            manager.next_turn(self)
            self.turn.acquire()
            if manager.failure is not None:
                raise RuntimeError("another thread of the block failed")

    return Thread
