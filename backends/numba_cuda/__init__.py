"""numba_cuda, the engine to hack on: the attention kernels are Python, which Numba compiles for the GPU or simulates on a CPU."""
from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexref.problem import Gradients, Output, Problem, Tensors

if TYPE_CHECKING:
    from flexref.backends.numba_cuda.emulation import Emulated

name = "numba_cuda"
rank = 20
options = {
    "q_tile": "query rows of a tile",
    "kv_tile": "keys and values of a tile",
    "splits": "over how many blocks of threads the keys of a row are shared out, for few queries and many keys",
    "product": "how tiles are multiplied: 'mma' (tensor cores, float16 and bfloat16) or 'fma' (any dtype)",
}
_HALVES = (torch.float16, torch.bfloat16)


def unavailable() -> list[str]:
    """Numba compiles the kernels for the GPU that torch sees."""
    reasons = _missing()
    if not torch.cuda.is_available():
        reasons.append("torch sees no CUDA GPU: run on a machine with one and install torch built for CUDA")
    elif simulating():
        reasons.append("numba.cuda is loaded as a simulator in this process; use another one for the GPU")
    elif not reasons:
        from flexref.backends.numba_cuda.compiler import import_error

        reasons = [why for why in (import_error(),) if why]
    return reasons


def simulating() -> bool:
    """Whether Numba's simulator has taken the place of its compiler, which lasts as long as the process."""
    loaded = sys.modules.get("numba.core.config")
    return "numba.cuda" in sys.modules and bool(getattr(loaded, "ENABLE_CUDASIM", 0))


def _missing() -> list[str]:
    missing = [package for package in ("numba", "numba_cuda") if find_spec(package) is None]
    return ["numba-cuda is not installed: pip install 'numba-cuda[cu13]'"] if missing else []


def unsupported(problem: Problem) -> list[str]:
    """Any problem whose tensors are on a GPU, but for captured gradients that shall have the same bits at every call."""
    reasons = [] if problem.device == "cuda" else [f"the tensors are on {problem.device}, it runs on cuda"]
    return reasons + _limits(problem)


def _limits(problem: Problem) -> list[str]:
    reasons = []
    for option, value in problem.options:
        if option == "product" and value not in ("mma", "fma"):
            reasons.append(f"option product must be 'mma' or 'fma', got {value!r}")
        elif option in options and option != "product" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            reasons.append(f"option {option} must be a positive int, got {value!r}")
    if ("product", "mma") in problem.options and problem.dtype not in _HALVES:
        reasons.append(f"option product='mma' is for float16 and bfloat16, the query is {problem.dtype}")
    if problem.deterministic and any(c.needs_grad for c in problem.captures):
        reasons.append(
            "gradients of captured tensors are added up with atomics, in any order, and deterministic=True was asked for"
        )
    return reasons


def notes(problem: Problem) -> list[str]:
    """How a problem is run, where that is not to be expected."""
    if any(c.needs_grad for c in problem.captures):
        return ["gradients of captured tensors are added up with atomics: a second call may give other last bits"]
    return []


def forward(problem: Problem, tensors: Tensors) -> Output:
    """out (B, Hq, L, Ev) in query's dtype; lse and max_scores (B, Hq, L) in the accumulation type."""
    from flexref.backends.numba_cuda import device, launch

    return launch.forward(problem, tensors, device.gpu())


def backward(
    problem: Problem, tensors: Tensors, output: Output, grad_out: Tensor, grad_lse: Tensor | None
) -> Gradients:
    """The gradients of query, key, value and captured tensors that are needed."""
    from flexref.backends.numba_cuda import device, launch

    return launch.backward(problem, tensors, output, grad_out, grad_lse, device.gpu())


def emulated() -> Emulated:
    """The same kernels on tensors of the CPU, in Numba's simulator."""
    from flexref.backends.numba_cuda.emulation import Emulated

    return Emulated()
