"""Where a score_mod is -inf whatever the score is, which is a mask (R5): `where(condition, x, -inf)` in any nesting.

Sums, products and quotients with what is proved finite keep it. A position may hold NaN in its score, so nothing that NaN
goes through, such as the smaller of two, counts.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from flexref.program.interval import Interval
from flexref.program.intervals import EMPTY, FULL, PARTIAL, WIDEST, evaluate_intervals
from flexref.program.ir import Graph, Node
from flexref.program.range_tables import Reader

_INF = float("inf")
# within it a number is finite, and its inverse not 0, in every type
_FINITE = 1e30
_PASSES = {"add": (0, 1), "sub": (0,), "mul": (0, 1), "div": (0,), "detach": (0,)}


@lru_cache(maxsize=1024)
def masking(graph: Graph) -> frozenset[int]:
    """The nodes that decide about -inf: those of conditions, and of what is added or multiplied; none if nothing is masked."""
    may = _may_mask(graph)
    found: set[int] = set()
    todo = [dict(graph.outputs)["out"]] if may[dict(graph.outputs)["out"]] else []
    while todo:
        at = todo.pop()
        node = graph.nodes[at]
        found.add(at)
        for i, arg in enumerate(node.args):
            if may[arg]:
                todo.append(arg)
            elif node.op != "where" or i == 0:
                found |= _all_of(graph, arg)
    return frozenset(found)


def _may_mask(graph: Graph) -> list[bool]:
    may: list[bool] = []
    for node in graph.nodes:
        args = [may[a] for a in node.args]
        if node.op == "where":
            may.append(args[1] or args[2])
        elif node.op in _PASSES:
            may.append(any(args[i] for i in _PASSES[node.op]))
        else:
            may.append(node.op == "const" and node.type == "float" and node.attr == -_INF)
    return may


def _all_of(graph: Graph, at: int) -> set[int]:
    found, todo = set(), [at]
    while todo:
        at = todo.pop()
        if at not in found:
            found.add(at)
            todo += graph.nodes[at].args
    return found


def _clean(graph: Graph) -> list[bool]:
    """Nodes that no score goes into, and whose bounds would tell of a NaN."""
    clean: list[bool] = []
    for node in graph.nodes:
        known = node.op not in ("minimum", "maximum") and not (node.op == "input" and node.attr == "score")
        clean.append(known and all(clean[a] for a in node.args))
    return clean


class MaskedByScore:
    """Says of tiles of positions whether a score_mod is -inf at all of them (EMPTY), at none by itself (FULL), or at some."""

    def __init__(self, graph: Graph, captured: Sequence[Tensor], scalars: Sequence[int | float]):
        self.graph, self.scalars = graph, scalars
        self.readers = [Reader(x) for x in captured]
        self.may, self.clean, self.asked = _may_mask(graph), _clean(graph), masking(graph)

    def __call__(self, b: Interval, h: Interval, q_idx: Interval, kv_idx: Interval) -> Tensor:
        """EMPTY, FULL or PARTIAL: int8 (N,). Each input is a point, or (N,) of first and last."""
        inputs = {"b": b, "h": h, "q_idx": q_idx, "kv_idx": kv_idx}
        values = evaluate_intervals(self.graph, inputs, self._load, self.scalars)
        always: list[Tensor] = []
        never: list[Tensor] = []
        for i, node in enumerate(self.graph.nodes):
            both = self._where(node, values, always, never) if node.op == "where" else self._other(i, node, values, always, never)
            always.append(both[0])
            never.append(both[1])
        out = dict(self.graph.outputs)["out"]
        ends = [end for index in inputs.values() for end in index]
        count = len(torch.broadcast_tensors(torch.zeros(1, device="cpu"), *ends)[0])
        kind = torch.full((count,), PARTIAL, dtype=torch.int8, device="cpu")
        return kind.masked_fill_(never[out], FULL).masked_fill_(always[out], EMPTY)

    def _load(self, node: Node, indices: list[Interval]) -> Interval:
        return self.readers[int(node.attr)].read(indices, WIDEST[node.type])  # type: ignore[arg-type]

    def _where(self, node: Node, values: list[Interval], always: list[Tensor], never: list[Tensor]) -> tuple[Tensor, Tensor]:
        condition, a, b = node.args
        true, false = values[condition].low > 0, values[condition].high < 1
        return (
            (true & always[a]) | (false & always[b]) | (always[a] & always[b]),
            (true & never[a]) | (false & never[b]) | (never[a] & never[b]),
        )

    def _other(self, i: int, node: Node, values, always: list[Tensor], never: list[Tensor]) -> tuple[Tensor, Tensor]:
        if node.op == "const" or not self.may[i]:
            here = torch.tensor(self.may[i], device="cpu")
            return here, ~here
        passing = [node.args[k] for k in _PASSES[node.op] if self.may[node.args[k]]]
        rest = [a for a in node.args if not self.may[a]]
        sound = torch.tensor(len(passing) == 1, device="cpu")
        for arg in rest:
            sound = sound & self._harmless(node.op, arg, values[arg])
        return always[passing[0]] & sound, torch.stack(torch.broadcast_tensors(*(never[a] for a in passing))).all(0)

    def _harmless(self, op: str, arg: int, value: Interval) -> Tensor:
        """Whether -inf stays -inf beside it."""
        if not self.clean[arg]:
            return torch.tensor(False, device="cpu")
        least = 1 / _FINITE if op in ("mul", "div") else -_FINITE
        return (value.low > least) & (value.high < _FINITE)


