"""The kernels on the CPU: the same sources through g++, run by the fibers of kernels/host, for proofs without a GPU."""
from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
import threading
from functools import cache
from pathlib import Path

import numpy as np

from flexref.backends.cupy.compile_error import CompileError
from flexref.backends.cupy.kernels_for import SOURCES
from flexref.backends.cupy.plan import SHARED_LIMIT, THREADS

_FLAGS = ("-std=c++17", "-O1", "-fwrapv", "-fno-math-errno", "-fPIC", "-shared", "-w", "-DFLEXREF_HOST")
_lock = threading.RLock()


class HostError(RuntimeError):
    """A kernel did what would be undefined on a GPU: threads that never meet, an access outside of shared memory."""


def unavailable() -> list[str]:
    """A C++ compiler makes the kernels."""
    return [] if shutil.which(_compiler()) else [f"no C++ compiler {_compiler()!r} is found: install g++, or set CXX"]


def _compiler() -> str:
    return os.environ.get("CXX") or "g++"


@cache
def machine() -> Machine:
    """The one machine of this process."""
    return Machine()


class Machine:
    """What launch.py asks of a GPU, done by the CPU; `bank_conflicts` counts those of all kernels that ran."""

    processors = 132
    shared_limit = SHARED_LIMIT

    def __init__(self, flags: tuple[str, ...] = ()):
        self.flags = (*_FLAGS, *flags, *os.environ.get("FLEXREF_CUPY_HOST_FLAGS", "").split())
        self.bank_conflicts = 0
        self.builds = 0
        self._kernels: dict[str, ctypes._CFuncPtr] = {}
        self._run = None

    def kernel(self, name: str, text: str):
        """The kernel `name` of a filled source as a function (blocks, shared bytes, parameters)."""
        key = f"{name} {hashlib.sha256(text.encode()).hexdigest()}"
        with _lock:
            if self._run is None:
                # first, because kernels look for the scheduler's symbols in what the process has loaded
                library = self._library((SOURCES / "host/machine.cc").read_text(), "machine.cc", f"-I{SOURCES / 'host'}")
                self._run = library.run
                self._run.restype = ctypes.c_long
            if key not in self._kernels:
                self._kernels[key] = getattr(self._library(text, f"{name}.cc", f"-I{SOURCES}"), name)
        address = ctypes.cast(self._kernels[key], ctypes.c_void_p)
        return lambda blocks, shared, words: self._launch(address, blocks, shared, words)

    def _launch(self, address, blocks: int, shared: int, words: np.ndarray) -> None:
        message = ctypes.create_string_buffer(500)
        place = ctypes.c_void_p(words.ctypes.data)
        with _lock:
            assert self._run is not None
            conflicts = self._run(address, place, blocks, THREADS, ctypes.c_long(shared), message, ctypes.c_long(500))
        self.bank_conflicts += conflicts
        if message.value:
            raise HostError(message.value.decode())

    def _library(self, text: str, file: str, *more: str) -> ctypes.CDLL:
        command = [_compiler(), *self.flags, *more]
        headers = b"".join(path.read_bytes() for path in sorted((SOURCES / "host").iterdir()))
        key = hashlib.sha256("\n".join((*command, text)).encode() + headers).hexdigest()[:32]
        folder = _folder()
        path = folder / f"{file.partition('.')[0]}_{key}.so"
        if not path.exists():
            self.builds += 1
            _compile(command, text, file, path)
        return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL if file == "machine.cc" else ctypes.RTLD_LOCAL)


def _compile(command: list[str], text: str, file: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        source, result = Path(work) / file, Path(work) / "result.so"
        source.write_text(text)
        done = subprocess.run([*command, str(source), "-o", str(result)], capture_output=True, text=True)
        if done.returncode:
            raise CompileError.of(text, done.stderr)
        os.replace(result, path)


@cache
def _folder() -> Path:
    """FLEXREF_CACHE if it is the user's own, else a new temporary folder: what is in it is loaded into the process."""
    asked = os.environ.get("FLEXREF_CACHE")
    if asked:
        path = Path(asked).expanduser() / "cupy"
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = path.stat()
        if status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return path
    return Path(tempfile.mkdtemp(prefix="flexref-cupy-"))
