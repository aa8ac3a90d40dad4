"""From a filled kernel source to an object file, with Numba; imported only when a kernel is in no cache."""
from __future__ import annotations

import linecache

import llvmlite.binding as llvm
from numba.core import compiler, registry, types
from numba.core.compiler_lock import global_compiler_lock

from flexref.backends.numba_cpu.cache import target_machine


def compile_source(name: str, source: str, path: str) -> tuple[str, bytes]:
    """The symbol and the object code of the function `name(int64, int64)`; `path` is what a traceback names."""
    namespace: dict = {"__name__": f"flexref.generated.{name}", "__file__": path}
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    exec(compile(source, path, "exec"), namespace)
    with global_compiler_lock:
        library, symbol = _compile(namespace[name])
        library.finalize()
        module = llvm.parse_assembly(library.get_llvm_str())
    return symbol, target_machine().emit_object(module)


def _compile(function):
    flags = compiler.Flags()
    flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    # division by zero gives inf, and no check is made that could raise: kernels have nobody to raise to
    registry.cpu_target.options.parse_as_flags(flags, {"fastmath": {"contract"}, "error_model": "numpy", "boundscheck": False})
    target = registry.cpu_target
    result = compiler.compile_extra(
        target.typing_context, target.target_context, function, (types.int64, types.int64), types.void, flags, {}
    )
    return result.library, result.fndesc.llvm_func_name
