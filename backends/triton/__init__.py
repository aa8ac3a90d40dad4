"""triton, the engine for NVIDIA GPUs: fused, block-sparse, forward, backward and decode, in kernels that Triton compiles."""
from __future__ import annotations

import sys
from importlib.util import find_spec

import torch
from torch import Tensor

from flexref.backends.triton import tiles
from flexref.backends.triton.interpreter import Emulated
from flexref.problem import Gradients, Output, Problem, Tensors

name = "triton"
rank = 40
OLDEST = (8, 0)
LONGEST = 1 << 30
PRECISIONS = ("ieee", "tf32x3", "tf32")
FORMS = ("two_passes", "five_products")
options = {
    **tiles.OPTIONS,
    "splits": "into how many shares the listed blocks of a row are split (decoding), by the size of the GPU by default",
    "tma": "whether tiles are loaded by the tensor memory accelerator; by default where the GPU and the strides allow it",
    "precision": "of float32 products: ieee (default), tf32x3 or tf32",
    "backward": "two_passes (the same bits at every call, default) or five_products (query's gradient by atomic additions)",
}


def unavailable() -> list[str]:
    """Triton compiles the kernels; they need an NVIDIA GPU."""
    if find_spec("triton") is None:
        return ["triton is not installed: pip install triton"]
    if not torch.cuda.is_available():
        return ["there is no CUDA GPU that PyTorch can use: install a driver, and PyTorch with CUDA"]
    best = max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if best < OLDEST:
        return [f"the GPU has compute capability {best[0]}.{best[1]}; it needs {OLDEST[0]}.{OLDEST[1]} or later"]
    return []


def unsupported(problem: Problem) -> list[str]:
    """Everything on a GPU, but gradients of captured tensors with `deterministic`."""
    reasons = [] if problem.device == "cuda" else [f"the tensors are on {problem.device}, it runs on cuda"]
    return reasons + unsupported_anywhere(problem)


def unsupported_anywhere(problem: Problem) -> list[str]:
    """The reasons that have nothing to do with where the tensors are."""
    chosen = dict(problem.options)
    reasons = tiles.wrong_options({name: chosen[name] for name in tiles.OPTIONS if name in chosen})
    for option, known in (("precision", PRECISIONS), ("backward", FORMS), ("tma", (True, False))):
        value = chosen.get(option, known[0])
        if value not in known or isinstance(value, bool) != isinstance(known[0], bool):
            reasons.append(f"option {option} must be one of {', '.join(map(str, known))}, got {value!r}")
    splits = chosen.get("splits", 1)
    if isinstance(splits, bool) or not isinstance(splits, int) or not 1 <= splits < 65536:
        reasons.append(f"option splits must be an int from 1 to 65535, got {splits!r}")
    if max(problem.q_len, problem.kv_len) >= LONGEST:
        reasons.append(f"lengths {problem.q_len} and {problem.kv_len} must be less than {LONGEST}")
    if problem.deterministic and any(capture.needs_grad for capture in problem.captures):
        names = ", ".join(capture.name for capture in problem.captures if capture.needs_grad)
        reasons.append(f"the gradients of captured tensors ({names}) are added up atomically, in no fixed order")
    if problem.deterministic and chosen.get("backward") == "five_products":
        reasons.append("option backward=five_products adds up query's gradient atomically, in no fixed order")
    return reasons


def notes(problem: Problem) -> list[str]:
    """What a user may want to know of how it runs this problem: the tiles, and which did not fit."""
    from flexref.backends.triton import launch

    return launch.notes(problem)


def forward(problem: Problem, tensors: Tensors) -> Output:
    """out (B, Hq, L, Ev) in query's dtype; lse and max_scores (B, Hq, L) in the accumulation type."""
    from flexref.backends.triton import launch

    return launch.forward(problem, tensors)


def backward(
    problem: Problem, tensors: Tensors, output: Output, grad_out: Tensor, grad_lse: Tensor | None
) -> Gradients:
    """The gradients of query, key, value and captured tensors that are needed."""
    from flexref.backends.triton import launch_backward

    return launch_backward.backward(problem, tensors, output, grad_out, grad_lse)


def emulated() -> Emulated:
    """The same kernels in Triton's interpreter, on CPU tensors."""
    return Emulated(sys.modules[__name__])
