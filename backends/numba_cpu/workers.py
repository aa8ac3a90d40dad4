"""The threads that work on calls: torch's own OpenMP threads where they can be had, else a pool, kept from call to call.

After an operator, torch's threads spin for a while in wait of the next one; a second set of threads would have to share the
cores with them. kernels/team.py says how a call is interrupted.
"""
from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path

import numpy as np
import torch

from flexref.backends.numba_cpu.kernels.layout import P

_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}
# called with the interpreter's lock held; an exception that is set when it returns is raised
_Run = ctypes.PYFUNCTYPE(None, ctypes.c_int64)
_process = os.getpid()


def team_at(address: int) -> Callable[[int], None]:
    """team.py's `run` as a Python function of the address of a call's table."""
    return _Run(address)


def run_team(team: Callable, driver: Callable, params: np.ndarray, workers: int, keep: object) -> None:
    """Run a call's driver as `workers` workers. An exception of a signal's handler stops them all and is raised.

    `keep` stays alive as long as any thread works.
    """
    if workers == 1 or (params[P.parallel] and os.getpid() == _process):
        team(params.ctypes.data)
        return
    params[P.parallel] = 0
    address = params.ctypes.data

    def work(worker: int, _: object = keep) -> None:
        driver(address, worker)

    others: list[Future] = []
    try:
        for worker in range(1, workers):
            others.append(_pool(os.getpid()).submit(work, worker))
        team(address)
        wait(others)
    except BaseException:
        params[P.stop] = 1
        wait(others)
        raise
    for other in others:
        other.result()


@cache
def services() -> dict[str, int]:
    """The addresses of what team.py calls, by their names in layout.py; `parallel` is 0 without GNU's OpenMP."""
    libc, python = ctypes.CDLL(None), ctypes.pythonapi
    found = {
        "clock": libc.clock_gettime,
        "pause": libc.sched_yield,
        "save_thread": python.PyEval_SaveThread,
        "restore_thread": python.PyEval_RestoreThread,
        "check_signals": python.PyErr_CheckSignals,
        **_openmp(),
    }
    addresses = {name: ctypes.cast(function, ctypes.c_void_p).value or 0 for name, function in found.items()}
    return {"parallel": 0, "clock_kind": time.CLOCK_MONOTONIC, **addresses}


def _openmp() -> dict[str, Callable]:
    """Of the OpenMP library that torch brought; none if it brought another."""
    for path in (Path(str(torch.__file__)).parent / "lib").glob("libgomp*"):
        try:
            library = ctypes.CDLL(str(path))
            return {
                "parallel": library.GOMP_parallel,
                "thread_number": library.omp_get_thread_num,
                "thread_count": library.omp_get_num_threads,
            }
        except (OSError, AttributeError):
            continue
    return {}


def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of this process; a forked child makes its own, and leaves OpenMP's, which do not survive a fork, alone."""
    with _lock:
        if process not in _pools:
            _pools.clear()
            _pools[process] = ThreadPoolExecutor(max(os.cpu_count() or 1, 1), thread_name_prefix="flexref")
        return _pools[process]
