"""From a kernel's source to a function: in the simulator a Python function, on a GPU what Numba compiles."""
from __future__ import annotations

import hashlib
import linecache
import os
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
    folder = _folder(os.environ.get("FLEXREF_CACHE") or _default_folder())
    if folder is None:
        return f"<flexref {name}>"
    path = folder / name
    if not path.exists():
        handle, temporary = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "w") as file:
            file.write(source)
        os.replace(temporary, path)
    return str(path)


def _default_folder() -> str:
    from platformdirs import user_cache_dir

    return user_cache_dir("flexref", appauthor=False)


@cache
def _folder(name: str) -> Path | None:
    path = Path(name).expanduser() / "numba_cuda"
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, probe = tempfile.mkstemp(dir=path)
        os.close(handle)
        os.unlink(probe)
    except OSError as error:
        warnings.warn(f"the cache folder {path} cannot be used ({error}); set FLEXREF_CACHE.", CacheWarning, stacklevel=2)
        return None
    return path
