"""numba_cpu, the embedded default: fused, block-sparse, forward and backward, on every core of the CPU."""
from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

from flexref.problem import Gradients, Output, Problem, Tensors

name = "numba_cpu"
rank = 10
lists = "runs"
options = {
    "q_tile": "query rows of a tile: rounded up to whole vector registers, 64 by default",
    "kv_tile": "keys and values of a tile, 128 by default",
    "threads": "how many threads work on a call, torch.get_num_threads() by default",
}


def unavailable() -> list[str]:
    """Numba compiles the kernels and llvmlite loads them."""
    missing = [package for package in ("numba", "llvmlite") if find_spec(package) is None]
    return [f"{package} is not installed: pip install {package}" for package in missing]


def unsupported(problem: Problem) -> list[str]:
    """Everything on a CPU is supported."""
    reasons = [] if problem.device == "cpu" else [f"the tensors are on {problem.device}, it runs on cpu"]
    for option, value in problem.options:
        if option in options and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            reasons.append(f"option {option} must be a positive int, got {value!r}")
    return reasons


def forward(problem: Problem, tensors: Tensors) -> Output:
    """out (B, Hq, L, Ev) in query's dtype; lse and max_scores (B, Hq, L) in the accumulation type."""
    from flexref.backends.numba_cpu import launch

    return launch.forward(problem, tensors)


def backward(
    problem: Problem, tensors: Tensors, output: Output, grad_out: Tensor, grad_lse: Tensor | None
) -> Gradients:
    """The gradients of query, key, value and captured tensors that are needed; the same bits at every call."""
    from flexref.backends.numba_cpu import launch

    return launch.backward(problem, tensors, output, grad_out, grad_lse)
