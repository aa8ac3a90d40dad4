"""The kernels of a problem: the text of a source with its headers in it, and what goes into its holes."""
from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from flexref.backends.cupy import plan
from flexref.backends.cupy.emitter import CudaEmitter, table_start
from flexref.problem import Capture, Problem
from flexref.program.derive import derive
from flexref.program.ir import Graph, Node
from flexref.program.proofs import safe_reads, small_ints
from flexref.program.template import fill

SOURCES = Path(__file__).parent / "kernels"
# cuda_host.h is for the CPU, and stays outside
_INCLUDE = re.compile(r'^#include "(?P<name>(?!cuda_host)[\w.]+)"\n', re.MULTILINE)
_TYPES = {torch.float16: "Half", torch.bfloat16: "Bfloat", torch.float32: "float", torch.float64: "double"}
_INPUTS = {name: name for name in ("score", "grad", "b", "h", "q_idx", "kv_idx")}


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for, beside its problem: a tile, and which of its parts there are."""

    tiles: plan.Tiles
    shared_bytes: int
    checked: bool = False
    packed: bool = False
    split: bool = False
    flags: tuple[str, ...] = ()


def read(name: str) -> str:
    """One file of kernels/."""
    return (SOURCES / name).read_text()


def source(name: str) -> str:
    """The file `name` with the headers that it includes in their place, each once."""
    seen: set[str] = set()

    def included(match: re.Match) -> str:
        inner = match["name"]
        if inner in seen:
            return ""
        seen.add(inner)
        text = read(inner).replace("#pragma once\n", "")
        return f"// {inner}\n" + _INCLUDE.sub(included, text)

    return _INCLUDE.sub(included, read(name))


def filled(name: str, problem: Problem, variant: Variant) -> str:
    """The whole text of a kernel, ready for a compiler."""
    text = source(name)
    holes = {"constants": _constants(problem, variant)}
    for hole in ("mask_mod", "score_mod", "score_grad"):
        if f"// hole: {hole}\n" in text:
            holes[hole] = globals()[f"_{hole}"](problem, variant)
    return fill(text, holes)


def _constants(problem: Problem, variant: Variant) -> list[str]:
    """Types and sizes, one a line."""
    tensor_cores = plan.on_tensor_cores(problem)
    list_block = problem.block_size and problem.block_size[0 if "LISTS_OF_QUERIES" in variant.flags else 1]
    sums, others = _captured_reads(problem) if "CAPTURED" in variant.flags else ([], [])
    numbers = {
        "THREADS": plan.THREADS,
        "ROWS": variant.tiles.rows,
        "COLS": variant.tiles.cols,
        "STAGES": variant.tiles.stages,
        "E_PAD": plan.padded(problem.head_dim),
        "V_PAD": plan.padded(problem.value_dim),
        "SHARED_BYTES": variant.shared_bytes,
        "CAPTURED_WORDS": max(1, table_start(problem.captures, len(problem.captures))),
        "SCALARS": scalar_count(problem),
        "PARAMETER_WORDS": parameter_count(problem),
        "SUMS": max(1, len(sums)),
        "UNROLL": plan.unroll(problem, backward="BACKWARD" in variant.flags),
    }
    truths = {
        "HAS_SCORE": problem.score is not None,
        "HAS_MASK": problem.mask is not None,
        "HAS_LISTS": problem.block_size is not None,
        "GATHER": list_block is not None and list_block < variant.tiles.cols,
        "CHECKED": variant.checked,
        "PACKED": variant.packed,
        "SPLIT": variant.split,
        "USES_KEPT": not tensor_cores,
        "OWN_HEADS_ARE_THE_MASKS": "LISTS_OF_QUERIES" not in variant.flags,
        "HAS_SUMS": bool(sums),
        "SERIAL": "ORDERED" in variant.flags and bool(others),
        **{flag: flag in variant.flags for flag in ("DQ", "DK", "DV", "CAPTURED", "ORDERED", "FROM_SUM")},
    }
    real = "double" if problem.acc_dtype == torch.float64 else "float"
    types = {"real": real, "Q": _TYPES[problem.dtype], "K": _TYPES[problem.key_dtype], "V": _TYPES[problem.value_dtype]}
    return [
        f"#define TENSOR_CORES {int(tensor_cores)}",
        f"#define REAL_BYTES {problem.acc_dtype.itemsize}",
        "struct Half;",
        "struct Bfloat;",
        *(f"using {name} = {type};" for name, type in types.items()),
        *(f"constexpr int {name} = {value};" for name, value in numbers.items()),
        *(f"constexpr bool {name} = {str(value).lower()};" for name, value in truths.items()),
    ]


@lru_cache(maxsize=4096)
def scalar_count(problem: Problem) -> int:
    """How many captured numbers the programs name."""
    slots = [int(n.attr) + 1 for g in (problem.score, problem.mask) if g for n in g.nodes if n.op == "scalar"]  # type: ignore[arg-type]
    return max([1, *slots])


def _emitter(problem: Problem, graph: Graph, checked: bool) -> CudaEmitter:
    shapes = [capture.shape for capture in problem.captures]
    safe = safe_reads(graph, problem.extents, shapes)
    return CudaEmitter(problem.captures, small_ints(graph, problem.extents), safe, checked)


def _mask_mod(problem: Problem, variant: Variant) -> list[str]:
    if problem.mask is None:
        return ["return true;"]
    lines, outputs = _emitter(problem, problem.mask, variant.checked).emit(problem.mask, "m", _INPUTS)
    return [*lines, f"return {outputs['out']};"]


def _score_mod(problem: Problem, variant: Variant) -> list[str]:
    if problem.score is None:
        return ["return score;"]
    lines, outputs = _emitter(problem, problem.score, variant.checked).emit(problem.score, "v", _INPUTS)
    return [*lines, f"return {outputs['out']};"]


def _score_grad(problem: Problem, variant: Variant) -> list[str]:
    """The derivative, and with the flag CAPTURED an addition for each read of a tensor that wants a gradient."""
    if problem.score is None:
        return ["return grad;"]
    sums, others = _captured_reads(problem) if "CAPTURED" in variant.flags else ([], [])
    graph = derive(problem.score, tuple(sums + others))
    lines, outputs = _emitter(problem, graph, variant.checked).emit(graph, "d", _INPUTS)
    starts = accumulator_starts(problem.captures)
    results = [name for name in outputs if name != "score"]
    for i, name in enumerate(results):
        node = graph.nodes[int(name.removeprefix("load"))]
        place = _flat_index(problem, name.removeprefix("load"), node, starts[int(node.attr)])  # type: ignore[arg-type]
        if i < len(sums):
            lines += [f"sums.place[{i}] = {place};", f"if (seen) sums.value[{i}] += {outputs[name]};"]
        else:
            lines.append(f"if (seen) add_atomically(accumulators + {place}, (double){outputs[name]});")
    return [*lines, f"return {outputs['score']};"]


def _captured_reads(problem: Problem) -> tuple[list[int], list[int]]:
    """The reads of tensors that want a gradient: of the same element in a whole tile, and the others."""
    graph = problem.score
    if graph is None:
        return [], []
    varies: list[bool] = []
    for node in graph.nodes:
        own = node.op == "input" and node.attr not in ("b", "h")
        varies.append(own or any(varies[a] for a in node.args))
    wanted = [i for i in graph.loads if problem.captures[int(graph.nodes[i].attr)].needs_grad]  # type: ignore[arg-type]
    return [i for i in wanted if not varies[i]], [i for i in wanted if varies[i]]


def _flat_index(problem: Problem, position: str, node: Node, start: int) -> str:
    """The place of a load's element among the accumulators, from the indices that its own lines made."""
    place, step = str(start), 1
    shape = problem.captures[int(node.attr)].shape  # type: ignore[arg-type]
    for dim in reversed(range(len(shape))):
        place += f" + d{position}_{dim} * {step}ll"
        step *= shape[dim]
    return place


