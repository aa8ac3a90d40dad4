"""On a GPU: kernels from the cache folder or from Numba, launched on torch's current stream.

Numba translates a kernel to PTX, cuda.core makes machine code of that and launches it. The machine code is kept in the cache
folder, and a process that finds it there does not import Numba.
"""
from __future__ import annotations

import ctypes
import hashlib
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from flexref.backends.numba_cuda import compiler
from flexref.backends.numba_cuda.device import bits_of
from flexref.backends.numba_cuda.geometry import LEAST_SHARED, PLAIN_SHARED, Chip, Geometry
from flexref.cache_folder import keep

_lock = threading.RLock()
_of_thread = threading.local()
_kernels: dict[tuple, object] = {}


def _core() -> Any:
    return import_module("cuda.core")


class Gpu:
    """torch's CUDA devices."""

    simulated = False

    def __init__(self):
        self._zeros: dict[tuple, Tensor] = {}

    def chip(self, like: Tensor) -> Chip:
        """What the device of a tensor can do."""
        return _chip(like.device.index or 0)

    def zeros(self, dtype: torch.dtype, like: Tensor, fresh: bool = False) -> Tensor:
        """One zero; unless it is to be `fresh`, one that every call may read."""
        if fresh:
            return torch.zeros(1, dtype=dtype, device=like.device)
        key = (dtype, like.device)
        if key not in self._zeros:
            self._zeros[key] = torch.zeros(1, dtype=dtype, device=like.device)
        return self._zeros[key]

    def run(self, source: str, name: str, grid: int, geometry: Geometry, shared: int, arguments: list) -> None:
        core = _core()
        like = next(x for x in arguments if isinstance(x, Tensor))
        with torch.cuda.device(like.device):
            _enter(like.device.index or 0)
            kernel = _kernel(source, name, tuple(map(kind_of, arguments)), geometry.threads, shared, like.device.index or 0)
            stream = core.Stream.from_handle(torch.cuda.current_stream(like.device).cuda_stream)
            core.launch(stream, _configuration(grid, geometry.threads, shared), kernel, *packed(arguments))


def _enter(index: int) -> None:
    """Give this thread the device's context: cuda.core asks for one, and PyTorch's own threads begin without."""
    entered = _of_thread.__dict__.setdefault("entered", set())
    if index not in entered:
        _core().Device(index).set_current()
        entered.add(index)


@lru_cache(maxsize=1024)
def _configuration(grid: int, threads: int, shared: int):
    return _core().LaunchConfig(grid=grid, block=threads, shmem_size=shared)


@cache
def _chip(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    least = getattr(properties, "shared_memory_per_block_optin", LEAST_SHARED)
    return Chip(properties.multi_processor_count, least, properties.major >= 8)


def packed(arguments: list) -> list:
    """What Numba's kernels expect: an array is seven words, a tuple its elements."""
    words: list = []
    for x in arguments:
        if isinstance(x, Tensor):
            # two pointers that only the host uses, count, bytes of an element, address, shape, stride; no kernel reads the counts
            words += [0, 0, x.numel(), x.element_size(), x.data_ptr(), x.numel(), x.element_size()]
        else:
            words += [ctypes.c_double(value) if isinstance(value, float) else value for value in x]
    return words


def kind_of(x: Tensor | tuple) -> str:
    """An argument's type as text, so that a kernel from the cache needs no Numba: "float32[]" or "int64*3"."""
    if isinstance(x, Tensor):
        return _kind_of_elements(x.dtype)
    return f"{'float64' if isinstance(x[0], float) else 'int64'}*{len(x)}"


@cache
def _kind_of_elements(dtype: torch.dtype) -> str:
    return f"{str(bits_of(dtype)).removeprefix('torch.')}[]"


def _kernel(source: str, name: str, kinds: tuple[str, ...], threads: int, shared: int, index: int):
    key = (source, kinds, threads, index)
    with _lock:
        if key not in _kernels:
            _kernels[key] = _loaded(source, name, kinds, threads, shared, index)
        return _kernels[key]


def _loaded(source: str, name: str, kinds: tuple[str, ...], threads: int, shared: int, index: int):
    driver: Any = import_module("cuda.bindings.driver")
    built = built_kernel(source, name, kinds, threads, torch.cuda.get_device_capability(index))
    kernel = _core().ObjectCode.from_cubin(built.code).get_kernel(built.entry)
    if shared > PLAIN_SHARED:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (error,) = driver.cuKernelSetAttribute(attribute, shared, kernel.handle, driver.CUdevice(index))
        if error != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{name} needs {shared} bytes of shared memory: {error.name}; pass smaller q_tile and kv_tile.")
    return kernel


@dataclass(frozen=True)
class Built:
    """Machine code, the name of its function, and what the assembler said of registers and spills ("" from the cache)."""

    entry: str
    code: bytes
    log: str = ""


def built_kernel(source: str, name: str, kinds: tuple[str, ...], threads: int, cc: tuple[int, int]) -> Built:
    """From the cache folder, or made by Numba and kept there."""
    text = "\n".join((source, *kinds, str(threads), str(cc), *_fingerprint()))
    path = compiler.path_of(f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:32]}.cubin")
    try:
        entry, _, code = (b"" if path is None else path.read_bytes()).partition(b"\n")
        if code:
            return Built(entry.decode(), code)
    except FileNotFoundError:
        pass
    built = assemble(ptx_of(source, name, kinds, threads, cc), cc)
    if path is not None:
        keep(path, built.entry.encode() + b"\n" + built.code)
    return built


def ptx_of(source: str, name: str, kinds: tuple[str, ...], threads: int, cc: tuple[int, int]) -> str:
    """The kernel in PTX for a compute capability; no GPU is needed."""
    cuda = compiler.numba_cuda()
    types = cuda.types

    def numba_type(kind: str):
        element, _, count = kind.partition("*")
        if count:
            return types.UniTuple(getattr(types, element), int(count))
        return types.Array(getattr(types, kind.removesuffix("[]")), 1, "C")

    signature = types.void(*map(numba_type, kinds))
    function = compiler.function_of(source, name)
    with _lock, _compiling_for(cc):
        return cuda.compile_ptx(function, signature, cc=cc, launch_bounds=threads)[0]


@contextmanager
def _compiling_for(cc: tuple[int, int]):
    """Numba asks the current device what to compile device functions for; there may be none, and this one is known."""
    dispatcher: Any = import_module("numba.cuda.dispatcher")
    ask = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=cc)
    try:
        yield
    finally:
        dispatcher.get_current_device = ask


def assemble(ptx: str, cc: tuple[int, int], verbose: bool = False) -> Built:
    """PTX as machine code; only nvJitLink can be `verbose`, the driver of a machine without it cannot."""
    core = _core()
    options = core.LinkerOptions(arch=f"sm_{cc[0]}{cc[1]}", ptxas_options=["-v"] if verbose else None)
    linker = core.Linker(core.ObjectCode.from_ptx(ptx.encode()), options=options)
    code = linker.link("cubin").code
    entry = ptx.partition(".visible .entry ")[2].partition("(")[0].strip()
    return Built(entry, bytes(code), linker.get_info_log() if verbose else "")


@lru_cache(maxsize=1)
def _fingerprint() -> tuple[str, ...]:
    """What machine code depends on beside the kernel's own source."""
    kernels = Path(__file__).parent / "kernels"
    texts = b"".join((kernels / name).read_bytes() for name in ("machine.py", "maths.py"))
    versions = (version(package) for package in ("numba", "llvmlite", "numba-cuda", "cuda-core"))
    return hashlib.sha256(texts).hexdigest(), *versions
