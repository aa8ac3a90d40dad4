"""What is known of a program without running it at every position: interval arithmetic over its nodes.

Elementwise over whatever is asked about at once, such as many tiles. Anything not understood is the widest interval, so
every answer is safe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from flexref.program.interval import Interval, interval, known, rounded
from flexref.program.ir import Graph, Node
from flexref.program.range_tables import Reader

EMPTY, PARTIAL, FULL = 0, 1, 2
_INF = float("inf")
_EXACT = float(1 << 53)
_TRUE = torch.tensor(True, device="cpu")
# by how much a division may miss that does not round to the nearest number
_QUOTIENT = 2.0**-21

WIDEST = {
    "bool": interval(0.0, 1.0),
    "int": interval(-_INF, _INF),
    "float": Interval(*interval(-_INF, _INF)[:2], _TRUE),
}


def evaluate_intervals(
    graph: Graph,
    inputs: Mapping[str, Interval],
    load: Callable[[Node, list[Interval]], Interval],
    scalars: Sequence[int | float] | None,
) -> list[Interval]:
    """The interval of every node, as engines calculate it, in float32 or in float64; `scalars` None: nothing is known of them."""
    values: list[Interval] = []
    for node in graph.nodes:
        args = [values[a] for a in node.args]
        value = WIDEST[node.type]
        if node.op == "input":
            value = inputs.get(str(node.attr), value)
        elif node.op == "const":
            value = interval(float(node.attr))  # type: ignore[arg-type]
        elif node.op == "scalar" and scalars is not None:
            value = interval(float(scalars[int(node.attr)]))  # type: ignore[arg-type]
        elif node.op == "load":
            value = load(node, args)
        elif node.op in _FLOAT and graph.nodes[node.args[0]].type == "float":
            value = known(_FLOAT[node.op](*args))
        elif node.op in _RULES:
            value = known(_RULES[node.op](*args))
        values.append(_whole(value) if node.type == "int" else rounded(value) if node.type == "float" else value)
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
        ends = [end for index in inputs.values() for end in index[:2]]
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


def _whole(x: Interval) -> Interval:
    """Of integers beyond 53 bits, which float64 rounds and 64 bits may wrap, nothing is known; and none is NaN."""
    beyond = (x.low <= -_EXACT) | (x.high >= _EXACT)
    return Interval(torch.where(beyond, -_INF, x.low), torch.where(beyond, _INF, x.high))


def _less(a: Interval, b: Interval, equal: bool) -> Interval:
    """Of numbers: NaN is less than nothing, and not equal to anything."""
    always = (a.high <= b.low if equal else a.high < b.low) & ~(a.nan | b.nan)
    never = a.low > b.high if equal else a.low >= b.high
    return Interval(always.double(), (~never).double())


def _equal(a: Interval, b: Interval) -> Interval:
    always = (a.low == a.high) & (b.low == b.high) & (a.low == b.low) & ~(a.nan | b.nan)
    never = (a.high < b.low) | (b.high < a.low)
    return Interval(always.double(), (~never).double())


def _not(a: Interval) -> Interval:
    return Interval(1 - a.high, 1 - a.low)


def _add(a: Interval, b: Interval) -> Interval:
    opposite = (a.high == _INF) & (b.low == -_INF) | (a.low == -_INF) & (b.high == _INF)
    return Interval(a.low + b.low, a.high + b.high, a.nan | b.nan | opposite)


def _neg(a: Interval) -> Interval:
    return Interval(-a.high, -a.low, a.nan)


def _mul(a: Interval, b: Interval) -> Interval:
    products = torch.stack(torch.broadcast_tensors(a.low * b.low, a.low * b.high, a.high * b.low, a.high * b.high))
    endless = _holds_zero(a) & _is_endless(b) | _holds_zero(b) & _is_endless(a)
    return Interval(products.amin(0), products.amax(0), a.nan | b.nan | endless)


def _holds_zero(a: Interval) -> Tensor:
    return (a.low <= 0) & (a.high >= 0)


def _is_endless(a: Interval) -> Tensor:
    return (a.low == -_INF) | (a.high == _INF)


def _divided(a: Interval, b: Interval, whole: Callable[[Tensor], Tensor]) -> Interval:
    """By a positive divisor, which keeps the order; else not known."""
    ends = [whole(x / y) for x in a[:2] for y in b[:2]]
    ends = torch.stack(torch.broadcast_tensors(*ends))
    positive = b.low > 0
    low, high = torch.where(positive, ends.amin(0), -_INF), torch.where(positive, ends.amax(0), _INF)
    return Interval(low, high, a.nan | b.nan | ~positive)


def _quotient(a: Interval, b: Interval) -> Interval:
    """Of floats: as rounded, and as far off as an engine's quick division may be."""
    exact = known(_divided(a, b, lambda x: x))
    return rounded(Interval(exact.low - exact.low.abs() * _QUOTIENT, exact.high + exact.high.abs() * _QUOTIENT, exact.nan))


