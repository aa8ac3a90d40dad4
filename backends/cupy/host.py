"""The kernels on the CPU: the same sources through g++, run by the fibers of cuda_host, for proofs without a GPU."""
from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from functools import cache
from pathlib import Path

import numpy as np

from flexref.backends.cupy import cache as files
from flexref.backends.cupy import kernels_for
from flexref.backends.cupy.compile_error import CompileError
from flexref.backends.cupy.kernels_for import SOURCES
from flexref.backends.cupy.plan import SHARED_LIMIT, THREADS

_FLAGS = (f"-I{SOURCES}", "-std=c++17", "-O1", "-fno-math-errno", "-fPIC", "-shared", "-w", "-DFLEXREF_HOST")
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
    """What launch.py asks of a GPU, done by the CPU.

    `backwards`: thread blocks and threads are run from the last to the first. `bank_conflicts`, `builds`: how many so far.
    """

    processors = 132
    shared_limit = SHARED_LIMIT

    def __init__(self, flags: tuple[str, ...] = ()):
        self.flags = (*_FLAGS, *flags, *os.environ.get("FLEXREF_CUPY_HOST_FLAGS", "").split())
        self.backwards = False
        self.bank_conflicts = 0
        self.builds = 0
        self._kernels: dict = {}
        self._run, self._scheduler = None, ""

    def kernel(self, name: str, text: str):
        """The kernel `name` of a filled source as a function (blocks, shared bytes, parameters)."""
        key = f"{name} {hashlib.sha256(text.encode()).hexdigest()}"
        with _lock:
            if self._run is None:
                self._scheduler = self._library(kernels_for.read("cuda_host.cc"), "cuda_host")
                self._run = ctypes.CDLL(self._scheduler).run
                self._run.restype = ctypes.c_long
            if key not in self._kernels:
                # linked to the very scheduler that runs it: a process may have several
                self._kernels[key] = getattr(ctypes.CDLL(self._library(text, name, self._scheduler)), name)
        address = ctypes.cast(self._kernels[key], ctypes.c_void_p)
        return lambda blocks, shared, words: self._launch(address, blocks, shared, words)

    def _launch(self, address, blocks: int, shared: int, words: np.ndarray) -> None:
        message = ctypes.create_string_buffer(500)
        place = ctypes.c_void_p(words.ctypes.data)
        with _lock:
            assert self._run is not None
            size, room = ctypes.c_long(shared), ctypes.c_long(len(message))
            conflicts = self._run(address, place, blocks, THREADS, size, self.backwards, message, room)
        self.bank_conflicts += conflicts
        if message.value:
            raise HostError(message.value.decode())

    def _library(self, text: str, name: str, *linked: str) -> str:
        """Where the shared library of a source is, compiled if it is not kept."""
        command = [_compiler(), *self.flags]
        key = "\n".join((*command, *linked, kernels_for.read("cuda_host.h"), text))

        def build() -> bytes:
            self.builds += 1
            return _compiled(command, text, f"{name}.cc", linked)

        return str(files.kept(f"{name}_{hashlib.sha256(key.encode()).hexdigest()[:32]}.so", build))


def _compiled(command: list[str], text: str, file: str, linked: tuple[str, ...]) -> bytes:
    with tempfile.TemporaryDirectory() as work:
        source, result = Path(work) / file, Path(work) / "result.so"
        source.write_text(text)
        done = subprocess.run([*command, str(source), *linked, "-o", str(result)], capture_output=True, text=True)
        if done.returncode:
            raise CompileError.of(text, done.stderr)
        return result.read_bytes()
