"""A program's operations in CUDA C++: the table of spellings, types, literals, and reads that cannot go astray."""
from __future__ import annotations

from flexref.problem import Capture
from flexref.program.emitter import Emitter, float_class
from flexref.program.ir import Graph, Node

_READS = {
    "torch.bool": "read_bool({0}, {1})",
    "torch.uint8": "read_int<unsigned char>({0}, {1})",
    "torch.int8": "read_int<signed char>({0}, {1})",
    "torch.int16": "read_int<short>({0}, {1})",
    "torch.int32": "read_int<int>({0}, {1})",
    "torch.int64": "read_int<long long>({0}, {1})",
    "torch.float16": "read_float<Half>({0}, {1})",
    "torch.bfloat16": "read_float<Bfloat>({0}, {1})",
    "torch.float32": "read_float<float>({0}, {1})",
    "torch.float64": "read_float<double>({0}, {1})",
}
READABLE = frozenset(_READS)
# 64-bit arithmetic wraps, as PyTorch's does; signed overflow has no meaning in C++, and NVRTC makes use of that
_WRAPPING = {
    "add": "(long long)((unsigned long long){0} + (unsigned long long){1})",
    "sub": "(long long)((unsigned long long){0} - (unsigned long long){1})",
    "mul": "(long long)((unsigned long long){0} * (unsigned long long){1})",
    "neg": "(long long)(0ull - (unsigned long long){0})",
    "abs": "{0} < 0 ? (long long)(0ull - (unsigned long long){0}) : (long long){0}",
}
_BOTH_WIDTHS = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})


def _math(name: str, count: int = 1) -> str:
    return f"MATH({name})({', '.join(f'{{{i}}}' for i in range(count))})"


