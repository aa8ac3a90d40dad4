"""CUDA C++ to machine code by NVRTC, which needs no GPU. CuPy would choose the architecture, and cannot choose sm_90a."""
from __future__ import annotations

from importlib import import_module
from typing import Any

from flexref.backends.cupy.compile_error import CompileError


def architecture(capability: tuple[int, int]) -> str:
    """What to compile for on a GPU of this compute capability: from 9.0 on with the instructions that only it has."""
    major, minor = capability
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def compiled(text: str, name: str, arch: str, options: tuple[str, ...] = ()) -> tuple[bytes, str]:
    """The cubin of a filled kernel, and the compiler's log. Raises CompileError with the source around each error."""
    nvrtc = _nvrtc()

    program = _checked(nvrtc.nvrtcCreateProgram(text.encode(), f"{name}.cu".encode(), 0, [], []))
    given = [f"--gpu-architecture={arch}".encode(), b"--std=c++17", *(option.encode() for option in options)]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(given), given)
    log = _writable(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
    _checked(nvrtc.nvrtcGetProgramLog(program, log))
    said = log.decode(errors="replace").strip(" \0\n")
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError.of(text, said)
    cubin = _writable(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return cubin, said


def _writable(size: int) -> bytes:
    """Memory that NVRTC fills. Never one byte or none: Python has one object for each of those, and shares it."""
    return bytes(max(size, 2))


def version() -> str:
    """Of NVRTC, for the names of kept cubins."""
    nvrtc = _nvrtc()

    status, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"


def _nvrtc() -> Any:
    return import_module("cuda.bindings.nvrtc")


def _checked(result: tuple) -> Any:
    """The value of one of NVRTC's calls; RuntimeError with the status if it failed."""
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"NVRTC failed: {status.name}")
    return values[0] if values else None
