"""Which captured tensor was indexed out of range, with what and on which line (R13): PyTorch's own message names none of it."""
from __future__ import annotations

import torch
from torch import Tensor

from flexref.errors import index_error
from flexref.problem import Problem, Tensors
from flexref.program.interpret import dtype_of, evaluate
from flexref.program.ir import INDICES, Graph, Node

# how many positions are looked at together: bounds the memory
_POSITIONS = 1 << 24


def named_index_error(problem: Problem, tensors: Tensors) -> IndexError | None:
    """The error for the first load that reads past its tensor at a position that concerns its mod; None if none does."""
    rows = max(1, _POSITIONS // max(1, problem.batch * problem.q_heads * problem.kv_len))
    for first in range(0, problem.q_len, rows):
        found = _errors_of(problem, tensors, first, min(first + rows, problem.q_len))
        if found:
            return found[0]
    return None


def _errors_of(problem: Problem, tensors: Tensors, first: int, last: int) -> list[IndexError]:
    """The errors at the query positions from `first` to `last`."""
    shape = (problem.batch, problem.q_heads, last - first, problem.kv_len)
    device = tensors.query.device
    axes = [torch.arange(n, device=device) for n in shape]
    axes[2] += first
    inputs: dict[str, Tensor] = dict(zip(INDICES, torch.meshgrid(*axes, indexing="ij"), strict=True))
    inputs["score"] = torch.zeros(shape, dtype=problem.acc_dtype, device=device)
    yes = torch.ones(shape, dtype=torch.bool, device=device)
    listed, full = yes, ~yes
    if tensors.block_mask is not None:
        listed, full = (x[:, :, first:last].expand(shape) for x in tensors.block_mask.listed())
    found: list[IndexError] = []
    allowed = listed
    if problem.mask is not None:
        result = _checked(problem.mask, problem, tensors, inputs, listed & ~full, found)
        allowed = listed & (full | result.expand(shape))
    if problem.score is not None:
        _checked(problem.score, problem, tensors, inputs, allowed, found)
    return found


def _checked(graph: Graph, problem: Problem, tensors: Tensors, inputs, concerned: Tensor, found: list) -> Tensor:
    """The program's result, its loads kept in range; each that was not, at a position concerned, goes to `found`."""

    def load(_: int, node: Node, indices: list[Tensor]) -> Tensor:
        capture, tensor = problem.captures[int(node.attr)], tensors.captured[int(node.attr)]  # type: ignore[arg-type]
        safe = []
        for dim, (index, size) in enumerate(zip(indices, capture.shape, strict=True)):
            outside = ((index < -size) | (index >= size)).expand(concerned.shape) & concerned
            if outside.any():
                value = int(index.expand(concerned.shape)[outside][0])
                found.append(index_error(capture.name, capture.shape, dim, value, node.where))
            safe.append(index.clamp(-size, size - 1))
        if 0 in capture.shape:
            return torch.zeros((), dtype=dtype_of(node.type, problem.acc_dtype), device="cpu")
        return (tensor.detach()[tuple(safe)] if safe else tensor.detach()).to(dtype_of(node.type, problem.acc_dtype))

    def scalar(_: int, node: Node) -> Tensor:
        number = tensors.scalars[int(node.attr)]  # type: ignore[arg-type]
        return torch.tensor(number, dtype=dtype_of(node.type, problem.acc_dtype), device="cpu")

    values = evaluate(graph, inputs, load, scalar, problem.acc_dtype)
    return values[dict(graph.outputs)["out"]]

