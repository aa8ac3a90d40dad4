"""The same kernels in Triton's interpreter, on CPU tensors: for the conformance suite where there is no GPU.

Triton decides when it is imported whether its own functions can be interpreted, so it must not have been imported before.
What its interpreter lacks or gets wrong is mended here, as long as a kernel runs: products and roundings of bfloat16, and
the functions of libdevice.
"""
from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from flexref.problem import Gradients, Output, Problem, Tensors

_LATE = "Triton was imported before its interpreter was asked for; set TRITON_INTERPRET=1 for the whole process"


class Emulated:
    """The engine as a backend of the CPU."""

    how = "interpreted"
    reach = 260

    def __init__(self, module):
        self._module = module
        self.name, self.rank, self.options = module.name, module.rank, module.options
        self._late = prepare()

    def __repr__(self) -> str:
        return f"{self.name} ({self.how})"

    def unavailable(self) -> list[str]:
        return [_LATE] if self._late else []

    def unsupported(self, problem: Problem) -> list[str]:
        reasons = [] if problem.device == "cpu" else [f"the tensors are on {problem.device}, the interpreter runs on cpu"]
        return reasons + self._module.unsupported_anywhere(problem)

    def forward(self, problem: Problem, tensors: Tensors) -> Output:
        from flexref.backends.triton import launch

        with interpreting():
            return launch.forward(problem, tensors)

    def backward(
        self, problem: Problem, tensors: Tensors, output: Output, grad_out: Tensor, grad_lse: Tensor | None
    ) -> Gradients:
        from flexref.backends.triton import launch_backward

        with interpreting():
            return launch_backward.backward(problem, tensors, output, grad_out, grad_lse)


def prepare() -> bool:
    """Imports Triton so that it can be interpreted; whether that is too late."""
    if "triton" in sys.modules:
        from triton.runtime.interpreter import InterpretedFunction

        return not isinstance(sys.modules["triton.language"].sum, InterpretedFunction)
    with interpreted():
        import triton  # noqa: F401
    return False


@contextmanager
def interpreted() -> Iterator[None]:
    """Within it, what Triton decorates is interpreted, not compiled."""
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        yield


@contextmanager
def interpreting() -> Iterator[None]:
    """Within it, kernels that are made or run are interpreted, with what the interpreter lacks."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    patches = [
        interpreted(),
        mock.patch.object(builder, "create_dot", _dot(builder.create_dot)),
        mock.patch.object(builder, "cast_impl", _cast(builder.cast_impl)),
        *_patched_once(interpreter),
        np.errstate(all="ignore"),
    ]
    for patch in patches:
        patch.__enter__()
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.__exit__(None, None, None)


def _patched_once(interpreter) -> list:
    """The interpreter prepares the language again for every function that a kernel calls; once a launch is enough."""
    original, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[int] = set()

    def patch_lang(fn):
        if id(fn.__globals__) in done:
            return None
        done.add(id(fn.__globals__))
        return original(fn)

    def call(self, *args, **kwargs):
        done.clear()
        return launch(self, *args, **kwargs)

    return [
        mock.patch.object(interpreter, "_patch_lang", patch_lang),
        mock.patch.object(interpreter.GridExecutor, "__call__", call),
    ]


def _dot(original):
    """With bfloat16 operands, which NumPy has only as their bits."""

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        from triton.runtime.interpreter import TensorHandle

        if not a.dtype.is_bf16():
            return original(self, a, b, d, input_precision, max_num_imprecise_acc)
        product = np.matmul(_from_bf16(a.data), _from_bf16(b.data), dtype=np.float32)
        return TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    return create_dot


def _from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _cast(original):
    """To bfloat16 by rounding to nearest even, as the hardware does, not by cutting off."""

    def cast_impl(self, src, dst_type):
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        if dst_type.scalar != tl.bfloat16 or src.dtype.scalar != tl.float32:
            return original(self, src, dst_type)
        rounded = torch.from_numpy(np.array(src.data, dtype=np.float32)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16).reshape(src.data.shape), dst_type.scalar)

    return cast_impl


class _Libdevice:
    """The functions of libdevice, which the interpreter has not, computed by PyTorch in the argument's type."""

    def __getattr__(self, name: str) -> Callable:
        function = torch.round if name == "rint" else getattr(torch, name)

        def computed(*arguments):
            import triton.language as tl
            from triton.runtime.interpreter import TensorHandle

            arrays = np.broadcast_arrays(*(x.handle.data for x in arguments))
            result = function(*(torch.from_numpy(np.array(x)) for x in arrays)).numpy()
            scalar, shape = arguments[0].dtype, list(arrays[0].shape)
            type = tl.block_type(scalar, shape) if any(x.type.is_block() for x in arguments) else scalar
            return tl.core.tensor(TensorHandle(result.reshape(arrays[0].shape), scalar), type)

        return computed


libdevice = _Libdevice()
