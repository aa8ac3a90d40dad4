"""A program's operations in Triton's Python: the table of spellings, types, literals, and reads that cannot go astray."""
from __future__ import annotations

from functools import lru_cache

from flexref.problem import Capture
from flexref.program.emitter import Emitter, float_class
from flexref.program.ir import Graph, Node

_NARROW, _WIDE = "tl.int32", "tl.int64"
_DIVISOR = "tl.where({1} == 0, 1, {1})"
# good to some units in the last place, a fraction of the time: for values that are rounded to half types soon after
_ROUGH = {
    "div": "{0} / {1}",
    "tanh": "rough_tanh({0})",
    "sigmoid": "1.0 / (1.0 + tl.exp2({0} * -LOG2E))",
}
# what a small error of an argument changes the result of by more than as much
_JUMPS = frozenset(
    "floor ceil trunc round sign floor_div trunc_div remainder fmod float_to_int lt le gt ge eq ne isinf isnan".split()
)


class TritonEmitter(Emitter):
    """Prints for one kernel: `captures` say how to read, `small` which int nodes fit 32 bits, `safe` which reads are in range.

    `near`: the captured tensors whose every element is less than 2^31 elements from the first. `checks`: the
    reads that are not in `safe` are checked, and `wrong` remembers; either way they wrap and are kept in range.
    `rough`: the operations of _ROUGH may be off by some units in the last place, where nothing that jumps comes after.
    """

    spell = {
        "add": "{0} + {1}",
        "sub": "{0} - {1}",
        "mul": "{0} * {1}",
        "neg": "-{0}",
        "abs": "tl.abs({0})",
        "sign": {
            "int": "({0} > 0).to(tl.int32) - ({0} < 0).to(tl.int32)",
            "float": "({0} > 0).to(real) - ({0} < 0).to(real)",
        },
        "minimum": {"int": "tl.minimum({0}, {1})", "float": "tl.where(({0} < {1}) | ({0} != {0}), {0}, {1})"},
        "maximum": {"int": "tl.maximum({0}, {1})", "float": "tl.where(({0} > {1}) | ({0} != {0}), {0}, {1})"},
        "floor_div": {"int": "int_floor_div({0}, {1})", "float": "float_floor_div({0}, {1})"},
        "trunc_div": {"int": f"{{0}} // {_DIVISOR}", "float": "libdevice.trunc(divide({0}, {1}))"},
        "remainder": {"int": "int_remainder({0}, {1})", "float": "float_remainder({0}, {1})"},
        "fmod": {"int": f"{{0}} % {_DIVISOR}", "float": "libdevice.fmod({0}, {1})"},
        "div": "divide({0}, {1})",
        "pow": "libdevice.pow({0}, {1})",
        "atan2": "libdevice.atan2({0}, {1})",
        "hypot": "libdevice.hypot({0}, {1})",
        "copysign": "libdevice.copysign({0}, {1})",
        "sqrt": "square_root({0})",
        "rsqrt": "divide(tl.full([], 1.0, real), square_root({0}))",
        "exp": "libdevice.exp({0})",
        "exp2": "libdevice.exp2({0})",
        "expm1": "libdevice.expm1({0})",
        "log": "libdevice.log({0})",
        "log2": "libdevice.log2({0})",
        "log1p": "libdevice.log1p({0})",
        "sin": "libdevice.sin({0})",
        "cos": "libdevice.cos({0})",
        "tan": "libdevice.tan({0})",
        "asin": "libdevice.asin({0})",
        "acos": "libdevice.acos({0})",
        "atan": "libdevice.atan({0})",
        "sinh": "libdevice.sinh({0})",
        "cosh": "libdevice.cosh({0})",
        "tanh": "libdevice.tanh({0})",
        "asinh": "libdevice.asinh({0})",
        "acosh": "libdevice.acosh({0})",
        "atanh": "libdevice.atanh({0})",
        "sigmoid": "divide(tl.full([], 1.0, real), 1.0 + libdevice.exp(-{0}))",
        "erf": "libdevice.erf({0})",
        "erfc": "libdevice.erfc({0})",
        "lgamma": "libdevice.lgamma({0})",
        "floor": "tl.floor({0})",
        "ceil": "tl.ceil({0})",
        "trunc": "libdevice.trunc({0})",
        "round": "libdevice.rint({0})",
        "lt": "{0} < {1}",
        "le": "{0} <= {1}",
        "gt": "{0} > {1}",
        "ge": "{0} >= {1}",
        "eq": "{0} == {1}",
        "ne": "{0} != {1}",
        "isnan": "{0} != {0}",
        "isinf": 'tl.abs({0}) == float("inf")',
        "and": "{0} & {1}",
        "or": "{0} | {1}",
        "xor": "{0} ^ {1}",
        "not": "{0} == 0",
        "bit_and": "{0} & {1}",
        "bit_or": "{0} | {1}",
        "bit_xor": "{0} ^ {1}",
        "bit_not": "~{0}",
        "shift_left": "{0} << {1}",
        "shift_right": "{0} >> {1}",
        "where": "tl.where({0}, {1}, {2})",
        "int_to_float": "{0}.to(real)",
        "detach": "{0}",
        "float_to_int": "{0}.to(tl.int64)",
        "bool_to_int": "{0}.to(tl.int32)",
    }

    def __init__(
        self,
        captures: tuple[Capture, ...],
        small: frozenset[int] = frozenset(),
        safe: frozenset[tuple[int, int]] = frozenset(),
        near: frozenset[int] = frozenset(),
        checks: object = True,
        rough: bool = False,
    ):
        self.captures, self.small, self.safe, self.near, self.checks = captures, small, safe, near, checks is not False
        self.rough = rough

    def literal(self, value: bool | int | float, type: str) -> str:
        if type == "bool":
            return f"tl.full([], {bool(value)}, tl.int1)"
        if type == "int":
            return f"tl.full([], {value}, {_WIDE})"
        word = {"nan": 'float("nan")', "inf": 'float("inf")', "-inf": 'float("-inf")'}.get(float_class(float(value)))
        return f"tl.full([], {word or repr(float(value))}, real)"

    def scalar(self, slot: int, type: str) -> str:
        return f"tl.full([], {type[0]}{slot}, {'real' if type == 'float' else _WIDE})"

    def statements(self, name: str, node: Node, graph: Graph, names: list[str]) -> list[str]:
        position = len(names)
        if node.op == "load":
            return self._load(name, position, node, names)
        if node.type == "int" and position in self.small:
            (line,) = super().statements(name, node, graph, names)
            return [line.replace(_WIDE, _NARROW) if node.op == "const" else line]
        if node.type == "int":
            # 32-bit arguments grow before the operation, not after it
            names = [f"{x}.to({_WIDE})" if graph.nodes[i].type == "int" else x for i, x in enumerate(names)]
        if self.rough and node.op in _ROUGH and position not in before_jumps(graph):
            return [f"{name} = {_ROUGH[node.op].format(*(names[arg] for arg in node.args))}"]
        return super().statements(name, node, graph, names)

    def _load(self, name: str, position: int, node: Node, names: list[str]) -> list[str]:
        """Every index wraps if it is negative and is kept in range, unless its bounds were proved; `wrong` remembers."""
        buffer = int(node.attr)  # type: ignore[arg-type]
        capture, width = self.captures[buffer], _NARROW if buffer in self.near else _WIDE
        lines, terms = [], []
        for dim, arg in enumerate(node.args):
            at, size = f"{name}_{dim}", f"c{buffer}_n{dim}"
            if (position, dim) in self.safe:
                lines.append(f"{at} = {names[arg]}.to({width})")
            else:
                lines += [f"{at} = {names[arg]}.to({_WIDE})", f"{at} = tl.where({at} < 0, {at} + {size}, {at})"]
                lines.append(f"{at}_bad = ({at} < 0) | ({at} >= {size})")
                if self.checks:
                    lines.append(f"wrong = wrong | ({at}_bad & concerned)")
                lines.append(f"{at} = tl.where({at}_bad, 0, {at})")
                lines.append(f"{at} = {at}.to({width})")
            terms.append(f"{at} * c{buffer}_s{dim}")
        read = f"tl.load(c{buffer} + ({' + '.join(terms)}))" if terms else f"tl.load(c{buffer})"
        cast = f"{read}.to(real)" if node.type == "float" else f"{read}.to({_WIDE})"
        return [*lines, f"{name} = {read} != 0" if str(capture.dtype) == "torch.bool" else f"{name} = {cast}"]