def accumulator_starts(captures: tuple[Capture, ...]) -> list[int]:
    """Where each captured tensor's gradient starts among the float64 accumulators; the last entry is how many there are."""
    starts = [0]
    for capture in captures:
        starts.append(starts[-1] + (math.prod(capture.shape) if capture.needs_grad else 0))
    return starts


@lru_cache(maxsize=4)
def parameter_words() -> dict[str, tuple[int, int]]:
    """Where each member of Params stands: {name: (first word, words)}; the arrays at its end are not among them."""
    text = re.sub(r"//.*", "", read("params.cuh"))
    tensor, params = (re.search(rf"struct {name} {{(.*?)}};", text, re.DOTALL).group(1) for name in ("Tensor", "Params"))  # type: ignore[union-attr]
    tensor_words, places, word = len(_names(tensor)), {}, 0
    for declaration in params.split(";"):
        for name in _names(declaration + ";"):
            count = tensor_words if declaration.split()[0] == "Tensor" else 1
            places[name] = (word, count)
            word += count
    return places


def parameter_count(problem: Problem) -> int:
    """How many words Params has for this problem."""
    plain = sum(count for _, count in parameter_words().values())
    return plain + max(1, table_start(problem.captures, len(problem.captures))) + 2 * scalar_count(problem)


def _names(declarations: str) -> list[str]:
    """The names that declarations of plain members declare; arrays are left to the caller."""
    found = []
    for declaration in declarations.split(";"):
        if declaration.strip() and "[" not in declaration:
            first, *others = declaration.split(",")
            found += [first.split()[-1].lstrip("*"), *(x.strip() for x in others)]
    return found
