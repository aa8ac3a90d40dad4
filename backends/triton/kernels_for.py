"""The kernels of a problem: which texts they are made of, what goes into the holes, and the modules that hold them.

A text depends on the mods and on what is proved of them, never on a length, a batch or a captured number: those are
arguments, and equal texts are one kernel.
"""
from __future__ import annotations

import hashlib
import importlib.util
from contextlib import nullcontext
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType

import torch

from flexref.backends.triton.emitter import TritonEmitter, scatter_lines
from flexref.backends.triton.interpreter import interpreted
from flexref.cache_folder import folder, keep, own_folder, write
from flexref.problem import Problem
from flexref.program.derive import derive
from flexref.program.ir import Graph
from flexref.program.proofs import safe_reads, small_ints
from flexref.program.template import fill

_SOURCES = Path(__file__).parent / "kernels"
_MODS = {name: name for name in ("score", "grad", "b", "h", "q_idx", "kv_idx")}
BACKWARD = ("backward_kv", "backward_q")


@lru_cache(maxsize=1024)
def text_of(kernel: str, problem: Problem, near: frozenset[int], wide: bool, checks: bool, emulated: bool) -> str:
    """The source of `kernel` with everything that it calls.

    `near`: the captured tensors that 32 bits can index; `wide`: query, key or value need 64; `checks`: unproved reads
    are checked (R13).
    """
    backward = kernel in BACKWARD
    scatters = kernel == "backward_kv"
    place = "flexref.backends.triton.interpreter" if emulated else "triton.language.extra"
    real = "float64" if problem.dtype == torch.float64 else "float32"
    types = f"real, WIDE, COMPILED = tl.constexpr(tl.{real}), tl.constexpr({wide}), tl.constexpr({not emulated})"
    holes = {"types": [f"from {place} import libdevice", types]}
    texts = [fill(source("parts"), holes)]
    lists = argument_lists(problem, scatters)
    if kernel in ("forward", *BACKWARD):
        texts.append(_mods(problem, near, checks, backward, lists))
    if backward:
        texts.append(fill(source("gradients"), {name: lists[name] for name in ("parameters", "arguments", "accumulators")}))
    body = source(kernel)
    names = [name for name in ("parameters", "arguments", "accumulators", "numbers") if f"# hole: {name}" in body]
    return "\n\n".join([*texts, fill(body, {name: lists[name] for name in names})])


def _mods(problem: Problem, near: frozenset[int], checks: bool, backward: bool, lists: dict[str, list[str]]) -> str:
    def emitted(graph: Graph, prefix: str) -> tuple[list[str], dict[str, str]]:
        shapes = [capture.shape for capture in problem.captures]
        proved = small_ints(graph, problem.extents), safe_reads(graph, problem.extents, shapes)
        return TritonEmitter(problem.captures, *proved, near, checks, problem.dtype.itemsize == 2).emit(graph, prefix, _MODS)

    holes = {"mask_mod": ["mask = concerned"], "score_mod": ["modified = score"], "derivative": ["d_score = grad"]}
    holes |= {"d_captured": [], "parameters": lists["parameters"], "accumulators": lists["accumulators"]}
    if problem.mask is not None:
        lines, outputs = emitted(problem.mask, "m")
        holes["mask_mod"] = [*lines, f"mask = {outputs['out']}"]
    if problem.score is not None:
        lines, outputs = emitted(problem.score, "v")
        holes["score_mod"] = [*lines, f"modified = {outputs['out']}"]
    if problem.score is not None and backward:
        derivative = derivative_of(problem, bool(lists["accumulators"]))
        lines, outputs = emitted(derivative, "d")
        holes["derivative"] = [*lines, f"d_score = {outputs['score']}"]
        for name, result in outputs.items():
            if name != "score":
                position = int(name.removeprefix("load"))
                holes["d_captured"] += scatter_lines(derivative, position, result, "d", problem.captures)
    return fill(source("mods"), holes)


def derivative_of(problem: Problem, captured: bool) -> Graph:
    """d loss / d score, and with `captured` d loss / d each read of a captured tensor that needs it."""
    graph = problem.score
    assert graph is not None
    needed = (i for i in graph.loads if problem.captures[int(graph.nodes[i].attr)].needs_grad)  # type: ignore[arg-type]
    return derive(graph, tuple(needed) if captured else ())


@lru_cache(maxsize=1024)
def argument_lists(problem: Problem, scatters: bool) -> dict[str, list[str]]:
    """What the holes for the mods' arguments take: captured tensors c, their strides s and sizes n, floats f, ints i."""
    graphs = [graph for graph in (problem.score, problem.mask) if graph is not None]
    parameters, arguments, numbers = [], [], []
    for buffer in sorted({int(g.nodes[i].attr) for g in graphs for i in g.loads}):  # type: ignore[arg-type]
        dims = range(len(problem.captures[buffer].shape))
        sizes = [f"c{buffer}_n{d}" for d in dims]
        names = [f"c{buffer}", *(f"c{buffer}_s{d}" for d in dims)]
        parameters += [*names, *(f'{size}: "i64"' for size in sizes)]
        arguments += [*names, *sizes]
        numbers += sizes
    for type, slot in sorted({(n.type, int(n.attr)) for g in graphs for n in g.nodes if n.op == "scalar"}):  # type: ignore[arg-type]
        parameters.append(f'{type[0]}{slot}: "{"fp64" if type == "float" else "i64"}"')
        arguments.append(f"{type[0]}{slot}")
        numbers.append(f"{type[0]}{slot}")
    accumulators = [f"a{i}" for i, capture in enumerate(problem.captures) if capture.needs_grad] if scatters else []
    return {
        "parameters": [f"{x}," for x in parameters],
        "arguments": [f"{x}," for x in arguments],
        "accumulators": [f"{x}," for x in accumulators],
        "numbers": [f'"{x}",' for x in numbers],
    }


@cache
def source(name: str) -> str:
    """The text of kernels/<name>.py."""
    return (_SOURCES / f"{name}.py").read_text()


@lru_cache(maxsize=1024)
def module_of(text: str, emulated: bool) -> ModuleType:
    """The module of a text. It is a file in the cache, so that Triton, debuggers and profilers can show its lines."""
    name = "flexref_triton_" + hashlib.sha256(text.encode()).hexdigest()[:24]
    path = _written(f"{name}.py", text.encode())
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with interpreted() if emulated else nullcontext():
        spec.loader.exec_module(module)
    return module


def _written(name: str, content: bytes) -> Path:
    """A file with this content, in the cache folder or where that cannot be for this process alone."""
    path = (folder("triton") or own_folder("triton")) / name
    if not path.exists() or path.read_bytes() != content:
        if keep(path, content):
            return path
        path = own_folder("triton") / name
        write(path, content)
    return path
