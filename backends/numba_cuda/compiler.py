"""From a kernel's source to a function: in the simulator a Python function, on a GPU what Numba compiles."""
from __future__ import annotations

import hashlib
import linecache
import threading
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from flexref.cache_folder import folder, keep
from flexref.interrupts import of_a_signal

_lock = threading.RLock()
_functions: dict[str, Callable] = {}
# how many kernels were made in this process; a test counts them
builds = 0


def function_of(source: str, name: str) -> Callable:
    """The function `name` of a generated module, which is written to the cache folder for a person and a traceback to read."""
    key = hashlib.sha256(source.encode()).hexdigest()[:32]
    with _lock:
        if key not in _functions:
            global builds
            builds += 1
            path = _written(source, f"{name}_{key}.py")
            namespace: dict = {"__name__": f"flexref.generated.{name}_{key}", "__file__": path}
            linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
            exec(compile(source, path, "exec"), namespace)
            _functions[key] = namespace[name]
        return _functions[key]


@cache
def numba_cuda() -> Any:
    """Numba's CUDA package. Raises what its import raises."""
    if not hasattr(np, "row_stack"):
        # NumPy 2.5 dropped the old name, which numba-cuda 0.30.4 still reads when it is imported
        np.row_stack = np.vstack  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return import_module("numba.cuda")


@cache
def import_error() -> str:
    """What keeps Numba's CUDA package from being imported; "" if nothing does."""
    try:
        numba_cuda()
        # what the machine code of every kernel is made and launched with
        names = import_module("cuda.core")
    except Exception as error:
        if of_a_signal(error):
            raise
        return f"numba-cuda cannot be imported ({type(error).__name__}: {error}): pip install 'flexref[numba-cuda]'"
    lacking = [name for name in ("LaunchConfig", "Linker", "ObjectCode", "Stream", "launch") if not hasattr(names, name)]
    return f"cuda.core has no {', '.join(lacking)}: pip install 'cuda-core>=0.6'" if lacking else ""


def _written(source: str, name: str) -> str:
    path = path_of(name)
    if path is None:
        return f"<flexref {name}>"
    if not path.exists():
        keep(path, source.encode())
    return str(path)


def path_of(name: str) -> Path | None:
    """A file of the cache folder; None, with a warning once, if the folder cannot be used."""
    directory = folder("numba_cuda")
    return None if directory is None else directory / name
