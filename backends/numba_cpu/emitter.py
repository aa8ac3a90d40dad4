"""A program's operations in Numba's Python: the table of spellings, types, literals, and reads that cannot go astray."""
from __future__ import annotations

from flexref.problem import Capture
from flexref.program.emitter import Emitter, float_class
from flexref.program.ir import Graph, Node

_READS = {
    "torch.bool": "pointer({0}, uint8)[{1}] != 0",
    "torch.uint8": "int64(pointer({0}, uint8)[{1}])",
    "torch.int8": "int64(pointer({0}, int8)[{1}])",
    "torch.int16": "int64(pointer({0}, int16)[{1}])",
    "torch.int32": "pointer({0}, int32)[{1}]",
    "torch.int64": "pointer({0}, int64)[{1}]",
    "torch.float16": "real(read_float16({0}, {1}))",
    "torch.bfloat16": "real(read_bfloat16({0}, {1}))",
    "torch.float32": "real(pointer({0}, float32)[{1}])",
    "torch.float64": "real(pointer({0}, float64)[{1}])",
}
_WIDE = {"q_idx": "q_at", "kv_idx": "kv_at"}


class NumbaEmitter(Emitter):
    """Prints for one kernel: `captures` say how to read, `small` which int nodes fit 32 bits, `safe` which reads are in range."""

    spell = {
        "add": "{0} + {1}",
        "sub": "{0} - {1}",
        "mul": "{0} * {1}",
        "neg": "-{0}",
        "abs": {"int": "select({0} < 0, -{0}, {0})", "float": "abs({0})"},
        "sign": {"int": "({0} > 0) - ({0} < 0)", "float": "maths.sign({0})"},
        "minimum": {"int": "select({0} < {1}, {0}, {1})", "float": "select(({0} < {1}) | ({0} != {0}), {0}, {1})"},
        "maximum": {"int": "select({0} > {1}, {0}, {1})", "float": "select(({0} > {1}) | ({0} != {0}), {0}, {1})"},
        "floor_div": {"int": "maths.floor_div({0}, {1})", "float": "maths.floor({0} / {1})"},
        "trunc_div": {"int": "maths.trunc_div({0}, {1})", "float": "maths.trunc({0} / {1})"},
        "remainder": {"int": "maths.remainder({0}, {1})", "float": "maths.float_remainder({0}, {1})"},
        "fmod": {"int": "maths.int_fmod({0}, {1})", "float": "maths.fmod({0}, {1})"},
        "div": "{0} / {1}",
        "pow": "{0} ** {1}",
        "atan2": "math.atan2({0}, {1})",
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
        "float_to_int": "maths.to_int({0})",
        "bool_to_int": "int64({0})",
    }

    def __init__(
        self, captures: tuple[Capture, ...], small: frozenset[int] = frozenset(), safe: frozenset[tuple[int, int]] = frozenset()
    ):
        self.captures, self.small, self.safe = captures, small, safe

    def literal(self, value: bool | int | float, type: str) -> str:
        if type == "bool":
            return str(bool(value))
        if type == "int":
            return str(value)
        word = {"nan": "NAN", "inf": "INF", "-inf": "-INF"}.get(float_class(float(value)))
        return word or f"real({float(value)!r})"

    def scalar(self, slot: int, type: str) -> str:
        return f"floats[{slot}]" if type == "float" else f"ints[{slot}]"

    def statements(self, name: str, node: Node, graph: Graph, names: list[str]) -> list[str]:
        position = len(names)
        if node.op == "load":
            return self._checked_load(name, position, node, graph, names)
        (line,) = super().statements(name, node, graph, names)
        if node.type == "bool":
            return [line]
        value = line.partition(" = ")[2]
        kind = "real" if node.type == "float" else "int32" if position in self.small else "int64"
        return [f"{name} = {kind}({value})"]

    def _checked_load(self, name: str, position: int, node: Node, graph: Graph, names: list[str]) -> list[str]:
        """Every index wraps if it is negative and is kept in range, unless it was proved to be; `wrong` remembers."""
        buffer = int(node.attr)  # type: ignore[arg-type]
        lines, terms = [], []
        for dim, arg in enumerate(node.args):
            source = graph.nodes[arg]
            index = _WIDE.get(str(source.attr), names[arg]) if source.op == "input" else names[arg]
            at = f"{name}_{dim}"
            size = f"c{buffer}_n{dim}"
            lines.append(f"{at} = int64({index})")
            if (position, dim) not in self.safe:
                lines += [
                    f"{at} = select({at} < 0, {at} + {size}, {at})",
                    f"{at}_bad = ({at} < 0) | ({at} >= {size})",
                    f"wrong |= int32({at}_bad & concerned)",
                    f"{at} = select({at}_bad, int64(0), {at})",
                ]
            terms.append(f"{at} * c{buffer}_s{dim}")
        place = " + ".join(terms) or "0"
        read = _READS[str(self.captures[buffer].dtype)].format(f"c{buffer}", place)
        return [*lines, f"{name} = {read}"]

    def opening(self, buffers: list[int]) -> list[str]:
        """Where each captured tensor is: its address, strides and sizes, from the table that launch.py fills."""
        lines = []
        for buffer in buffers:
            start = table_start(self.captures, buffer)
            lines.append(f"c{buffer} = captured[{start}]")
            for dim in range(len(self.captures[buffer].shape)):
                lines.append(f"c{buffer}_s{dim} = captured[{start + 1 + 2 * dim}]")
                lines.append(f"c{buffer}_n{dim} = captured[{start + 2 + 2 * dim}]")
        return lines


def table_start(captures: tuple[Capture, ...], buffer: int) -> int:
    """Where the table of captured tensors holds the address of this one; a stride and a size for each dimension follow."""
    return sum(1 + 2 * len(c.shape) for c in captures[:buffer])