class CudaEmitter(Emitter):
    """Prints for one kernel: `captures` say how to read, `small` which int nodes fit 32 bits, `safe` which reads are in range.

    `checked`: of a read that was not proved to be in range, and is kept there, `wrong` remembers that it was not.
    """

    spell = {
        "add": "{0} + {1}",
        "sub": "{0} - {1}",
        "mul": "{0} * {1}",
        "neg": "-{0}",
        "abs": {"int": "{0} < 0 ? -{0} : {0}", "float": "MATH(fabs)({0})"},
        "sign": {"int": "({0} > 0) - ({0} < 0)", "float": "sign_of({0})"},
        "minimum": {"int": "{0} < {1} ? {0} : {1}", "float": "smaller_or_nan({0}, {1})"},
        "maximum": {"int": "{0} > {1} ? {0} : {1}", "float": "larger_or_nan({0}, {1})"},
        "floor_div": {"int": "floor_div({0}, {1})", "float": "floor_div_of({0}, {1})"},
        "trunc_div": {"int": "trunc_div({0}, {1})", "float": "MATH(trunc)({0} / {1})"},
        "remainder": {"int": "remainder_int({0}, {1})", "float": "remainder_of({0}, {1})"},
        "fmod": {"int": "fmod_int({0}, {1})", "float": _math("fmod", 2)},
        "div": "{0} / {1}",
        "pow": _math("pow", 2),
        "atan2": _math("atan2", 2),
        "hypot": _math("hypot", 2),
        "copysign": _math("copysign", 2),
        "sqrt": _math("sqrt"),
        "rsqrt": "(real)1 / MATH(sqrt)({0})",
        "exp": _math("exp"),
        "exp2": _math("exp2"),
        "expm1": _math("expm1"),
        "log": _math("log"),
        "log2": _math("log2"),
        "log1p": _math("log1p"),
        "sin": _math("sin"),
        "cos": _math("cos"),
        "tan": _math("tan"),
        "asin": _math("asin"),
        "acos": _math("acos"),
        "atan": _math("atan"),
        "sinh": _math("sinh"),
        "cosh": _math("cosh"),
        "tanh": _math("tanh"),
        "asinh": _math("asinh"),
        "acosh": _math("acosh"),
        "atanh": _math("atanh"),
        "sigmoid": "(real)1 / ((real)1 + MATH(exp)(-{0}))",
        "erf": _math("erf"),
        "erfc": _math("erfc"),
        "lgamma": _math("lgamma"),
        "floor": _math("floor"),
        "ceil": _math("ceil"),
        "trunc": _math("trunc"),
        "round": _math("rint"),
        "lt": "{0} < {1}",
        "le": "{0} <= {1}",
        "gt": "{0} > {1}",
        "ge": "{0} >= {1}",
        "eq": "{0} == {1}",
        "ne": "{0} != {1}",
        "isnan": "{0} != {0}",
        "isinf": "MATH(fabs)({0}) == (real)INFINITE",
        "and": "{0} && {1}",
        "or": "{0} || {1}",
        "xor": "{0} != {1}",
        "not": "!{0}",
        "bit_and": "{0} & {1}",
        "bit_or": "{0} | {1}",
        "bit_xor": "{0} ^ {1}",
        "bit_not": "~{0}",
        "shift_left": "shift_left({0}, {1})",
        "shift_right": "shift_right({0}, {1})",
        "where": "{0} ? {1} : {2}",
        "int_to_float": "(real){0}",
        "detach": "{0}",
        "float_to_int": "to_int({0})",
        "bool_to_int": "{0} ? 1 : 0",
    }

    def __init__(
        self,
        captures: tuple[Capture, ...],
        small: frozenset[int] = frozenset(),
        safe: frozenset[tuple[int, int]] = frozenset(),
        checked: bool = True,
    ):
        self.captures, self.small, self.safe, self.checked = captures, small, safe, checked

    def literal(self, value: bool | int | float, type: str) -> str:
        if type == "bool":
            return "true" if value else "false"
        if type == "int":
            # the most negative one has no literal of its own
            return f"({int(value) + 1}ll - 1)" if value < 0 else f"{int(value)}ll"
        word = {"nan": "NOT_A_NUMBER", "inf": "INFINITE", "-inf": "-INFINITE"}.get(float_class(float(value)))
        return f"(real){word or f'({float(value)!r})'}"

    def scalar(self, slot: int, type: str) -> str:
        return f"(real)p.floats[{slot}]" if type == "float" else f"p.ints[{slot}]"

    def statements(self, name: str, node: Node, graph: Graph, names: list[str]) -> list[str]:
        position = len(names)
        if node.op == "load":
            return self._read(name, position, node, names)
        narrow = self.is_small(position, node)
        ints = [a for a in node.args if graph.nodes[a].type == "int"]
        if all(self.is_small(a, graph.nodes[a]) for a in ints) and (narrow or node.op in _BOTH_WIDTHS):
            arguments = names
        else:
            # 64-bit meaning: the operation itself is done in 64 bits
            arguments = [f"(long long){x}" if i in ints else x for i, x in enumerate(names)]
            if node.type == "int" and node.op in _WRAPPING:
                args = [names[a] for a in node.args]
                return [f"const long long {name} = {_WRAPPING[node.op].format(*args)};"]
        (line,) = super().statements(name, node, graph, arguments)
        kind = {"bool": "bool", "float": "real"}.get(node.type, "int" if narrow else "long long")
        value = line.partition(" = ")[2]
        return [f"const {kind} {name} = {f'(int)({value})' if kind == 'int' else value};"]

    def is_small(self, position: int, node: Node) -> bool:
        """Whether the variable of this node has 32 bits: the indices are given so."""
        return node.type == "int" and (node.op == "input" or position in self.small)

    def _read(self, name: str, position: int, node: Node, names: list[str]) -> list[str]:
        """Every index wraps if it is negative and is kept in range, unless its bounds were proved; `wrong` remembers."""
        buffer = int(node.attr)  # type: ignore[arg-type]
        start = table_start(self.captures, buffer)
        lines, terms = [], []
        for dim, arg in enumerate(node.args):
            at, size = f"{name}_{dim}", f"p.captured[{start + 2 + 2 * dim}]"
            if (position, dim) in self.safe:
                lines.append(f"const long long {at} = {names[arg]};")
            else:
                lines += [
                    f"long long {at} = {names[arg]} < 0 ? {names[arg]} + {size} : {names[arg]};",
                    f"const bool {at}_bad = {at} < 0 || {at} >= {size};",
                ]
                if self.checked:
                    lines.append(f"wrong |= {at}_bad && concerned;")
                lines.append(f"if ({at}_bad) {at} = 0;")
            terms.append(f"{at} * p.captured[{start + 1 + 2 * dim}]")
        read = _READS[str(self.captures[buffer].dtype)].format(f"p.captured[{start}]", " + ".join(terms) or "0")
        kind = {"bool": "bool", "float": "real"}.get(node.type, "long long")
        comment = f"  // {node.where}" if node.where else ""
        return [*lines, f"const {kind} {name} = {read};{comment}"]


def table_start(captures: tuple[Capture, ...], buffer: int) -> int:
    """Where Params.captured holds the address of this captured tensor; a stride and a size for each dimension follow."""
    return sum(1 + 2 * len(c.shape) for c in captures[:buffer])