def _floor_quotient(a: Interval, b: Interval) -> Interval:
    """PyTorch goes by the remainder, which an infinite number has not."""
    x, endless = _quotient(a, b), _is_endless(a) | _is_endless(b)
    low, high = torch.where(endless, -_INF, x.low.floor()), torch.where(endless, _INF, x.high.floor())
    return Interval(low, high, x.nan | endless)


def _rounding(whole: Callable[[Tensor], Tensor]) -> Callable[[Interval], Interval]:
    return lambda a: Interval(whole(a.low), whole(a.high), a.nan)


def _to_int(a: Interval) -> Interval:
    """What NaN becomes, or what 64 bits do not hold, is another number on every machine."""
    lost = a.nan | (a.low <= -_EXACT) | (a.high >= _EXACT)
    return Interval(torch.where(lost, -_INF, a.low.trunc()), torch.where(lost, _INF, a.high.trunc()))


def _remainder(a: Interval, b: Interval) -> Interval:
    """Of whole numbers: at most one less than a positive divisor."""
    point = (b.low == b.high) & (b.low > 0)
    turn = torch.floor(a.low / b.low)
    same_turn = point & (turn == torch.floor(a.high / b.low))
    low = torch.where(same_turn, a.low - turn * b.low, torch.where(b.low > 0, 0.0, -_INF))
    high = torch.where(same_turn, a.high - turn * b.low, torch.where(b.low > 0, b.high - 1, _INF))
    return Interval(low, high)


def _float_remainder(a: Interval, b: Interval) -> Interval:
    """From 0 to a positive divisor, which rounding may reach; of an infinite number it is NaN."""
    high = torch.where(b.low > 0, b.high, _INF)
    no_number = _is_endless(a) | _is_endless(b) | (b.low <= 0)
    return Interval(torch.where(b.low > 0, 0.0, -_INF), high, a.nan | b.nan | no_number)


def _abs(a: Interval) -> Interval:
    low = torch.where((a.low <= 0) & (a.high >= 0), 0.0, torch.minimum(a.low.abs(), a.high.abs()))
    return Interval(low, torch.maximum(a.low.abs(), a.high.abs()), a.nan)


def _where(c: Interval, a: Interval, b: Interval) -> Interval:
    low = torch.where(c.low > 0, a.low, torch.where(c.high < 1, b.low, torch.minimum(a.low, b.low)))
    high = torch.where(c.low > 0, a.high, torch.where(c.high < 1, b.high, torch.maximum(a.high, b.high)))
    return Interval(low, high, (a.nan & (c.high > 0)) | (b.nan & (c.low < 1)))


def _lower(a: Interval, b: Interval) -> Interval:
    """NaN goes through the smaller of two."""
    return Interval(torch.minimum(a.low, b.low), torch.minimum(a.high, b.high), a.nan | b.nan)


def _higher(a: Interval, b: Interval) -> Interval:
    return Interval(torch.maximum(a.low, b.low), torch.maximum(a.high, b.high), a.nan | b.nan)


def _xor(a: Interval, b: Interval) -> Interval:
    known = (a.low == a.high) & (b.low == b.high)
    value = (a.low != b.low).double()
    return Interval(torch.where(known, value, 0.0), torch.where(known, value, 1.0))


_RULES: dict[str, Callable[..., Interval]] = {
    "lt": lambda a, b: _less(a, b, equal=False),
    "le": lambda a, b: _less(a, b, equal=True),
    "gt": lambda a, b: _less(b, a, equal=False),
    "ge": lambda a, b: _less(b, a, equal=True),
    "eq": _equal,
    "ne": lambda a, b: _not(_equal(a, b)),
    "add": _add,
    "sub": lambda a, b: _add(a, _neg(b)),
    "mul": _mul,
    "neg": _neg,
    "abs": _abs,
    "minimum": _lower,
    "maximum": _higher,
    "floor_div": lambda a, b: _divided(a, b, torch.floor),
    "trunc_div": lambda a, b: _divided(a, b, torch.trunc),
    "remainder": _remainder,
    "and": _lower,
    "or": _higher,
    "xor": _xor,
    "not": _not,
    "where": _where,
    "int_to_float": lambda a: a,
    "bool_to_int": lambda a: a,
    "detach": lambda a: a,
    "float_to_int": _to_int,
    "floor": _rounding(torch.floor),
    "ceil": _rounding(torch.ceil),
}
# of floats, where they are not those of whole numbers
_FLOAT: dict[str, Callable[..., Interval]] = {
    "div": _quotient,
    "floor_div": _floor_quotient,
    "trunc_div": lambda a, b: _rounding(torch.trunc)(_quotient(a, b)),
    "remainder": _float_remainder,
}
