"""Builds a Graph node by node: one node for equal nodes, and PyTorch's type promotion over three types."""

from __future__ import annotations

import torch

from flexref.program.ir import INPUT_TYPES, Graph, Node
from flexref.program.ops import OPS

ORDER = {"bool": 0, "int": 1, "float": 2}
CASTS = {
    ("bool", "int"): ["bool_to_int"],
    ("bool", "float"): ["bool_to_int", "int_to_float"],
    ("int", "float"): ["int_to_float"],
    ("float", "int"): ["float_to_int"],
}


def type_of(dtype: torch.dtype) -> str:
    """The program type that carries a tensor dtype."""
    if dtype == torch.bool:
        return "bool"
    return "float" if dtype.is_floating_point else "int"


class Builder:
    """Values are node positions or plain Python numbers; every method takes either and returns a position."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._positions: dict[Node, int] = {}

    def node(self, op: str, args: tuple[int, ...], type: str, attr=None, where: str = "") -> int:
        """The position of this node, new or already there."""
        node = Node(op, args, type, attr, where)
        if node not in self._positions:
            self._positions[node] = len(self.nodes)
            self.nodes.append(node)
        return self._positions[node]

    def input(self, name: str) -> int:
        return self.node("input", (), INPUT_TYPES[name], name)

    def const(self, value: bool | int | float, type: str | None = None) -> int:
        """A constant, of its own Python type or of `type`."""
        type = type or ("bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "float")
        converted = {"bool": bool, "int": int, "float": float}[type](value)
        return self.node("const", (), type, converted)

    def value(self, x) -> int:
        """A position, or a Python number turned into a constant. A bool is a number here: positions are Ref."""
        return x.position if isinstance(x, Ref) else self.const(x)

    def cast(self, x, type: str) -> int:
        """`x` converted to another type, as `Tensor.to` does."""
        if not isinstance(x, Ref) and not (isinstance(x, float) and type == "int"):
            return self.const(x, type)
        at = self.value(x)
        have = self.nodes[at].type
        if have == type:
            return at
        if type == "bool":
            return self.node("ne", (at, self.const(0, have)), "bool")
        for op in CASTS[have, type]:
            at = self.node(op, (at,), "int" if op.endswith("_int") else "float")
        return at

    def type(self, x) -> str:
        if isinstance(x, Ref):
            return self.nodes[x.position].type
        return "bool" if isinstance(x, bool) else "int" if isinstance(x, int) else "float"

    def op(self, name: str, *args) -> Ref:
        """An operation on promoted arguments: to the widest of them, and to what its signature asks for."""
        *wanted, result = OPS[name].signature
        if name == "where":
            common = max((self.type(a) for a in args[1:]), key=ORDER.__getitem__)
            refs = (self.cast(args[0], "bool"), *(self.cast(a, common) for a in args[1:]))
            return Ref(self.node(name, refs, common))
        common = max((self.type(a) for a in args), key=ORDER.__getitem__)
        names = {"f": "float", "i": "int", "b": "bool", "n": common if common != "bool" else "int"}
        refs = tuple(self.cast(a, names[w]) for a, w in zip(args, wanted, strict=True))
        if name == "mul" and self._nothing(*refs):
            return Ref(self.const(0))
        return Ref(self.node(name, refs, names[result]))

    def _nothing(self, a: int, b: int) -> bool:
        """Whether it is an index times 0, as where a mask of one head serves all: what is read may not be left out so."""
        one, other = sorted((self.nodes[a], self.nodes[b]), key=lambda node: node.op)
        return one.op == "const" and one.type == "int" and one.attr == 0 and other.op == "input" and other.type == "int"

    def graph(self, outputs: dict[str, int], kept: tuple[int, ...] = ()) -> Graph:
        """The finished program, without the nodes that neither an output nor `kept` needs.

        An output `load<position>` is renamed with the node that it speaks of.
        """
        keep, todo = set(), [*outputs.values(), *kept]
        while todo:
            at = todo.pop()
            if at not in keep:
                keep.add(at)
                todo += self.nodes[at].args
        order = sorted(keep)
        new = {old: i for i, old in enumerate(order)}
        nodes = [self.nodes[old] for old in order]
        nodes = [Node(n.op, tuple(new[a] for a in n.args), n.type, n.attr, n.where) for n in nodes]
        renamed = {f"load{at}": f"load{new[at]}" for at in kept}
        return Graph(tuple(nodes), tuple((renamed.get(name, name), new[at]) for name, at in outputs.items()))

    def copy(self, graph: Graph) -> list[int]:
        """Add every node of `graph`; where each of them now is."""
        places: list[int] = []
        for node in graph.nodes:
            args = tuple(places[a] for a in node.args)
            places.append(self.node(node.op, args, node.type, node.attr, node.where))
        return places


class Ref:
    """A position in a Builder, told apart from a Python int."""

    __slots__ = ("position",)

    def __init__(self, position: int):
        self.position = position
