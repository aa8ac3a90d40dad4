"""Runs a program on tensors: the living definition of the IR, and what derive.py differentiates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from flexref.program.ir import Graph, Node
from flexref.program.ops import OPS


def interpret(
    graph: Graph,
    inputs: Mapping[str, Tensor],
    captured: Sequence[Tensor] = (),
    scalars: Sequence[int | float] = (),
    acc_dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The outputs of `graph`, for inputs that broadcast together.

    Loads index the captured tensors as PyTorch does: negative indices wrap, others out of range raise IndexError.
    """

    def load(_: int, node: Node, indices: list[Tensor]) -> Tensor:
        buffer = captured[int(node.attr)]  # type: ignore[arg-type]
        element = buffer[tuple(indices)] if indices else buffer
        return element.to(dtype_of(node.type, acc_dtype))

    def scalar(_: int, node: Node) -> Tensor:
        number = scalars[int(node.attr)]  # type: ignore[arg-type]
        return torch.tensor(number, dtype=dtype_of(node.type, acc_dtype), device="cpu")

    values = evaluate(graph, inputs, load, scalar, acc_dtype)
    return {name: values[ref] for name, ref in graph.outputs}


def evaluate(
    graph: Graph,
    inputs: Mapping[str, Tensor],
    load: Callable[[int, Node, list[Tensor]], Tensor],
    scalar: Callable[[int, Node], Tensor],
    acc_dtype: torch.dtype,
) -> list[Tensor]:
    """The value of every node; `load` and `scalar` are told the node's position."""
    values: list[Tensor] = []
    for i, node in enumerate(graph.nodes):
        args = [values[a] for a in node.args]
        if node.op == "input":
            values.append(inputs[str(node.attr)])
        elif node.op == "const":
            number = torch.full((), node.attr, dtype=dtype_of(node.type, acc_dtype), device="cpu")  # type: ignore[arg-type]
            values.append(number)
        elif node.op == "scalar":
            values.append(scalar(i, node))
        elif node.op == "load":
            values.append(load(i, node, args))
        elif node.op == "int_to_float":
            values.append(args[0].to(acc_dtype))
        else:
            values.append(OPS[node.op].meaning(*args))
    return values


def dtype_of(type: str, acc_dtype: torch.dtype) -> torch.dtype:
    """The tensor dtype that carries a program type."""
    return {"bool": torch.bool, "int": torch.int64, "float": acc_dtype}[type]
