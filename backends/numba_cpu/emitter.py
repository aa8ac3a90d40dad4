"""A program's operations in Numba's Python: the table of spellings, types, literals, and reads that cannot go astray."""
from __future__ import annotations

from flexref.problem import Capture
from flexref.program.ir import Graph, Node
from flexref.program.numba_spelling import NumbaSpelling

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


class NumbaEmitter(NumbaSpelling):
    """Prints for one kernel: `captures` say how to read, `small` which int nodes fit 32 bits, `safe` which reads are in range."""

    def __init__(
        self, captures: tuple[Capture, ...], small: frozenset[int] = frozenset(), safe: frozenset[tuple[int, int]] = frozenset()
    ):
        self.captures, self.small, self.safe = captures, small, safe

    def scalar(self, slot: int, type: str) -> str:
        return f"floats[{slot}]" if type == "float" else f"ints[{slot}]"

    def read(self, name: str, position: int, node: Node, graph: Graph, names: list[str]) -> list[str]:
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
