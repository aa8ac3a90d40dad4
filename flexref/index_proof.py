"""Whether captured tensors can be read out of range at all (R13), from what the index tensors hold.

A kernel on a GPU can only tell of a bad index through memory that the host waits for. So the host looks first: the
smallest and the largest value of each captured tensor of integers, once for as long as nobody writes to it, bound every
index that comes out of it. What stays open after that is checked by the kernel.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from flexref.problem import Problem, Tensors
from flexref.program.interval import Interval, interval
from flexref.program.intervals import WIDEST, evaluate_intervals
from flexref.program.ir import Graph, Node
from flexref.program.proofs import all_safe, safe_reads
from flexref.recent import Recent

_bounds = Recent(1024)
_proofs = Recent(1024)
_INF = float("inf")


def proved_in_range(problem: Problem, tensors: Tensors) -> bool:
    """Whether no index that a mod gives to a captured tensor is out of range; negative ones count from the end.

    Waits for the device once for each captured tensor of integers that is new or was written to, and never again.
    """
    open_graphs = _not_proved_by_lengths(problem)
    if not open_graphs:
        return True
    bounds = tuple(_bounds_of(t) for t in tensors.captured)
    shapes = tuple(capture.shape for capture in problem.captures)
    key = (open_graphs, tuple(problem.extents.values()), shapes, bounds, tensors.scalars)
    return _proofs.get(key, lambda: all(_in_range(graph, problem, bounds, tensors.scalars) for graph in open_graphs))


@lru_cache(maxsize=4096)
def _not_proved_by_lengths(problem: Problem) -> tuple[Graph, ...]:
    """The programs with a read that the lengths alone do not keep in range; none where there is no position at all."""
    if 0 in (problem.batch, problem.q_len, problem.kv_len):
        return ()
    shapes = [capture.shape for capture in problem.captures]
    graphs = (graph for graph in (problem.score, problem.mask) if graph is not None)
    return tuple(graph for graph in graphs if not all_safe(graph, safe_reads(graph, problem.extents, shapes)))


def _bounds_of(tensor: Tensor) -> tuple[float, float]:
    """The least and the greatest element of a tensor of integers; of any other, no bounds."""
    if tensor.is_floating_point() or tensor.numel() == 0:
        return -_INF, _INF
    if tensor.is_inference():
        return _read_bounds(tensor)
    key = (id(tensor), tensor._version, tensor.data_ptr())
    return _bounds.get(key, lambda: _read_bounds(tensor), keep_alive=tensor)


def _read_bounds(tensor: Tensor) -> tuple[float, float]:
    if tensor.dtype == torch.uint64:
        return 0.0, _INF
    low, high = tensor.detach().to(torch.int64).aminmax()
    return float(low), float(high)


def _in_range(graph: Graph, problem: Problem, bounds: tuple[tuple[float, float], ...], scalars) -> bool:
    inputs = {name: interval(0.0, max(extent - 1.0, 0.0)) for name, extent in problem.extents.items()}
    sound = True

    def load(node: Node, indices: list[Interval]) -> Interval:
        nonlocal sound
        buffer = int(node.attr)  # type: ignore[arg-type]
        for index, size in zip(indices, problem.captures[buffer].shape, strict=True):
            sound &= float(index.low) >= -size and float(index.high) < size
        return WIDEST[node.type] if node.type == "float" else interval(*bounds[buffer])

    evaluate_intervals(graph, inputs, load, scalars)
    return sound
