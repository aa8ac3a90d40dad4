"""What a kernel may leave out: which integers fit 32 bits, and which reads of captured tensors cannot go astray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from flexref.program.interval import interval
from flexref.program.intervals import WIDEST, evaluate_intervals, index_ranges
from flexref.program.ir import Graph

WIDEST_INT = 2**31 - 1


def small_ints(graph: Graph, extents: Mapping[str, int]) -> frozenset[int]:
    """The int nodes whose values fit 32 bits whatever the captured tensors and numbers are."""
    return _small_ints(graph, tuple(extents.items()))


@lru_cache(maxsize=512)
def _small_ints(graph: Graph, extents: tuple[tuple[str, int], ...]) -> frozenset[int]:
    inputs = {name: interval(0.0, max(extent - 1.0, 0.0)) for name, extent in extents}
    # a captured number is another one at the next call, so nothing is known of it here
    ranges = evaluate_intervals(graph, inputs, lambda node, indices: WIDEST[node.type], scalars=None)
    fits = {i for i, x in enumerate(ranges) if float(x.low) >= -WIDEST_INT and float(x.high) <= WIDEST_INT}
    return frozenset(i for i in fits if graph.nodes[i].type == "int" and graph.nodes[i].op not in ("load", "scalar"))


def safe_reads(graph: Graph, extents: Mapping[str, int], shapes: Sequence[tuple[int, ...]]) -> frozenset[tuple[int, int]]:
    """The (load, dimension) pairs whose index is never negative and never past the end; `shapes` by captured tensor."""
    safe = set()
    for position, ranges in index_ranges(graph, extents).items():
        shape = shapes[int(graph.nodes[position].attr)]  # type: ignore[arg-type]
        safe |= {(position, d) for d, (low, high) in enumerate(ranges) if 0 <= low and high < shape[d]}
    return frozenset(safe)


def all_safe(graph: Graph, safe: frozenset[tuple[int, int]]) -> bool:
    """Whether every index of every load is among `safe`."""
    return all((i, d) in safe for i in graph.loads for d in range(len(graph.nodes[i].args)))
