"""cupy: CUDA C++ on the tensor cores, compiled at run time through CuPy; kernels that a person can read and change."""
from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from flexref.backends.cupy import plan
from flexref.backends.cupy.emitter import READABLE
from flexref.backends.cupy.kernels_for import parameter_count
from flexref.problem import Gradients, Output, Problem, Tensors

name = "cupy"
rank = 30
options = {
    "q_tile": "query rows of a forward tile: 64 or 128 for float16 and bfloat16, else a multiple of 16",
    "kv_tile": "keys and values of a forward tile: a multiple of 32 for float16 and bfloat16, else of 16",
    "stages": "how many tiles of keys and values are in shared memory at once, 1 to 4",
    "splits": "into how many parts the walk over keys is cut; by itself only where there are few queries",
}
_WIDEST = 256
_LONGEST = 2**31 - 1
# what a launch may pass by value, less what every launch passes
# 4096 bytes, before CUDA 12.1
_PARAMETER_WORDS = 512


def unavailable() -> list[str]:
    """CuPy loads and launches, NVRTC compiles, and the tensor cores must know bfloat16."""
    reasons = []
    if find_spec("cupy") is None:
        reasons.append("cupy is not installed: pip install 'flexref[cupy]', or cupy-cuda13x or cupy-cuda12x for your CUDA")
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        reasons.append("cuda.bindings is not installed: pip install cuda-bindings nvidia-cuda-nvrtc")
    if not torch.cuda.is_available():
        reasons.append("torch sees no CUDA GPU: it needs one, its driver, and a CUDA build of torch")
    elif torch.cuda.get_device_capability()[0] < 8:
        reasons.append("the GPU has a compute capability below 8.0: use one of the Ampere generation or newer")
    return reasons


def unsupported(problem: Problem) -> list[str]:
    """Tensors on a GPU, head sizes to 256, sound options."""
    reasons = [] if problem.device == "cuda" else [f"the tensors are on {problem.device}, it runs on cuda"]
    return reasons + _unsupported(problem)


def _unsupported(problem: Problem) -> list[str]:
    reasons = []
    if max(problem.head_dim, problem.value_dim) > _WIDEST:
        reasons.append(f"head sizes are {problem.head_dim} and {problem.value_dim}, it has tiles for at most {_WIDEST}")
    if max(problem.q_len, problem.kv_len) * problem.group > _LONGEST:
        reasons.append(f"lengths are {problem.q_len} and {problem.kv_len}, it counts positions to {_LONGEST}")
    words = parameter_count(problem)
    if words > _PARAMETER_WORDS:
        reasons.append(f"captured tensors and numbers make {words} words of parameters, a launch holds {_PARAMETER_WORDS}")
    unread = sorted({str(c.dtype) for c in problem.captures} - READABLE)
    if unread:
        reasons.append(f"a captured tensor is {unread[0]}, it reads {', '.join(sorted(READABLE))}")
    return reasons + _wrong_options(problem)


def _wrong_options(problem: Problem) -> list[str]:
    halves = plan.on_tensor_cores(problem)
    wanted = {
        "q_tile": ((64, 128) if halves else range(16, 129, 16), "64 or 128" if halves else "a multiple of 16 up to 128"),
        "kv_tile": (range(32, 129, 32) if halves else range(16, 129, 16), f"a multiple of {32 if halves else 16} up to 128"),
        "stages": (range(1, 5), "1, 2, 3 or 4"),
        "splits": (range(1, 1025), "1 to 1024"),
    }
    reasons = []
    for option, value in problem.options:
        if option in wanted and (isinstance(value, bool) or value not in wanted[option][0]):
            reasons.append(f"option {option} must be {wanted[option][1]}, got {value!r}")
    limit = _shared_limit()
    if not reasons and max(problem.head_dim, problem.value_dim) <= _WIDEST and not plan.fits(problem, limit):
        reasons.append(f"q_tile, kv_tile and stages, or the head sizes, need more than {limit} bytes of shared memory")
    return reasons


@lru_cache(maxsize=1)
def _shared_limit() -> int:
    """What a thread block may use on the least of this machine's GPUs."""
    if not torch.cuda.is_available():
        return plan.SHARED_LIMIT
    devices = range(torch.cuda.device_count())
    found = [getattr(torch.cuda.get_device_properties(i), "shared_memory_per_block_optin", None) for i in devices]
    return min([plan.SHARED_LIMIT, *(size for size in found if size)])


def notes(problem: Problem) -> list[str]:
    """What is worth knowing of how it would run this problem (R15)."""
    captured = any(c.needs_grad for c in problem.captures)
    if problem.deterministic or not (captured or (problem.needs_grad[0] and any(problem.needs_grad[1:]))):
        return []
    return [
        "gradients of query and captured tensors are added up with atomics, so their last bits may differ from call to call; "
        "deterministic=True adds them in order"
    ]


def forward(problem: Problem, tensors: Tensors) -> Output:
    """out (B, Hq, L, Ev) in query's dtype; lse and max_scores (B, Hq, L) in the accumulation type."""
    from flexref.backends.cupy import device, launch

    return launch.forward(problem, tensors, device.machine(tensors.query.device.index))


def backward(
    problem: Problem, tensors: Tensors, output: Output, grad_out: Tensor, grad_lse: Tensor | None
) -> Gradients:
    """The gradients that are needed. Query's and captured tensors' are added up with atomics, so their last bits may differ
    from call to call; with problem.deterministic they are not."""
    from flexref.backends.cupy import device, launch

    machine = device.machine(tensors.query.device.index)
    return launch.backward(problem, tensors, output, grad_out, grad_lse, machine)


@lru_cache(maxsize=8)
def emulated(machine: Any = None) -> Emulated:
    """The same sources compiled by g++ and run on CPU tensors, thread by thread: a backend for the conformance suite.

    `machine`: another one than the process's own, as tests need it.
    """
    from flexref.backends.cupy import host

    return Emulated(machine or host.machine())


class Emulated:
    """This backend on a machine that is no GPU."""

    name, rank, options, how, reach = name, rank, options, "host build", None

    def __init__(self, machine: Any):
        self.machine = machine

    def unavailable(self) -> list[str]:
        """A C++ compiler makes the kernels."""
        from flexref.backends.cupy import host

        return host.unavailable()

    def unsupported(self, problem: Problem) -> list[str]:
        """The same as on a GPU, but for the device."""
        reasons = [] if problem.device == "cpu" else [f"the tensors are on {problem.device}, its emulation runs on cpu"]
        return reasons + _unsupported(problem)

    def forward(self, problem: Problem, tensors: Tensors) -> Output:
        from flexref.backends.cupy import launch

        return launch.forward(problem, tensors, self.machine)

    def backward(
        self, problem: Problem, tensors: Tensors, output: Output, grad_out: Tensor, grad_lse: Tensor | None
    ) -> Gradients:
        from flexref.backends.cupy import launch

        return launch.backward(problem, tensors, output, grad_out, grad_lse, self.machine)
