"""The folder that compiled kernels are kept in. What is in it is run, so it must be the user's own."""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import tempfile
import warnings
from functools import cache
from pathlib import Path

from flexref.interrupts import of_a_signal


class CacheWarning(UserWarning):
    """The cache folder, or a file of it, cannot be used; kernels are made again in each process."""


def folder(backend: str) -> Path | None:
    """A backend's folder in FLEXREF_CACHE or the user's cache, made private; None, with a warning, if it cannot be trusted."""
    return _checked(str(home()), backend)


def home() -> Path:
    """FLEXREF_CACHE, or the user's cache: where the folders of all backends are."""
    return Path(os.environ.get("FLEXREF_CACHE") or _default()).expanduser()


def own_folder(backend: str) -> Path:
    """A folder for this process alone, gone when it ends."""
    return _own_folder(backend, os.getpid())


def write(path: Path, content: bytes) -> None:
    """Another process sees what was there or the whole of `content`. Raises OSError; no error leaves a draft behind."""
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def keep(path: Path, content: bytes) -> bool:
    """Write, or say in a warning why not; whether it was written."""
    try:
        write(path, content)
    except OSError as error:
        if of_a_signal(error):
            raise
        warnings.warn(f"{path} cannot be written ({error}), so it is not kept.", CacheWarning, stacklevel=2)
        return False
    return True


def _default() -> str:
    try:
        from platformdirs import user_cache_dir
    except ImportError:
        # a checkout that was not installed may lack it, and needs no more of it than what Linux says
        return str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "flexref")
    return user_cache_dir("flexref", appauthor=False)


@cache
def _checked(home: str, backend: str) -> Path | None:
    path = Path(home) / backend
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.mkdir(exist_ok=True, mode=0o700)
        status = path.stat()
    except OSError as error:
        if of_a_signal(error):
            raise
        why = f"cannot be made ({error})"
    else:
        foreign = hasattr(os, "getuid") and status.st_uid != os.getuid()
        if not foreign and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return path
        why = "belongs to another user or is writable by others"
    text = f"the cache folder {path} {why}, so it is not used; set FLEXREF_CACHE to a folder of your own."
    warnings.warn(text, CacheWarning, stacklevel=3)
    return None


@cache
def _own_folder(backend: str, process: int) -> Path:
    path = Path(tempfile.mkdtemp(prefix=f"flexref-{backend}-"))

    def remove() -> None:
        # a forked child that ends must not take it away from its parent
        if os.getpid() == process:
            shutil.rmtree(path, ignore_errors=True)

    atexit.register(remove)
    return path
