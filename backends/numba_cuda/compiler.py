"""From a kernel's source to a function: in the simulator a Python function, on a GPU what Numba compiles."""
from __future__ import annotations

import hashlib
import linecache
import os
import stat
import tempfile
import threading
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

_lock = threading.RLock()
_functions: dict[str, Callable] = {}
# how many kernels were made in this process; a test counts them
builds = 0


class CacheWarning(UserWarning):
    """The cache folder cannot be used; kernels are not written there to be read."""


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


def _written(source: str, name: str) -> str:
    path = path_of(name)
    if path is None:
        return f"<flexref {name}>"
    if not path.exists():
        write(path, source.encode())
    return str(path)


def path_of(name: str) -> Path | None:
    """A file of the cache folder; None, with a warning once, if the folder cannot be used."""
    folder = _folder(os.environ.get("FLEXREF_CACHE") or _default_folder())
    return None if folder is None else folder / name


def write(path: Path, content: bytes) -> None:
    """Another process sees either no file or the whole of it; where there can be none, a warning says so."""
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        warnings.warn(f"{path} cannot be written ({error}); the kernel is not kept.", CacheWarning, stacklevel=2)


def _default_folder() -> str:
    from platformdirs import user_cache_dir

    return user_cache_dir("flexref", appauthor=False)


@cache
def _folder(name: str) -> Path | None:
    path = Path(name).expanduser() / "numba_cuda"
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = path.stat()
        writable = os.access(path, os.W_OK)
    except OSError as error:
        status, writable, why = None, False, str(error)
    else:
        why = "it is not writable"
    foreign = status is not None and hasattr(os, "getuid") and status.st_uid != os.getuid()
    if status is not None and (foreign or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        writable, why = False, "it belongs to another user or is writable by others"
    if not writable:
        text = f"the cache folder {path} cannot be used ({why}); kernels are made again in each process: set FLEXREF_CACHE."
        warnings.warn(text, CacheWarning, stacklevel=2)
        return None
    return path
