"""From source to an object file, with Numba and LLVM; imported only when a kernel is in no cache."""
from __future__ import annotations

import linecache
from collections.abc import Callable

import llvmlite.binding as llvm

from flexref.backends.numba_cpu.cache import target_machine
from flexref.backends.numba_cpu.kernels.gemm import dense_source
from flexref.backends.numba_cpu.kernels.team import team_source

Made = tuple[str, bytes, str]


def begin_kernel(name: str, source: str, path: str) -> Callable[[], Made]:
    """Lower the function `name(int64, int64)` with Numba, here and now; what is returned makes its machine code.

    That is the symbol, the object code and the source; it may be called in another thread. `path` is what a traceback names.
    """
    symbol, text = _lower(name, source, path)

    def finish() -> Made:
        module = llvm.parse_assembly(text)
        for function in module.functions:
            if not function.is_declaration and function.name != symbol:
                function.linkage = "internal"
        return symbol, _object(module, vectorize=True), source

    return finish


def begin_dense(name: str, kind: str, path: str) -> Callable[[], Made]:
    """The same for gemm.py's kernels, whose loops are as they shall be: LLVM only has to find registers."""

    def finish() -> Made:
        text = team_source() if name == "team" else dense_source(name, {"float32": 4, "float64": 8}[kind])
        return "run" if name == "team" else name, _object(llvm.parse_assembly(text), vectorize=False), text

    return finish


def _object(module, vectorize: bool) -> bytes:
    machine = target_machine()
    # unrolling doubles the time of compiling and gains nothing: the lanes of a tile are few and the products are made
    options = llvm.create_pipeline_tuning_options(speed_level=2 if vectorize else 1)
    options.loop_vectorization = vectorize
    options.loop_unrolling = options.loop_interleaving = False
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    return machine.emit_object(module)


def _lower(name: str, source: str, path: str) -> tuple[str, str]:
    """The symbol of the function, and its LLVM module as text, not optimised yet."""
    from flexref.backends.numba_cpu.kernels.helper import lower

    namespace: dict = {"__name__": f"flexref.generated.{name}", "__file__": path}
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    exec(compile(source, path, "exec"), namespace)
    return lower(namespace[name])
