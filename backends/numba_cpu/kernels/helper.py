"""How Numba is used: functions of numbers become LLVM text, not optimised yet, and nothing is loaded or wrapped.

A `helper` is a function that kernels may call. It takes the place of numba.njit, which would also translate each of
them to machine code and wrap it for Python: together that is half the time of a first call.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import cache

from numba import types
from numba.core import compiler, config, registry
from numba.core.cgutils import unpack_tuple
from numba.core.compiler_lock import global_compiler_lock
from numba.core.compiler_machinery import PassManager
from numba.core.typed_passes import (
    IRLegalization,
    NativeLowering,
    NoPythonBackend,
    NopythonTypeInference,
    PreLowerStripPhis,
)
from numba.core.untyped_passes import FixupArgs, IRProcessing, ReconstructSSA, TranslateByteCode
from numba.extending import intrinsic

_PASSES = (
    TranslateByteCode, FixupArgs, IRProcessing, ReconstructSSA, NopythonTypeInference, PreLowerStripPhis,
    IRLegalization, NativeLowering, NoPythonBackend,
)  # fmt: skip
# division by zero gives inf, and no check is made that could raise: kernels have nobody to raise to
_OPTIONS = {"fastmath": {"contract"}, "error_model": "numpy", "boundscheck": False}


class _Pipeline(compiler.CompilerBase):
    """The passes that typed functions without closures, literals or dead branches need."""

    def define_pipelines(self):
        manager = PassManager("flexref")
        for one in _PASSES:
            manager.add_pass(one, one.name())
        manager.finalize()
        return [manager]


@cache
def _context():
    """Numba's description of this processor, with a code generator that writes and does not load."""
    return registry.cpu_target.target_context.with_aot_codegen("flexref")


def _compile(function: Callable, arguments: tuple, result):
    flags = compiler.Flags()
    flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    registry.cpu_target.options.parse_as_flags(flags, _OPTIONS)
    typing = registry.cpu_target.typing_context
    return compiler.compile_extra(typing, _context(), function, arguments, result, flags, {}, pipeline_class=_Pipeline)


def lower(function: Callable) -> tuple[str, str]:
    """The symbol of `function(int64, int64)`, and the text of its LLVM module together with its helpers."""
    with global_compiler_lock:
        _context()
        level = config.OPT
        # optimising once, at the end, takes half the time of optimising every helper and then their sum
        config.OPT = type(level)(0)
        try:
            result = _compile(function, (types.int64, types.int64), types.void)
            result.library.finalize()
        finally:
            config.OPT = level
        return result.fndesc.llvm_func_name, result.library.get_llvm_str()


def helper(function: Callable):
    """Make `function` callable from kernels; it is compiled once for each list of argument types."""
    compiled = {}

    def call(typingctx, *arguments):
        if arguments not in compiled:
            compiled[arguments] = _compile(function, arguments, None)
        result = compiled[arguments]

        def codegen(context, builder, signature, values):
            context.active_code_library.add_linking_library(result.library)
            return context.call_internal(builder, result.fndesc, result.signature, unpack_tuple(builder, values[0]))

        return result.signature.return_type(types.StarArgTuple(arguments)), codegen

    return intrinsic(call)
