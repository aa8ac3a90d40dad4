"""A user's function as data: a printable, checkable, pointwise program in single-assignment form.

    graph  ::= node* "return" (name "=" ref)*
    node   ::= ref "=" op ref* ":" type
    op     ::= "input" NAME            score, b, h, q_idx, kv_idx; in a derivative also grad
             | "const" VALUE
             | "scalar" SLOT           a captured Python number, given at run time
             | "load" BUFFER ref*      one element of a captured tensor, one int index a dimension
             | a row of ops.OPS
    type   ::= "bool" | "int" | "float"

A node refers only to nodes above it, by position.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from functools import cached_property

from flexref.program.ops import OPS, TYPES

INDICES = ("b", "h", "q_idx", "kv_idx")
INPUT_TYPES = {"score": "float", "grad": "float", **dict.fromkeys(INDICES, "int")}
LEAVES = ("input", "const", "scalar", "load")


@dataclass(frozen=True)
class Node:
    """One operation. `attr` is the input's name, the constant's value, the scalar's slot or the load's buffer."""

    op: str
    args: tuple[int, ...]
    type: str
    attr: str | int | float | bool | None = None
    where: str = field(default="", compare=False)

    @cached_property
    def key(self) -> tuple:
        """What makes two nodes the same: constants by their bits, so that -0.0 is not 0.0 and nan is nan."""
        attr = struct.pack("<d", self.attr) if isinstance(self.attr, float) else self.attr
        return (self.op, self.args, self.type, type(self.attr).__name__, attr)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Node) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes in order, and the named results: {"out": ref} of a mod; "score" and "load<buffer node>" of a derivative."""

    nodes: tuple[Node, ...]
    outputs: tuple[tuple[str, int], ...]

    @cached_property
    def _hash(self) -> int:
        return hash((self.nodes, self.outputs))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Graph) and (self.nodes, self.outputs) == (other.nodes, other.outputs)

    @property
    def loads(self) -> list[int]:
        """The positions of the loads, in order."""
        return [i for i, node in enumerate(self.nodes) if node.op == "load"]

    def uses(self, name: str) -> bool:
        """Whether the program reads the input `name`."""
        return any(node.op == "input" and node.attr == name for node in self.nodes)

    def __str__(self) -> str:
        lines = []
        for i, node in enumerate(self.nodes):
            attr = "" if node.attr is None else f" {node.attr!r}" if node.op == "const" else f" {node.attr}"
            args = "".join(f" %{a}" for a in node.args)
            where = f"    # {node.where}" if node.where and node.op == "load" else ""
            lines.append(f"%{i} = {node.op}{attr}{args} : {node.type}{where}")
        results = ", ".join(f"{name}=%{ref}" for name, ref in self.outputs)
        return "\n".join([*lines, f"return {results}"])


def differentiable_loads(graph: Graph) -> set[int]:
    """The captured tensors, by number, that the output depends on through floats alone, with no stop between."""
    todo, seen = [ref for _, ref in graph.outputs], set()
    while todo:
        at = todo.pop()
        node = graph.nodes[at]
        if at not in seen and node.type == "float" and node.op != "detach":
            seen.add(at)
            todo += node.args
    return {int(graph.nodes[at].attr) for at in seen if graph.nodes[at].op == "load"}  # type: ignore[arg-type]


def is_const(node: Node, value: float) -> bool:
    """Whether a node is this constant."""
    return node.op == "const" and node.attr == value


def check(graph: Graph) -> None:
    """Raise AssertionError, naming the node, if the graph breaks the grammar or a type."""
    for i, node in enumerate(graph.nodes):
        assert node.type in TYPES, f"%{i}: unknown type {node.type!r}"
        assert all(0 <= a < i for a in node.args), f"%{i}: an argument is not above it"
        types = "".join(graph.nodes[a].type[0] for a in node.args)
        if node.op == "input":
            assert INPUT_TYPES.get(str(node.attr)) == node.type, f"%{i}: input {node.attr} is no {node.type}"
        elif node.op == "load":
            assert set(types) <= {"i"}, f"%{i}: a load's indices are int, got {types}"
        elif node.op not in LEAVES:
            assert node.op in OPS, f"%{i}: unknown operation {node.op!r}"
            _check_signature(i, node, types + node.type[0])
    for name, ref in graph.outputs:
        assert 0 <= ref < len(graph.nodes), f"output {name} is no node"


def _check_signature(i: int, node: Node, actual: str) -> None:
    wanted = OPS[node.op].signature
    assert len(wanted) == len(actual), f"%{i}: {node.op} takes {len(wanted) - 1} arguments"
    free: dict[str, str] = {}
    for w, a in zip(wanted, actual, strict=True):
        allowed = {"n": "if", "t": "ifb"}.get(w, w)
        assert a in allowed and free.setdefault(w, a) == a, f"%{i}: {node.op} is {wanted}, got {actual}"
