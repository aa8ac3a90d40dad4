"""A program's operations in the Python of a CUDA kernel: the spellings of Numba, and reads of captured tensors."""
from __future__ import annotations

from flexref.problem import Capture
from flexref.program.ir import Graph, Node
from flexref.program.numba_spelling import NumbaSpelling

_READS = {
    "torch.bool": "{0} != 0",
    "torch.float16": "real(from_float16({0}))",
    "torch.bfloat16": "real(from_bfloat16({0}))",
    "torch.float32": "real({0})",
    "torch.float64": "real({0})",
}
_WIDE = {"q_idx": "q_at", "kv_idx": "kv_at"}


class NumbaCudaEmitter(NumbaSpelling):
    """Prints for one kernel: `small` int nodes fit 32 bits, `safe` reads are in range; others wrap, or are `checked`."""

    def __init__(
        self,
        captures: tuple[Capture, ...],
        small: frozenset[int] = frozenset(),
        safe: frozenset[tuple[int, int]] = frozenset(),
        checked: bool = True,
    ):
        self.captures, self.small, self.safe, self.checked = captures, small, safe, checked

    def scalar(self, slot: int, type: str) -> str:
        # floats[0] is the scale
        return f"floats[{slot + 1}]" if type == "float" else f"ints[{slot}]"

    def read(self, name: str, position: int, node: Node, graph: Graph, names: list[str]) -> list[str]:
        """The element's place is the sum of index times stride; name_0, name_1, ... are the indices, for d_captured."""
        buffer = int(node.attr)  # type: ignore[arg-type]
        start = dims_start(self.captures, buffer)
        lines, terms = [], []
        for dim, arg in enumerate(node.args):
            source = graph.nodes[arg]
            index = _WIDE.get(str(source.attr), names[arg]) if source.op == "input" else names[arg]
            at, stride, size = f"{name}_{dim}", f"dims[{start + 2 * dim}]", f"dims[{start + 2 * dim + 1}]"
            lines.append(f"{at} = int64({index})")
            if (position, dim) not in self.safe:
                lines.append(f"{at} = select({at} < 0, {at} + {size}, {at})")
                lines.append(f"{at}_bad = ({at} < 0) | ({at} >= {size})")
                if self.checked:
                    lines += [f"if {at}_bad & concerned:", "    errors[0] = 1"]
                lines.append(f"{at} = select({at}_bad, int64(0), {at})")
            terms.append(f"{at} * {stride}")
        element = f"c{buffer}[{' + '.join(terms) or '0'}]"
        return [*lines, f"{name} = {_READS.get(str(self.captures[buffer].dtype), 'int64({0})').format(element)}"]


def dims_start(captures: tuple[Capture, ...], buffer: int) -> int:
    """Where the strides and sizes of this captured tensor begin among those of all: one pair for each dimension."""
    return sum(2 * len(c.shape) for c in captures[:buffer])


def same_for_a_head(graph: Graph, at: int) -> bool:
    """Whether a load reads the same element wherever in a tile it is, so that a thread can add up what it gets."""
    todo, visited, inputs = list(graph.nodes[at].args), set(), set()
    while todo:
        position = todo.pop()
        node = graph.nodes[position]
        if position not in visited:
            visited.add(position)
            todo += node.args
            inputs |= {str(node.attr)} if node.op == "input" else set()
    return inputs <= {"b", "h"}
