"""A score_mod that masks, taken apart: `where(condition, x, -inf)` is the mask `condition` and the score x (R5)."""
from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from flexref.program.builder import Builder, Ref
from flexref.program.ir import Graph, is_const

_INF = float("inf")


class Split(NamedTuple):
    """`score`: None where nothing but the score is left. Both programs read the captures of the one that they were."""

    score: Graph | None
    mask: Graph


@lru_cache(maxsize=1024)
def split_score(graph: Graph) -> Split | None:
    """None for a program that does not end in choices between a score and -inf by something that no score goes into."""
    taken = _Taken(graph)
    allowed, value = taken.apart(dict(graph.outputs)["out"])
    if allowed is None:
        return None
    builder = taken.builder
    score = builder.graph({"out": value})
    plain = len(score.nodes) == 1 and score.nodes[0].op == "input"
    return Split(None if plain else score, builder.graph({"out": allowed}))


class _Taken:
    def __init__(self, graph: Graph):
        self.nodes, self.builder = graph.nodes, Builder()
        self.places = self.builder.copy(graph)
        # what no score goes into
        self.still: list[bool] = []
        for node in graph.nodes:
            score = node.op == "input" and node.attr == "score"
            self.still.append(not score and all(self.still[a] for a in node.args))

    def apart(self, at: int) -> tuple[int | None, int]:
        """Where a node is not masked (None: nothing is known to be), and what it is there; places in the builder."""
        node, place = self.nodes[at], self.places[at]
        if node.op != "where" or node.type != "float":
            return None, place
        condition, a, b = node.args
        if is_const(self.nodes[b], -_INF):
            return self._kept(condition, a, True)
        if is_const(self.nodes[a], -_INF):
            return self._kept(condition, b, False)
        (here, value), (there, other) = self.apart(a), self.apart(b)
        if (here is None and there is None) or not self.still[condition]:
            return None, place
        c = self.places[condition]
        parts = (self._and(c, here), self._and(self._not(c), there))
        return self._op("or", *parts), self._op("where", c, value, other)

    def _kept(self, condition: int, branch: int, when: bool) -> tuple[int | None, int]:
        """Of a choice between a branch and -inf."""
        allowed, value = self.apart(branch)
        c = self.places[condition]
        c = c if when else self._not(c)
        if self.still[condition]:
            return self._and(c, allowed), value
        # where the score chooses, its choice stays
        return allowed, self._op("where", c, value, self.builder.const(-_INF))

    def _op(self, name: str, *places: int) -> int:
        return self.builder.op(name, *map(Ref, places)).position

    def _not(self, place: int) -> int:
        return self._op("not", place)

    def _and(self, place: int, other: int | None) -> int:
        return place if other is None else self._op("and", place, other)