@lru_cache(maxsize=256)
def before_jumps(graph: Graph) -> frozenset[int]:
    """The nodes whose value comes into something that jumps, through whatever lies between."""
    found: set[int] = set()
    for position in reversed(range(len(graph.nodes))):
        node = graph.nodes[position]
        if node.op in _JUMPS or position in found:
            found.update(node.args)
    return frozenset(found)


def depends(graph: Graph) -> list[frozenset[str]]:
    """For each node, the inputs that its value comes from."""
    found: list[frozenset[str]] = []
    for node in graph.nodes:
        own = frozenset({str(node.attr)}) if node.op == "input" else frozenset()
        found.append(own.union(*(found[arg] for arg in node.args)))
    return found


def scatter_lines(graph: Graph, position: int, result: str, prefix: str, captures: tuple[Capture, ...]) -> list[str]:
    """Adds `result`, what the load at `position` gets, to its captured tensor's accumulators in a tile (kv, q).

    What an index does not depend on is summed up in the tile first, so that a scalar gets one addition from it.
    """
    node = graph.nodes[position]
    buffer, name = int(node.attr), f"{prefix}{position}"  # type: ignore[arg-type]
    known = depends(graph)
    read = frozenset().union(*(known[arg] for arg in node.args))
    by_q, by_kv = bool(read & {"q_idx", "score", "grad"}), bool(read & {"kv_idx", "score", "grad"})
    lines = [f"{name}_part = tl.where(seen, tl.broadcast_to({result}, seen.shape), 0.0)"]
    if not by_q and not by_kv:
        lines.append(f"{name}_part = tl.sum({name}_part)")
    elif not by_q or not by_kv:
        lines.append(f"{name}_part = tl.sum({name}_part, {0 if by_q else 1}, keep_dims=True)")
    terms, step = [], ""
    for dim in reversed(range(len(captures[buffer].shape))):
        terms.append(f"{name}_{dim}.to({_WIDE}){step}")
        step += f" * c{buffer}_n{dim}"
    at = " + ".join(terms) or "0"
    return [*lines, f'tl.atomic_add(a{buffer} + ({at}), {name}_part.to(a{buffer}.dtype.element_ty), sem="relaxed")']
