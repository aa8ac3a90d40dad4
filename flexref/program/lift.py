"""Numbers that a mod captures become scalars of its program, which a kernel is given at run time."""

from __future__ import annotations

import math
from collections.abc import Callable

from flexref.program.builder import Builder
from flexref.program.closure import Leaves
from flexref.program.ir import Graph

# a divisor that is known when the kernel is compiled is much faster, so it stays a constant
_STAYS_CONSTANT = {"floor_div", "trunc_div", "remainder", "fmod", "pow", "shift_left", "shift_right"}


def captured_numbers(leaves: Leaves | None) -> Callable[[int | float], bool]:
    """Whether a constant is a captured number: one that was found or, where not all was, one that is not in the mod's code."""
    if leaves is None:
        return lambda value: False
    if leaves.why:
        return lambda value: math.isfinite(value) and value not in leaves.literals
    return lambda value: value in leaves.numbers


def lift(graph: Graph, is_captured: Callable[[int | float], bool]) -> tuple[Graph, tuple[int | float, ...]]:
    """Constants that are captured numbers become scalars, so that another value needs no other kernel."""
    pinned = {n.args[1] for n in graph.nodes if n.op in _STAYS_CONSTANT}
    builder, places, slots = Builder(), [], []
    for i, node in enumerate(graph.nodes):
        number = node.op == "const" and node.type != "bool" and i not in pinned
        if number and is_captured(node.attr):  # type: ignore[arg-type]
            places.append(builder.node("scalar", (), node.type, len(slots)))
            slots.append(node.attr)
        else:
            args = tuple(places[a] for a in node.args)
            places.append(builder.node(node.op, args, node.type, node.attr, node.where))
    return builder.graph({name: places[ref] for name, ref in graph.outputs}), tuple(slots)
