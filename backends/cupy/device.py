"""A CUDA GPU through CuPy: cubins are loaded as CuPy modules and launched on torch's current stream."""
from __future__ import annotations

import hashlib
import importlib
import threading
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch

from flexref.backends.cupy import cache as files
from flexref.backends.cupy import nvrtc
from flexref.backends.cupy.plan import THREADS

# by name, for this folder is called the same
cupy: Any = importlib.import_module("cupy")
# more dynamic shared memory than this has to be asked for
_SHARED_BY_DEFAULT = 48 * 1024


@cache
def machine(index: int) -> Machine:
    """The GPU with this index."""
    return Machine(index)


class Machine:
    """What launch.py asks of a GPU: how large it is, kernels, and launches."""

    def __init__(self, index: int):
        attributes = cupy.cuda.Device(index).attributes
        self.index = index
        self.processors = int(attributes["MultiProcessorCount"])
        self.shared_limit = int(attributes["MaxSharedMemoryPerBlockOptin"])
        self.architecture = nvrtc.architecture(torch.cuda.get_device_capability(index))
        self._kernels: dict[str, _Kernel] = {}
        self._lock = threading.Lock()

    def kernel(self, name: str, text: str) -> _Kernel:
        """The kernel `name` of a filled source as a function (blocks, shared bytes, parameters)."""
        key = hashlib.sha256("\n".join((name, self.architecture, nvrtc.version(), text)).encode()).hexdigest()[:32]
        with self._lock:
            if key not in self._kernels:
                path = files.kept(f"{name}_{key}.cubin", lambda: nvrtc.compiled(text, name, self.architecture)[0])
                self._kernels[key] = _Kernel(self.index, str(path), name)
            return self._kernels[key]


class _Kernel:
    """A loaded kernel. A launch waits for nothing: parameters are copied by the driver before it returns."""

    def __init__(self, index: int, path: str, name: str):
        self.index = index
        # a module belongs to the device that is current when it is loaded
        with cupy.cuda.Device(index):
            self.kernel = cupy.RawModule(path=path).get_function(name)
            self.function = self.kernel.kernel
        self.shared = _SHARED_BY_DEFAULT

    def __call__(self, blocks: int, shared: int, words: np.ndarray) -> None:
        stream = _stream(torch.cuda.current_stream(self.index).cuda_stream)
        with cupy.cuda.Device(self.index):
            if shared > self.shared:
                self.kernel.max_dynamic_shared_size_bytes = shared
                self.shared = shared
            # an array of one element is passed by value
            parameters = words.view([("words", np.int64, (len(words),))])
            self.function((blocks,), (THREADS,), (parameters,), shared, stream)


class _Foreign:
    """A stream of torch's as CUDA's stream protocol wants it."""

    def __init__(self, handle: int):
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


@lru_cache(maxsize=256)
def _stream(handle: int):
    """CuPy's view of a stream that torch owns and never destroys."""
    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_Foreign(handle))
    return cupy.cuda.ExternalStream(handle)
