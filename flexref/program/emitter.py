"""The base of every emitter: it walks a program and prints one operation a line, nothing nested.

A language is a subclass: a table of spellings, a literal for every constant, a way to load.
"""

from __future__ import annotations

import math

from flexref.program.ir import Graph, Node


class Emitter:
    """Turns a program into lines of source.

    `spell[op]` is a format string over argument names, or a dict from the argument type to one where types differ;
    an operation of ops.OPS that a language cannot have is named in `lacks` with the reason.
    """

    assign = "{name} = {value}"
    spell: dict[str, str | dict[str, str]] = {}
    lacks: dict[str, str] = {}

    def literal(self, value: bool | int | float, type: str) -> str:
        """A constant in this language, for inf, nan, -0.0 and negative numbers too."""
        raise NotImplementedError

    def scalar(self, slot: int, type: str) -> str:
        """The captured Python number of this slot, given at run time."""
        raise NotImplementedError

    def load(self, node: Node, indices: list[str], names: list[str]) -> str:
        """One element of captured tensor `node.attr`."""
        raise NotImplementedError

    def spelling(self, op: str, arg_type: str) -> str:
        """The format string of one operation."""
        row = self.spell[op]
        return row if isinstance(row, str) else row[arg_type]

    def emit(self, graph: Graph, prefix: str, inputs: dict[str, str]) -> tuple[list[str], dict[str, str]]:
        """Source lines, and the variable that holds each output.

        `prefix` keeps the variables of two programs apart; `inputs` names the variable of each program input.
        """
        names: list[str] = []
        lines: list[str] = []
        for i, node in enumerate(graph.nodes):
            if node.op == "input":
                names.append(inputs[str(node.attr)])
                continue
            name = f"{prefix}{i}"
            lines += self.statements(name, node, graph, names)
            names.append(name)
        return lines, {output: names[ref] for output, ref in graph.outputs}

    def statements(self, name: str, node: Node, graph: Graph, names: list[str]) -> list[str]:
        """The lines that give `name` its value; a language may need more than one for a load."""
        args = [names[a] for a in node.args]
        if node.op == "const":
            value = self.literal(node.attr, node.type)  # type: ignore[arg-type]
        elif node.op == "scalar":
            value = self.scalar(int(node.attr), node.type)  # type: ignore[arg-type]
        elif node.op == "load":
            value = self.load(node, args, names)
        else:
            value = self.spelling(node.op, graph.nodes[node.args[0]].type).format(*args)
        return [self.assign.format(name=name, value=value, type=node.type)]


def float_class(value: float) -> str:
    """nan, inf, -inf, negative or plain: what a `literal` has to tell apart."""
    if math.isnan(value):
        return "nan"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return "negative" if math.copysign(1.0, value) < 0 else "plain"
