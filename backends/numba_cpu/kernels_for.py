"""The kernels of a problem: which sources it needs, what goes into their holes, and their addresses."""
from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from flexref.backends.numba_cpu.cache import DENSE, addresses_of
from flexref.backends.numba_cpu.emitter import NumbaEmitter
from flexref.problem import Capture, Problem
from flexref.program.derive import derive
from flexref.program.ir import Graph
from flexref.program.proofs import WIDEST_INT, all_safe, safe_reads, small_ints
from flexref.program.template import fill

_SOURCES = Path(__file__).parent / "kernels"
_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float64: "float64"}


def addresses(problem: Problem, backward: bool) -> dict[str, int]:
    """The addresses of the driver ("forward" or "backward"), the dense kernels, and the tile functions it has a use for."""
    direction = "backward" if backward else "forward"
    kind = "float64" if problem.dtype == torch.float64 else "float32"
    driver = driver_source(direction, problem.dtype, problem.key_dtype, problem.value_dtype)
    dense = dict.fromkeys(DENSE, kind)
    return addresses_of({direction: driver, **dense, **tile_sources(problem, backward=backward)})


@lru_cache(maxsize=256)
def driver_source(direction: str, dtype: torch.dtype, key_dtype: torch.dtype, value_dtype: torch.dtype) -> str:
    """The filled source of a driver, which depends on the dtypes alone."""
    real = "float64" if dtype == torch.float64 else "float32"
    letters = {"q": _NAMES[dtype], "k": _NAMES[key_dtype], "v": _NAMES[value_dtype]}
    machine = "from flexref.backends.numba_cpu.kernels.machine import"
    lines = [f"{machine} read_{name} as read_{letter}" for letter, name in letters.items()]
    lines += [
        f"{machine} write_{letters['q']} as write_o",
        f"from flexref.backends.numba_cpu.kernels.maths import exp2_small_{real} as exp2",
        f"real, BYTES, Q_BYTES = {real}, {8 if real == 'float64' else 4}, {dtype.itemsize}",
        f"K_BYTES, V_BYTES = {key_dtype.itemsize}, {value_dtype.itemsize}",
        f"K_IN_PLACE, V_IN_PLACE = {letters['k'] == real}, {letters['v'] == real}",
    ]
    return fill(_source(direction), {"types": lines})


def tile_sources(problem: Problem, scalars: tuple[int | float, ...] = (), backward: bool = False) -> dict[str, str]:
    """The filled source of each tile function of a problem."""
    sources = {}
    if problem.mask is not None:
        holes = _Holes(problem, problem.mask, scalars)
        lines, outputs = holes.emit(problem.mask, "m")
        sources["mask_tile"] = holes.fill("mask_tile", {"mask_mod": [*lines, f"mask = {outputs['out']}"]})
    if problem.score is not None and not backward:
        holes = _Holes(problem, problem.score, scalars)
        lines, outputs = holes.emit(problem.score, "v")
        concerned = ["concerned = (masked == 0) | (live[j * ld + i] != 0)"] if holes.checks else []
        body = [*lines, f"modified = {outputs['out']}"]
        sources["score_tile"] = holes.fill("score_tile", {"score_mod": body, "concerned": concerned})
    if problem.score is not None and backward:
        sources["grad_tile"] = _grad_source(problem, problem.score, scalars)
    return sources


def _grad_source(problem: Problem, graph: Graph, scalars: tuple[int | float, ...]) -> str:
    wanted = tuple(i for i in graph.loads if problem.captures[int(graph.nodes[i].attr)].needs_grad)  # type: ignore[arg-type]
    derivative = derive(graph, wanted)
    holes = _Holes(problem, graph, scalars, derivative)
    score, outputs = holes.emit(graph, "v")
    lines, results = holes.emit(derivative, "d", known=graph)
    scatter = []
    starts = accumulator_starts(problem.captures)
    for name, result in results.items():
        if name != "score":
            node = derivative.nodes[int(name.removeprefix("load"))]
            place = holes.flat_index(name.removeprefix("load"), node, starts[int(node.attr)])  # type: ignore[arg-type]
            scatter.append(f"accumulators[{place}] += float64(select(seen, {result}, real(0)))")
    body = {
        "score_mod": [*score, f"modified = real({outputs['out']})"],
        "derivative": [*lines, f"d_score = {results['score']}"],
        "d_captured": scatter,
    }
    return holes.fill("grad_tile", body)


def accumulator_starts(captures: tuple[Capture, ...]) -> list[int]:
    """Where each captured tensor's gradient starts among the float64 accumulators; the last entry is how many there are."""
    starts = [0]
    for capture in captures:
        count = 1
        for size in capture.shape:
            count *= size
        starts.append(starts[-1] + (count if capture.needs_grad else 0))
    return starts


class _Holes:
    """One kernel's emitter, made for what interval analysis proves of this problem's programs."""

    def __init__(self, problem: Problem, *graphs_and_scalars):
        self.problem = problem
        self.graphs = [g for g in graphs_and_scalars if isinstance(g, Graph)]
        self.scalars = next(x for x in graphs_and_scalars if isinstance(x, tuple))
        self.small_index = max(problem.q_len, problem.kv_len) < WIDEST_INT
        self.checks = False

    def emit(self, graph: Graph, prefix: str, known: Graph | None = None) -> tuple[list[str], dict[str, str]]:
        extents, shapes = self.problem.extents, [capture.shape for capture in self.problem.captures]
        safe = safe_reads(graph, extents, shapes)
        self.checks |= not all_safe(graph, safe)
        emitter = NumbaEmitter(self.problem.captures, small_ints(graph, extents), safe)
        inputs = {"score": "score", "grad": "grad", "b": "b", "h": "h", "q_idx": "q_idx", "kv_idx": "kv_idx"}
        return emitter.emit(graph, prefix, inputs)

    def flat_index(self, position: str, node, start: int) -> str:
        """The place of a load's element among the accumulators, from the indices that its own lines made."""
        shape = self.problem.captures[int(node.attr)].shape
        place = str(start)
        step = 1
        for dim in reversed(range(len(shape))):
            place += f" + d{position}_{dim} * {step}"
            step *= shape[dim]
        return place

    def fill(self, name: str, holes: dict[str, list[str]]) -> str:
        real = "float64" if self.problem.dtype == torch.float64 else "float32"
        types = [f"real, INDEX = {real}, {'int32' if self.small_index else 'int64'}"]
        if name == "grad_tile":
            types.append(f"from flexref.backends.numba_cpu.kernels.maths import exp2_small_{real} as exp2")
        buffers = sorted({int(g.nodes[i].attr) for g in self.graphs for i in g.loads})  # type: ignore[arg-type]
        opening = NumbaEmitter(self.problem.captures, frozenset(), frozenset()).opening(buffers)
        return fill(_source(name), {"types": types, "captured": opening, **holes})


@lru_cache(maxsize=16)
def _source(name: str) -> str:
    return (_SOURCES / f"{name}.py").read_text()
