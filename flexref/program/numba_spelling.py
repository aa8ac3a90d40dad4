"""How Python that Numba compiles spells each operation: what the CPU and the CUDA engine have in common.

The names in it (`real`, `select`, `maths`, `INF`) are what each engine's kernels bind them to. Variables are numbers of one kind:
`real` is the accumulation type, integers are int64 or, where that is proved to be enough, int32.
"""
from __future__ import annotations

from flexref.program.emitter import Emitter, float_class
from flexref.program.ir import Graph, Node

SPELL: dict[str, str | dict[str, str]] = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "neg": "-{0}",
    "abs": {"int": "select({0} < 0, -{0}, {0})", "float": "abs({0})"},
    "sign": {"int": "select({0} > 0, 1, select({0} < 0, -1, 0))", "float": "maths.sign({0})"},
    "minimum": {"int": "select({0} < {1}, {0}, {1})", "float": "select(({0} < {1}) | ({0} != {0}), {0}, {1})"},
    "maximum": {"int": "select({0} > {1}, {0}, {1})", "float": "select(({0} > {1}) | ({0} != {0}), {0}, {1})"},
    "floor_div": {"int": "maths.floor_div({0}, {1})", "float": "maths.float_floor_div({0}, {1})"},
    "trunc_div": {"int": "maths.trunc_div({0}, {1})", "float": "maths.trunc({0} / {1})"},
    "remainder": {"int": "maths.remainder({0}, {1})", "float": "maths.float_remainder({0}, {1})"},
    "fmod": {"int": "maths.int_fmod({0}, {1})", "float": "maths.fmod({0}, {1})"},
    "div": "{0} / {1}",
    "pow": "{0} ** {1}",
    "atan2": "math.atan2({0}, {1})",
    "hypot": "math.hypot({0}, {1})",
    "copysign": "math.copysign({0}, {1})",
    "sqrt": "maths.sqrt({0})",
    "rsqrt": "real(1) / maths.sqrt({0})",
    "exp": "maths.exp({0})",
    "exp2": "maths.exp2({0})",
    "expm1": "maths.expm1({0})",
    "log": "maths.log({0})",
    "log2": "maths.log2({0})",
    "log1p": "maths.log1p({0})",
    "sin": "math.sin({0})",
    "cos": "math.cos({0})",
    "tan": "math.tan({0})",
    "asin": "math.asin({0})",
    "acos": "math.acos({0})",
    "atan": "math.atan({0})",
    "sinh": "math.sinh({0})",
    "cosh": "math.cosh({0})",
    "tanh": "maths.tanh({0})",
    "asinh": "math.asinh({0})",
    "acosh": "math.acosh({0})",
    "atanh": "math.atanh({0})",
    "sigmoid": "real(1) / (real(1) + maths.exp(-{0}))",
    "erf": "math.erf({0})",
    "erfc": "math.erfc({0})",
    "lgamma": "math.lgamma({0})",
    "floor": "maths.floor({0})",
    "ceil": "maths.ceil({0})",
    "trunc": "maths.trunc({0})",
    "round": "maths.round_even({0})",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "isnan": "{0} != {0}",
    "isinf": "abs({0}) == INF",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "xor": "{0} != {1}",
    "not": "not {0}",
    "bit_and": "{0} & {1}",
    "bit_or": "{0} | {1}",
    "bit_xor": "{0} ^ {1}",
    "bit_not": "~{0}",
    "shift_left": "{0} << {1}",
    "shift_right": "{0} >> {1}",
    "where": "select({0}, {1}, {2})",
    "int_to_float": "real({0})",
    "detach": "{0}",
    "float_to_int": "maths.to_int({0})",
    "bool_to_int": "int64({0})",
}


class NumbaSpelling(Emitter):
    """What both emitters print alike; each says for itself how a captured tensor is read. `small`: int nodes of 32 bits."""

    spell = SPELL
    small: frozenset[int] = frozenset()

    def literal(self, value: bool | int | float, type: str) -> str:
        if type == "bool":
            return str(bool(value))
        if type == "int":
            return str(value)
        word = {"nan": "NAN", "inf": "INF", "-inf": "-INF"}.get(float_class(float(value)))
        return word or f"real({float(value)!r})"

    def read(self, name: str, position: int, node: Node, graph: Graph, names: list[str]) -> list[str]:
        """The lines that give `name` one element of captured tensor `node.attr`."""
        raise NotImplementedError

    def statements(self, name: str, node: Node, graph: Graph, names: list[str]) -> list[str]:
        position = len(names)
        if node.op == "load":
            return self.read(name, position, node, graph, names)
        (line,) = super().statements(name, node, graph, names)
        if node.type == "bool":
            return [line]
        value = line.partition(" = ")[2]
        kind = "real" if node.type == "float" else "int32" if position in self.small else "int64"
        return [f"{name} = {kind}({value})"]
