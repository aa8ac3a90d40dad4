"""The threads that work on calls: one pool a process, kept from call to call."""
from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}


def pool(process: int) -> ThreadPoolExecutor:
    """The threads of this process; a forked child makes its own."""
    with _lock:
        if process not in _pools:
            _pools.clear()
            _pools[process] = ThreadPoolExecutor(max(os.cpu_count() or 1, 1), thread_name_prefix="flexref")
        return _pools[process]
