"""Compiled kernels: from memory, else from the user's cache folder, else from Numba.

A kernel is kept as the object file that LLVM made of it, beside its generated source. A process that finds it there loads
it with LLVM's linker and never imports Numba.
"""
from __future__ import annotations

import _thread
import atexit
import ctypes
import gc
import hashlib
import threading
import types
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

from flexref.cache_folder import CacheWarning, folder, keep
from flexref.interrupts import of_a_signal

_lock = threading.RLock()
_loaded: dict[str, int] = {}
_linkers: list = []
_unfinished: set[Future] = set()
_MAGIC = b"flexref kernel 1\n"
# written in LLVM instructions; their source is the name of a number type
DENSE = ("gemm", "transpose", "team")


def addresses_of(sources: dict[str, str]) -> dict[str, int]:
    """The address of each function, by name, from its filled kernel source. Safe from several threads."""
    keys = {name: _key(name, source) for name, source in sources.items()}
    if any(key not in _loaded for key in keys.values()):
        _unbroken(partial(_make, keys, sources))
    return {name: _loaded[key] for name, key in keys.items()}


def _unbroken(work: Callable[[], None]) -> None:
    """Do it where no signal's handler breaks off an import or a compilation, which Numba would not survive: in a thread.

    An interrupt reaches the caller, and the kernels are there for the next call. Such a thread starts in one step, where
    threading.Thread.start could itself be broken off; so its end is waited for here, before the process ends.
    """
    done: Future = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001
            done.set_exception(error)
        else:
            done.set_result(None)
        finally:
            _unfinished.discard(done)

    _unfinished.add(done)
    _thread.start_new_thread(run, ())
    done.result()


atexit.register(lambda: wait(list(_unfinished)))


def _make(keys: dict[str, str], sources: dict[str, str]) -> None:
    with _lock:
        # LLVM works beside Numba: first what it makes alone, and the longest to lower last
        missing = sorted((name for name in keys if keys[name] not in _loaded), key=_begun_when)
        with _no_garbage_collection(), ThreadPoolExecutor(1) as translator:
            found = [_load_or_compile(f"{n}_{keys[n]}", n, sources[n], translator) for n in missing]
            for name, address in zip(missing, found, strict=True):
                _loaded[keys[name]] = address()


def _begun_when(name: str) -> tuple[bool, bool]:
    return name not in DENSE, not name.endswith("_tile")


@contextmanager
def _no_garbage_collection():
    """A compilation makes so many objects that Python goes through all of PyTorch's again and again."""
    active = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if active:
            gc.enable()


def _key(name: str, source: str) -> str:
    return hashlib.sha256("\n".join((name, source, *_fingerprint())).encode()).hexdigest()[:32]


def _load_or_compile(stem: str, name: str, source: str, translator: ThreadPoolExecutor) -> Callable[[], int]:
    """The address, to be asked for when the others have been begun: `translator` makes machine code meanwhile."""
    directory = folder("numba_cpu")
    path = None if directory is None else directory / f"{stem}.o"
    if path is not None and path.exists():
        try:
            address = _link(*_read(path))
            return lambda: address
        except Exception as error:
            if of_a_signal(error):
                raise
            warnings.warn(f"{path} is damaged ({error}); it is made again.", CacheWarning, stacklevel=2)
    from flexref.backends.numba_cpu import compiler

    text_path = None if path is None else path.with_suffix(".ll" if name in DENSE else ".py")
    begin = compiler.begin_dense if name in DENSE else compiler.begin_kernel
    finish = translator.submit(begin(name, source, str(text_path or f"<{stem}>")))

    def address_when_made() -> int:
        symbol, code, text = finish.result()
        if path is not None and text_path is not None:
            keep(text_path, text.encode())
            keep(path, _MAGIC + symbol.encode() + b"\n" + hashlib.sha256(code).digest() + code)
        return _link(symbol, code)

    return address_when_made


def _read(path: Path) -> tuple[str, bytes]:
    content = path.read_bytes()
    if not content.startswith(_MAGIC):
        raise ValueError("it is no kernel")
    symbol, _, rest = content[len(_MAGIC) :].partition(b"\n")
    if hashlib.sha256(rest[32:]).digest() != rest[:32]:
        raise ValueError("its checksum is wrong")
    return symbol.decode(), rest[32:]


def _link(symbol: str, code: bytes) -> int:
    import llvmlite.binding as llvm

    linker = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine())
    linker.add_object_file(llvm.ObjectFileRef.from_data(code))
    linker.finalize_object()
    _linkers.append(linker)
    address = linker.get_function_address(symbol)
    if not address:
        raise ValueError(f"it has no function {symbol}")
    return address


def target_machine():
    """LLVM's description of this machine's processor."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    features = llvm.get_host_cpu_features().flatten()
    return target.create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3, reloc="pic", codemodel="jitdefault", jit=True
    )


@cache
def _fingerprint() -> tuple[str, ...]:
    """What an object file depends on beside its source."""
    import llvmlite.binding as llvm

    kernels = Path(__file__).parent / "kernels"
    sources = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(kernels.glob("*.py")))).hexdigest()
    processor = llvm.get_host_cpu_name() + llvm.get_host_cpu_features().flatten()
    return sources, processor, version("numba"), version("llvmlite")


_Kernel = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


def callable_at(address: int):
    """A driver as a Python function of (params, worker); the interpreter's lock is released while it runs."""
    function = _Kernel(address)
    unused = (ctypes.c_int64 * 2)()
    place = ctypes.addressof(unused)

    def run(params: int, worker: int) -> None:
        function(place, place, params, worker)

    run.keep = types.SimpleNamespace(unused=unused)  # type: ignore[attr-defined]
    return run
