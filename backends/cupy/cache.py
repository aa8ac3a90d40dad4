"""The folder that compiled kernels are kept in. What is in it is run, so it must be the user's own."""
from __future__ import annotations

import os
import stat
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path


class CacheWarning(UserWarning):
    """The cache folder cannot be used; kernels are compiled again in each process."""


def kept(name: str, make: Callable[[], bytes]) -> Path:
    """The file `name` of the cache folder, made if it is not there. Another process sees no file or the whole file."""
    path = folder() / name
    if not path.exists():
        content = make()
        try:
            _write(path, content)
        except OSError as error:
            text = f"{path} cannot be written ({error}), so it is kept for this process alone."
            warnings.warn(text, CacheWarning, stacklevel=2)
            path = _own_folder() / name
            _write(path, content)
    return path


def _write(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


@cache
def _own_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="flexref-cupy-"))


def folder() -> Path:
    """FLEXREF_CACHE or the user's cache folder; with a warning, one for this process alone if another user could write there."""
    return _checked_folder(os.environ.get("FLEXREF_CACHE") or _default_folder())


def _default_folder() -> str:
    from platformdirs import user_cache_dir

    return user_cache_dir("flexref", appauthor=False)


@cache
def _checked_folder(name: str) -> Path:
    path = Path(name).expanduser() / "cupy"
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = path.stat()
        foreign = hasattr(os, "getuid") and status.st_uid != os.getuid()
        why = "belongs to another user or is writable by others"
        if not foreign and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return path
    except OSError as error:
        why = f"cannot be made ({error})"
    text = f"the cache folder {path} {why}, so kernels are not kept; set FLEXREF_CACHE to a folder of your own."
    warnings.warn(text, CacheWarning, stacklevel=3)
    return _own_folder()
