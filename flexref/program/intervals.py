"""What is known of a program without running it at every position: interval arithmetic over its nodes.

Elementwise over whatever is asked about at once, such as many tiles. Anything not understood is the widest interval, so
every answer is safe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from flexref.program.interval import Interval, interval
from flexref.program.ir import Graph, Node
from flexref.program.range_tables import Reader

EMPTY, PARTIAL, FULL = 0, 1, 2
_INF = float("inf")
# a float comparison is only trusted if it holds by more than what rounding in float32 can change
_MARGIN = 1e-4
_EXACT = float(1 << 53)


WIDEST = {"bool": interval(0.0, 1.0), "int": interval(-_INF, _INF), "float": interval(-_INF, _INF)}


def evaluate_intervals(
    graph: Graph,
    inputs: Mapping[str, Interval],
    load: Callable[[Node, list[Interval]], Interval],
    scalars: Sequence[int | float] | None,
) -> list[Interval]:
    """The interval of every node; `scalars` None means that nothing is known of them."""
    values: list[Interval] = []
    for node in graph.nodes:
        args = [values[a] for a in node.args]
        value = WIDEST[node.type]
        if node.op == "input":
            values.append(inputs.get(str(node.attr), value))
            continue
        if node.op == "const":
            value = interval(float(node.attr))  # type: ignore[arg-type]
        elif node.op == "scalar" and scalars is not None:
            value = interval(float(scalars[int(node.attr)]))  # type: ignore[arg-type]
        elif node.op == "load":
            value = load(node, args)
        elif node.op in _COMPARE:
            exact = all(graph.nodes[a].type != "float" for a in node.args)
            value = _compare(node.op, *args, margin=0.0 if exact else _MARGIN)
        elif node.op in _RULES:
            value = _known(_RULES[node.op](*args))
            if node.op == "remainder" and node.type == "int":
                value = _int_remainder(value, args[1])
        values.append(_whole(value) if node.type == "int" else value)
    return values


class Classifier:
    """Says of tiles of positions, as many as one likes, whether a mask allows all of a tile, none of it, or it is not known."""

    def __init__(self, graph: Graph, captured: Sequence[Tensor], scalars: Sequence[int | float]):
        self.graph, self.scalars = graph, scalars
        self.readers = [Reader(x) for x in captured]

    def __call__(self, b: Interval, h: Interval, q_idx: Interval, kv_idx: Interval) -> Tensor:
        """EMPTY, FULL or PARTIAL (not known): int8 (N,). Each input is a point, or (N,) of first and last."""
        inputs = {"b": b, "h": h, "q_idx": q_idx, "kv_idx": kv_idx}
        empty, full = self.decided(evaluate_intervals(self.graph, inputs, self._load, self.scalars))
        ends = [end for index in inputs.values() for end in index]
        count = len(torch.broadcast_tensors(torch.zeros(1, device="cpu"), *ends)[0])
        kind = torch.full((count,), PARTIAL, dtype=torch.int8, device="cpu")
        return kind.masked_fill_(full, FULL).masked_fill_(empty, EMPTY)

    def decided(self, values: list[Interval]) -> tuple[Tensor, Tensor]:
        """Which tiles are empty and which are full, from the interval of every node."""
        out = values[dict(self.graph.outputs)["out"]]
        return out.high < 1, out.low > 0

    def _load(self, node: Node, indices: list[Interval]) -> Interval:
        return self.readers[int(node.attr)].read(indices, WIDEST[node.type])  # type: ignore[arg-type]


def index_ranges(
    graph: Graph, extents: Mapping[str, int], scalars: Sequence[int | float] | None = None
) -> dict[int, list[tuple[float, float]]]:
    """For each load, the lowest and highest value of each of its indices, when every input is in [0, extent).

    What a captured tensor holds is not looked at, so an index read from one is (-inf, inf).
    """
    found: dict[int, list[tuple[float, float]]] = {}
    inputs = {name: interval(0.0, max(extent - 1.0, 0.0)) for name, extent in extents.items()}
    nodes = {id(node): i for i, node in enumerate(graph.nodes)}

    def load(node: Node, indices: list[Interval]) -> Interval:
        found[nodes[id(node)]] = [(float(i.low), float(i.high)) for i in indices]
        return WIDEST[node.type]

    evaluate_intervals(graph, inputs, load, scalars)
    return found


def _known(x: Interval) -> Interval:
    """NaN, as from inf - inf, means not known."""
    low = torch.where(x.low.isnan(), -_INF, x.low)
    return Interval(low, torch.where(x.high.isnan(), _INF, x.high))


def _whole(x: Interval) -> Interval:
    """Of integers beyond 53 bits, which float64 rounds and 64 bits may wrap, nothing is known."""
    beyond = (x.low <= -_EXACT) | (x.high >= _EXACT)
    return Interval(torch.where(beyond, -_INF, x.low), torch.where(beyond, _INF, x.high))


def _compare(op: str, a: Interval, b: Interval, margin: float) -> Interval:
    gap = 0.0
    if margin:
        ends = [x.abs().nan_to_num(posinf=0.0) for x in (*a, *b)]
        gap = margin * (ends[0] + ends[1] + ends[2] + ends[3])
    if op in ("gt", "ge"):
        a, b, op = b, a, {"gt": "lt", "ge": "le"}[op]
    if op in ("lt", "le"):
        always = (a.high + gap < b.low) if op == "lt" or margin else (a.high <= b.low)
        never = (a.low >= b.high + gap) if op == "lt" and not margin else (a.low > b.high + gap)
        return Interval(always.double(), (~never).double())
    point = (a.low == a.high) & (b.low == b.high) & (a.low == b.low)
    apart = (a.high + gap < b.low) | (b.high + gap < a.low)
    same = Interval((point if not margin else torch.zeros_like(point)).double(), (~apart).double())
    return same if op == "eq" else Interval(1 - same.high, 1 - same.low)


def _mul(a: Interval, b: Interval) -> Interval:
    products = torch.stack(torch.broadcast_tensors(a.low * b.low, a.low * b.high, a.high * b.low, a.high * b.high))
    return Interval(products.amin(0), products.amax(0))


def _divided(a: Interval, b: Interval, rounded: Callable[[Tensor], Tensor]) -> Interval:
    """By a positive divisor, which keeps the order; else not known."""
    ends = [rounded(x / y) for x in a for y in b]
    ends = torch.stack(torch.broadcast_tensors(*ends))
    positive = b.low > 0
    return Interval(torch.where(positive, ends.amin(0), -_INF), torch.where(positive, ends.amax(0), _INF))


def _remainder(a: Interval, b: Interval) -> Interval:
    point = (b.low == b.high) & (b.low > 0)
    turn = torch.floor(a.low / b.low)
    same_turn = point & (turn == torch.floor(a.high / b.low))
    low = torch.where(same_turn, a.low - turn * b.low, torch.where(b.low > 0, 0.0, -_INF))
    high = torch.where(same_turn, a.high - turn * b.low, torch.where(b.low > 0, b.high, _INF))
    return Interval(low, high)


def _int_remainder(x: Interval, divisor: Interval) -> Interval:
    """Of whole numbers: at most one less than a positive divisor."""
    return Interval(x.low, torch.where(divisor.low > 0, torch.minimum(x.high, divisor.high - 1), x.high))


def _abs(a: Interval) -> Interval:
    low = torch.where((a.low <= 0) & (a.high >= 0), 0.0, torch.minimum(a.low.abs(), a.high.abs()))
    return Interval(low, torch.maximum(a.low.abs(), a.high.abs()))


def _where(c: Interval, a: Interval, b: Interval) -> Interval:
    low = torch.where(c.low > 0, a.low, torch.where(c.high < 1, b.low, torch.minimum(a.low, b.low)))
    high = torch.where(c.low > 0, a.high, torch.where(c.high < 1, b.high, torch.maximum(a.high, b.high)))
    return Interval(low, high)


def _xor(a: Interval, b: Interval) -> Interval:
    known = (a.low == a.high) & (b.low == b.high)
    value = (a.low != b.low).double()
    return Interval(torch.where(known, value, 0.0), torch.where(known, value, 1.0))


_COMPARE = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})
_RULES: dict[str, Callable[..., Interval]] = {
    "add": lambda a, b: Interval(a.low + b.low, a.high + b.high),
    "sub": lambda a, b: Interval(a.low - b.high, a.high - b.low),
    "mul": _mul,
    "neg": lambda a: Interval(-a.high, -a.low),
    "abs": _abs,
    "minimum": lambda a, b: Interval(torch.minimum(a.low, b.low), torch.minimum(a.high, b.high)),
    "maximum": lambda a, b: Interval(torch.maximum(a.low, b.low), torch.maximum(a.high, b.high)),
    "floor_div": lambda a, b: _divided(a, b, torch.floor),
    "trunc_div": lambda a, b: _divided(a, b, torch.trunc),
    "div": lambda a, b: _divided(a, b, lambda x: x),
    "remainder": _remainder,
    "and": lambda a, b: Interval(torch.minimum(a.low, b.low), torch.minimum(a.high, b.high)),
    "or": lambda a, b: Interval(torch.maximum(a.low, b.low), torch.maximum(a.high, b.high)),
    "xor": _xor,
    "not": lambda a: Interval(1 - a.high, 1 - a.low),
    "where": _where,
    "int_to_float": lambda a: a,
    "bool_to_int": lambda a: a,
    "detach": lambda a: a,
    "float_to_int": lambda a: Interval(a.low.trunc(), a.high.trunc()),
    "floor": lambda a: Interval(a.low.floor(), a.high.floor()),
    "ceil": lambda a: Interval(a.low.ceil(), a.high.ceil()),
}
