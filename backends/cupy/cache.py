"""Compiled kernels as files: in the cache folder, or where that cannot be used in one for this process alone."""
from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

from flexref import cache_folder
from flexref.cache_folder import CacheWarning
from flexref.interrupts import of_a_signal


def kept(name: str, make: Callable[[], bytes]) -> Path:
    """The file `name` of the cache folder, made if it is not there. Another process sees no file or the whole file."""
    path = folder() / name
    if not path.exists():
        content = make()
        try:
            cache_folder.write(path, content)
        except OSError as error:
            if of_a_signal(error):
                raise
            text = f"{path} cannot be written ({error}), so it is kept for this process alone."
            warnings.warn(text, CacheWarning, stacklevel=2)
            path = cache_folder.own_folder("cupy") / name
            cache_folder.write(path, content)
    return path


def folder() -> Path:
    """Where kernels are kept."""
    return cache_folder.folder("cupy") or cache_folder.own_folder("cupy")
