"""From source to an object file, with Numba and LLVM; imported only when a kernel is in no cache."""
from __future__ import annotations

import linecache

import llvmlite.binding as llvm

from flexref.backends.numba_cpu.cache import target_machine
from flexref.backends.numba_cpu.kernels.gemm import dense_source


def compile_kernel(name: str, source: str, path: str) -> tuple[str, bytes, str]:
    """The symbol, object code and source of the function `name(int64, int64)`; `path` is what a traceback names."""
    symbol, text = _lower(name, source, path)
    module = llvm.parse_assembly(text)
    for function in module.functions:
        if not function.is_declaration and function.name != symbol:
            function.linkage = "internal"
    return symbol, _object(module, vectorize=True), source


def compile_dense(name: str, kind: str, path: str) -> tuple[str, bytes, str]:
    """The same for gemm.py's kernels, whose loops are as they shall be: LLVM only has to find registers."""
    text = dense_source(name, {"float32": 4, "float64": 8}[kind])
    return name, _object(llvm.parse_assembly(text), vectorize=False), text


def _object(module, vectorize: bool) -> bytes:
    machine = target_machine()
    options = llvm.create_pipeline_tuning_options(speed_level=3 if vectorize else 1)
    options.loop_vectorization = vectorize
    options.loop_unrolling = vectorize
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    return machine.emit_object(module)


def _lower(name: str, source: str, path: str) -> tuple[str, str]:
    """The symbol of the function, and its LLVM module as text, not optimised yet."""
    from numba.core import compiler, config, registry, types
    from numba.core.compiler_lock import global_compiler_lock

    namespace: dict = {"__name__": f"flexref.generated.{name}", "__file__": path}
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    with global_compiler_lock:
        exec(compile(source, path, "exec"), namespace)
        flags = compiler.Flags()
        flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
        # division by zero gives inf, and no check is made that could raise: kernels have nobody to raise to
        options = {"fastmath": {"contract"}, "error_model": "numpy", "boundscheck": False, "no_rewrites": True}
        registry.cpu_target.options.parse_as_flags(flags, options)
        # made before the level changes: they are everybody's, and remember it
        contexts = registry.cpu_target.typing_context, registry.cpu_target.target_context
        arguments, level = (types.int64, types.int64), config.OPT
        # optimising once, at the end, takes half the time of optimising every helper and then their sum
        config.OPT = type(level)(0)
        try:
            result = compiler.compile_extra(*contexts, namespace[name], arguments, types.void, flags, {})
            result.library.finalize()
        finally:
            config.OPT = level
        return result.fndesc.llvm_func_name, result.library.get_llvm_str()
