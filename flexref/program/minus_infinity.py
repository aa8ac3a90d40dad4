"""Where a score_mod is -inf whatever the score is, which is a mask (R5): `where(condition, x, -inf)` in any nesting.

Sums, products and quotients with what is proved finite, and no NaN, keep it.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from flexref.program.interval import Interval
from flexref.program.intervals import Classifier
from flexref.program.ir import Graph, Node, is_const

_INF = float("inf")
# within it a number is finite, and its inverse not 0, in every type
_FINITE = 1e30
_PASSES = {"add": (0, 1), "sub": (0,), "mul": (0, 1), "div": (0,), "detach": (0,)}


class Masking(NamedTuple):
    """What decides about -inf: the inputs and the captured tensors of conditions, and of what is added or multiplied."""

    inputs: frozenset[str]
    captured: tuple[int, ...]


@lru_cache(maxsize=1024)
def masking(graph: Graph) -> Masking | None:
    """None where nothing is masked."""
    may, out = _may_mask(graph), dict(graph.outputs)["out"]
    if not may[out]:
        return None
    found: set[int] = set()
    todo = [out]
    while todo:
        at = todo.pop()
        if at not in found:
            found.add(at)
            node = graph.nodes[at]
            # what is chosen, and is not -inf itself, decides nothing
            chosen = node.args[1:] if node.op == "where" and may[at] else ()
            todo += [arg for arg in node.args if may[arg] or arg not in chosen]
    nodes = [graph.nodes[at] for at in found]
    loads = {int(node.attr) for node in nodes if node.op == "load"}  # type: ignore[arg-type]
    return Masking(frozenset(str(node.attr) for node in nodes if node.op == "input"), tuple(sorted(loads)))


def _may_mask(graph: Graph) -> list[bool]:
    may: list[bool] = []
    for node in graph.nodes:
        args = [may[a] for a in node.args]
        if node.op == "where":
            may.append(args[1] or args[2])
        elif node.op in _PASSES:
            may.append(any(args[i] for i in _PASSES[node.op]))
        else:
            may.append(is_const(node, -_INF))
    return may


class MaskedByScore(Classifier):
    """Says of tiles of positions whether a score_mod is -inf at all of them (EMPTY), at none by itself (FULL), or at some."""

    def __init__(self, graph: Graph, captured: Sequence[Tensor], scalars: Sequence[int | float]):
        super().__init__(graph, captured, scalars)
        self.may = _may_mask(graph)

    def decided(self, values: list[Interval]) -> tuple[Tensor, Tensor]:
        """Where the result is always and where it is never -inf."""
        always: list[Tensor] = []
        never: list[Tensor] = []
        for i, node in enumerate(self.graph.nodes):
            both = self._where(node, values, always, never) if node.op == "where" else self._other(i, node, values, always, never)
            always.append(both[0])
            never.append(both[1])
        out = dict(self.graph.outputs)["out"]
        return always[out], never[out]

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
        passes = [k for k in _PASSES[node.op] if self.may[node.args[k]]]
        passing = [node.args[k] for k in passes]
        sound = torch.tensor(len(passing) == 1, device="cpu")
        # -inf - x is NaN where x is -inf, too: whatever is not what passes has to be harmless
        for arg in (arg for k, arg in enumerate(node.args) if k not in passes):
            sound = sound & _harmless(node.op, values[arg])
        return always[passing[0]] & sound, torch.stack(torch.broadcast_tensors(*(never[a] for a in passing))).all(0)


def _harmless(op: str, value: Interval) -> Tensor:
    """Whether -inf stays -inf beside it."""
    least = 1 / _FINITE if op in ("mul", "div") else -_FINITE
    return (value.low > least) & (value.high < _FINITE) & ~value.nan
