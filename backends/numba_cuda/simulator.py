"""Numba's simulator, with threads that take turns.

The simulator runs each CUDA thread as a Python thread, and its barrier polls, which takes milliseconds. Here a thread that
comes to the barrier wakes the next one and sleeps: the same threads and the same barrier, one running at a time, always in the
same order. What CUDA leaves undefined is an error: a barrier that not all threads reach, or that they reach at different lines.
Shared memory is full of NaN at first, and an index of global memory that is out of range or negative is an error.
"""
from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
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
    return "simulator" in sys.modules["numba.cuda"].jit.__module__


@cache
def cuda() -> Any:
    """The module numba.cuda, as a simulator; Numba's settings are as before when it is loaded."""
    from numba.core import config

    settings: Any = config
    before, settings.ENABLE_CUDASIM = settings.ENABLE_CUDASIM, 1
    try:
        from numba import cuda as module
    finally:
        settings.ENABLE_CUDASIM = before
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
    with _lock, _crew(threads, lanes):
        cuda().jit(function)[grid, threads, 0, shared_bytes](*arguments)


@contextmanager
def _crew(count: int, lanes: int):
    """Within it the simulator runs every block on the same threads, which take turns."""
    from numba.cuda.simulator import kernel

    crew = [Thread(i, lanes) for i in range(count)]
    plain = kernel.BlockManager
    kernel.BlockManager = lambda function, grid, block, debug: Block(function, crew)
    for thread in crew:
        thread.start()
    try:
        yield
    finally:
        kernel.BlockManager = plain
        for thread in crew:
            thread.block = None
            thread.turn.release()


class Block:
    """Runs the threads of a block one after the other, from barrier to barrier; a warp goes ahead as far as it can."""

    def __init__(self, function: Any, crew: list[Thread]):
        self.function, self.crew = function, crew
        self.failure: BaseException | None = None
        # what the lanes of a warp show one another
        self.table: list = [None] * len(crew)
        self.left, self.lock, self.finished = len(crew), threading.Lock(), threading.Semaphore(0)

    def run(self, grid_point, *arguments) -> None:
        self.arguments = arguments
        self.function.__globals__["cuda"]._shared._dynshared[:] = -1
        for thread in self.crew:
            thread.begin(self, grid_point)
        self.crew[0].turn.release()
        self.finished.acquire()
        if self.failure is not None:
            raise self.failure

    def next_turn(self, thread: Thread) -> None:
        """Open the barrier that this thread has completed, and wake the next thread that need not wait."""
        warp = self.crew[thread.first_of_warp : thread.first_of_warp + thread.lanes]
        if thread.waits != "end":
            scope = self.crew if thread.waits == "block" else warp
            if all(other.waits == thread.waits for other in scope):
                if len({other.place for other in scope}) > 1:
                    return self.fail(thread)
                for other in scope:
                    other.waits = None
        for other in (*warp, *self.crew):
            if other.waits is None:
                return other.turn.release()
        if any(other.waits != "end" for other in self.crew):
            self.fail(thread)

    def fail(self, thread: Thread) -> None:
        places = sorted({other.place for other in self.crew})
        self.end(thread, RuntimeError(f"the threads of a block wait at different places: {places}"))

    def end(self, thread: Thread, failure: BaseException) -> None:
        """Wake the other threads, which then end."""
        if self.failure is None:
            self.failure = failure
            for other in self.crew:
                if other is not thread and other.waits != "end":
                    other.turn.release()

    def one_ended(self) -> None:
        with self.lock:
            self.left -= 1
            if self.left == 0:
                self.finished.release()


class Thread(threading.Thread):
    """A CUDA thread; `turn` is released when it may run; `waits` at a barrier of its "warp" or "block", or at the "end"."""

    def __init__(self, number: int, lanes: int):
        super().__init__(daemon=True)
        self.thread_id, self.lanes, self.first_of_warp = number, lanes, number // lanes * lanes
        self.threadIdx = SimpleNamespace(x=number, y=0, z=0)
        self.turn = threading.Semaphore(0)
        self.block: Any = None

    def begin(self, block: Block, grid_point) -> None:
        """Be a thread of this block next."""
        self.block, self.table = block, block.table
        self.blockIdx = SimpleNamespace(**dict(zip("xyz", grid_point, strict=True)))
        self.waits: str | None = None
        self.place = "the beginning"

    def run(self) -> None:
        while self.turn.acquire() and (block := self.block) is not None:
            try:
                if block.failure is None:
                    with np.errstate(all="ignore"):
                        block.function(*block.arguments)
                self.waits, self.place = "end", "the end"
                if block.failure is None:
                    block.next_turn(self)
            except BaseException as error:  # noqa: BLE001
                self.waits = "end"
                block.end(self, error)
            block.one_ended()

    def wait(self, scope: str) -> None:
        """Until all threads of the "warp" or "block" are here."""
        block = self.block
        frame: Any = sys._getframe(1)
        while frame.f_globals is not block.function.__globals__:
            frame = frame.f_back
        self.waits, self.place = scope, f"line {frame.f_lineno} of {frame.f_code.co_name}"
        block.next_turn(self)
        if block.failure is None:
            self.turn.acquire()
        if block.failure is not None:
            raise RuntimeError("another thread of the block failed")

    def syncthreads(self) -> None:
        """cuda.syncthreads() of the simulator ends up here."""
        self.wait("block")

    def syncthreads_or(self, value) -> int:
        """Whether any thread of the block gave a number other than 0."""
        self.table[self.thread_id] = value
        self.wait("block")
        found = any(self.table)
        self.wait("block")
        return int(found)
