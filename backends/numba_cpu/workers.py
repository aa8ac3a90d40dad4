"""The threads that work on calls: torch's own OpenMP threads where they can be had, else a pool, kept from call to call.

After an operator, torch's threads spin for a while in wait of the next one; a second set of threads would have to share the
cores with them.
"""
from __future__ import annotations

import ctypes
import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}
_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_process = os.getpid()


def share_out(work: Callable[[int], None], count: int) -> None:
    """Call work(0) to work(count - 1), each once, on as many threads as there are."""
    parallel = _openmp() if os.getpid() == _process else None
    if parallel is None:
        others = [_pool(os.getpid()).submit(work, i) for i in range(1, count)]
        work(0)
        for other in others:
            other.result()
        return
    turns = itertools.count()

    def body(_: object) -> None:
        # a team may have fewer threads than were asked for
        while (i := next(turns)) < count:
            work(i)

    parallel(_Body(body), None, count, 0)


@cache
def _openmp() -> Callable | None:
    """GOMP_parallel of the OpenMP library that torch brought; None if it brought another."""
    for path in (Path(str(torch.__file__)).parent / "lib").glob("libgomp*"):
        try:
            function = ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes = (_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        function.restype = None
        return function
    return None


def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of this process; a forked child makes its own, and leaves OpenMP's, which do not survive a fork, alone."""
    with _lock:
        if process not in _pools:
            _pools.clear()
            _pools[process] = ThreadPoolExecutor(max(os.cpu_count() or 1, 1), thread_name_prefix="flexref")
        return _pools[process]
