"""The source of a problem's kernels: which files it is put together from, and what goes into their holes."""
from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from flexref.backends.numba_cuda.emitter import NumbaCudaEmitter, dims_start, same_for_a_head
from flexref.backends.numba_cuda.geometry import HALVES, Geometry, shared_of
from flexref.backends.numba_cuda.kernels.layout import PLACE
from flexref.backends.numba_cuda.unroll import expand
from flexref.problem import Problem
from flexref.program.derive import derive
from flexref.program.ir import Graph
from flexref.program.proofs import WIDEST_INT, safe_reads, small_ints
from flexref.program.template import fill

_SOURCES = Path(__file__).parent / "kernels"
_EACH = re.compile(r"^# each: [\w, ]+\n(.*?)^# end\n", re.MULTILINE | re.DOTALL)
_DOCSTRING = re.compile(r'\A""".*?"""\n', re.DOTALL)
_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float64: "float64"}
# the tiles that each kernel fetches, and those that it multiplies weights with
_FETCHED = ("queries", "keys", "values", "grads")
_ADDED = {"forward": ("values",), "backward_query": ("keys",), "backward_key": ("grads", "queries")}


@dataclass(frozen=True)
class Variant:
    """What a kernel's source depends on beside the problem: where it runs, how it is launched, what is known of this call.

    `needs`: which of the gradients of query, key and value this launch computes.
    """

    geometry: Geometry
    simulated: bool = False
    checked: bool = True
    aligned: bool = False
    pack: int = 1
    split: bool = False
    lse_grad: bool = False
    needs: tuple[bool, bool, bool] = (False, False, False)


def source(name: str) -> str:
    """The text of one file of kernels/, before anything is filled in. Whoever edits kernels at run time replaces this."""
    return _text(name)


@lru_cache(maxsize=16)
def _text(name: str) -> str:
    return (_SOURCES / f"{name}.py").read_text()


def kernel_source(problem: Problem, kernel: str, variant: Variant) -> str:
    """A Python module with the function `kernel`, complete: "forward", "backward_query", "backward_key", "delta" or "combine"."""
    names = ["common", variant.geometry.product, "mods", kernel] if kernel in _ADDED else ["common", kernel]
    return _filled(problem, kernel, variant, tuple((name, source(name)) for name in names))


@lru_cache(maxsize=1024)
def _filled(problem: Problem, kernel: str, variant: Variant, files: tuple[tuple[str, str], ...]) -> str:
    constants = _constants(problem, kernel, variant)
    holes = {"machine": _machine(variant), "constants": _definitions(problem, variant, constants), "readers": _readers(problem)}
    if kernel in _ADDED:
        mods = _Holes(problem, kernel, variant)
        # rows are fetched 16 bytes at a time; the simulator knows no alignment
        shared = "cuda.shared.array(0, element)" if variant.simulated else "cuda.shared.array(0, element, 16)"
        holes |= {**mods.mods(), **mods.calls(), "shared": [f"shared = {shared}"]}
    parts = []
    for _, text in files:
        own = {name: lines for name, lines in holes.items() if f"hole: {name}\n" in text}
        parts.append(_with_instances(_DOCSTRING.sub("", fill(text, own)), _ADDED.get(kernel, ())))
    return expand("\n\n".join(parts), constants, unsigned=not variant.simulated)


def gathered(problem: Problem, kernel: str) -> list[int]:
    """The captured tensors whose gradients this kernel adds up, in float64."""
    if kernel != "backward_query" or problem.score is None:
        return []
    read = {int(problem.score.nodes[i].attr) for i in problem.score.loads}  # type: ignore[arg-type]
    return [i for i, capture in enumerate(problem.captures) if capture.needs_grad and i in read]


def captured_names(problem: Problem, kernel: str) -> list[str]:
    """The last arguments of a kernel: captured tensors, then the sums of their gradients."""
    return [f"c{i}" for i in range(len(problem.captures))] + [f"g{i}" for i in gathered(problem, kernel)]


def _constants(problem: Problem, kernel: str, variant: Variant) -> dict[str, object]:
    g, p = variant.geometry, problem
    constants: dict[str, object] = {
        **PLACE, "THREADS": g.threads, "LANES": g.lanes, "ROWS": g.rows, "COLS": g.cols, "SPREAD": g.spread, "PAIR": g.pair,
        "ROW_TILE": g.row_tile, "COLUMN_TILE": g.column_tile, "PACK": variant.pack, "Q_ROWS": g.row_tile // variant.pack,
        "SPREAD_BITS": g.spread.bit_length() - 1, "LANE_BITS": g.lanes.bit_length() - 1,
        "WIDTH": p.head_dim, "VALUE_WIDTH": p.value_dim, "WEIGHTS_STEP": g.column_tile + 1,
        "HAS_LISTS": p.block_size is not None, "HAS_MASK": p.mask is not None, "HAS_SCORE": p.score is not None,
        "SPLIT": variant.split, "SAVES": p.needs_backward, "MAX_SCORES": p.need_max_scores, "ALIGNED": variant.aligned,
        "NEEDS_QUERY": variant.needs[0], "NEEDS_KEY": variant.needs[1], "NEEDS_VALUE": variant.needs[2],
        "HAS_LSE_GRAD": variant.lse_grad, "down": g.down, "across": g.across,
    }  # fmt: skip
    for name, width in zip(_FETCHED, (p.head_dim, p.head_dim, p.value_dim, p.value_dim), strict=True):
        own = {"WIDTH": width, "PADDED": g.padded(width), "STEP": g.step(width), "WIDE": g.wide(width), "RUNS": g.runs(width)}
        constants |= {f"{key}_{name}": value for key, value in own.items()}
    if kernel in _ADDED:
        shared = shared_of(p, kernel, g)
        constants |= {**dict(shared.starts), "WEIGHTS_SIZE": shared.weights}
        constants["PARTS"] = len(_Holes(p, kernel, variant).parts)
    return constants


def _machine(variant: Variant) -> list[str]:
    home = "flexref.backends.numba_cuda.kernels"
    if variant.simulated:
        lines = [f"from {home} import simulated_maths as maths", f"from {home}.simulated import *"]
    else:
        lines = ["import math", f"from {home} import maths", f"from {home}.machine import *"]
    return [*lines, "from numba import cuda"]


def _definitions(problem: Problem, variant: Variant, constants: dict[str, object]) -> list[str]:
    """What a kernel finds as globals: the constants that stay in its text, types, and the functions of the half type."""
    lines = [f"{name} = {value}" for name, value in constants.items() if name not in PLACE and name.isupper()]
    real = "float64" if problem.dtype == torch.float64 else "float32"
    small = max(problem.q_len, problem.kv_len) < WIDEST_INT
    lines.append(f"real, INDEX = {real}, {'int32' if small else 'int64'}")
    lines.append(f"exp2, minus = exp2_{real}, minus_{real}")
    lines += ["INF, NAN, LOG2E = real(math.inf), real(math.nan), real(1.4426950408889634)"]
    if variant.geometry.product == "mma":
        half = _NAMES[problem.dtype]
        lines += [f"mma, pack, from_half = mma_{half}, pack_{half}, from_{half}", "element = array_of(uint16)"]
    else:
        lines.append("element = array_of(real)")
    return lines


def _readers(problem: Problem) -> list[str]:
    """How one element of each tensor becomes `real`, and back."""
    lines: list[str] = []
    read = {"queries": problem.dtype, "keys": problem.key_dtype, "values": problem.value_dtype, "grads": problem.dtype}
    for name, dtype in read.items():
        value = f"from_{_NAMES[dtype]}(source[at])" if dtype in HALVES else "source[at]"
        lines += ["@device", f"def read_{name}(source, at):", f"    return real({value})", ""]
    written = {"values": problem.dtype, "keys": problem.dtype, "queries": problem.key_dtype, "grads": problem.value_dtype}
    for name, dtype in written.items():
        value = f"to_{_NAMES[dtype]}(float32(x))" if dtype in HALVES else f"{_NAMES[dtype]}(x)"
        lines += ["@device", f"def write_{name}(target, at, x):", f"    target[at] = {value}", ""]
    return lines


def _with_instances(text: str, added: tuple[str, ...]) -> str:
    """The sections `# each: NAME, ...` once for each tile that is added to, or fetched."""

    def instances(match: re.Match) -> str:
        names = added if "add_NAME" in match[0] else ("keys", "values") if "product_NAME" in match[0] else _FETCHED
        return "".join(re.sub(r"\b(WIDTH|PADDED|STEP|WIDE|RUNS)\b", rf"\1_{n}", match[1]).replace("NAME", n) for n in names)

    return _EACH.sub(instances, text)


class _Holes:
    """The lines that a problem's programs become in one kernel."""

    def __init__(self, problem: Problem, kernel: str, variant: Variant):
        self.problem, self.kernel, self.variant = problem, kernel, variant
        self.gathered = gathered(problem, kernel)
        self.parts: list[int] = []
        self.derivative: Graph | None = None
        if problem.score is not None and kernel != "forward":
            loads = problem.score.loads
            wanted = tuple(i for i in loads if int(problem.score.nodes[i].attr) in self.gathered)  # type: ignore[arg-type]
            self.derivative = derive(problem.score, wanted)
            outputs = [int(name.removeprefix("load")) for name, _ in self.derivative.outputs if name != "score"]
            self.parts = [at for at in outputs if same_for_a_head(self.derivative, at)]

    def emit(self, graph: Graph, prefix: str) -> tuple[list[str], dict[str, str]]:
        shapes = [c.shape for c in self.problem.captures]
        extents = self.problem.extents
        safe = safe_reads(graph, extents, shapes)
        emitter = NumbaCudaEmitter(self.problem.captures, small_ints(graph, extents), safe, self.variant.checked)
        return emitter.emit(graph, prefix, {name: name for name in ("score", "grad", "b", "h", "q_idx", "kv_idx")})

    def mods(self) -> dict[str, list[str]]:
        p, names = self.problem, [f"{name}," for name in captured_names(self.problem, self.kernel)]
        lines, out = self.emit(p.mask, "m") if p.mask is not None else ([], {"out": "True"})
        mask = [*lines, f"mask = {out['out']}"]
        lines, out = self.emit(p.score, "v") if p.score is not None else ([], {"out": "score"})
        score = [*lines, f"modified = real({out['out']})"]
        derivative, scatter, results = ["d_score = grad"], ["pass"], {}
        if self.derivative is not None:
            lines, results = self.emit(self.derivative, "d")
            derivative, scatter = [*lines, f"d_score = real({results['score']})"], self._scatter(results) or ["pass"]
        parts = []
        for at in self.parts:
            parts += [f"select(counted, float64({results[f'load{at}']}), float64(0)), int64({self._place(at)}),"]
        return {
            "captured": names, "mask_mod": mask, "score_mod": score, "score_again": score, "derivative": derivative,
            "d_captured": scatter, "shared_parts": parts,
        }  # fmt: skip

    def _scatter(self, results: dict[str, str]) -> list[str]:
        assert self.derivative is not None
        lines = []
        for name, result in results.items():
            at = int(name.removeprefix("load")) if name != "score" else None
            if at is not None and at not in self.parts:
                buffer = int(self.derivative.nodes[at].attr)  # type: ignore[arg-type]
                lines += ["if counted:", f"    cuda.atomic.add(g{buffer}, {self._place(at)}, float64({result}))"]
        return lines

    def _place(self, at: int) -> str:
        """Where a load's element is in its tensor when that lies dense, from the indices that its own lines made."""
        assert self.derivative is not None
        node, place = self.derivative.nodes[at], ""
        start = dims_start(self.problem.captures, int(node.attr))  # type: ignore[arg-type]
        for dim in range(len(node.args)):
            here = f"d{at}_{dim}"
            place = f"({place}) * dims[{start + 2 * dim + 1}] + {here}" if place else here
        return place or "0"

    def calls(self) -> dict[str, list[str]]:
        """How the kernel calls its mods, for its i-th row and j-th column."""
        common = ", ".join(["errors", "dims", "floats", "ints", *captured_names(self.problem, self.kernel)])
        head = "h[i]" if self.kernel == "forward" else "h"
        q_at = "q_at" if self.kernel == "backward_key" else "q_at[i]"
        kv_at = "kv_at[i]" if self.kernel == "backward_key" else "kv_at"
        where = f"b, {head}, {q_at}, {kv_at}"
        row = "" if self.kernel == "backward_key" else "[i]"
        results = ", ".join(["s[i, j]", "d[i, j]", *(f"u{c}, place[{c}]" for c in range(len(self.parts)))])
        statistics = f"row_max{row}, log_sum{row}, delta{row}"
        grad = f"{results} = grad_mod(x, d[i, j], {statistics}, {where}, allowed, not careful, {common})"
        sums = [f"part[{c}] += u{c}" for c in range(len(self.parts))]
        assert self.derivative is not None or not self.parts
        buffers = [int(self.derivative.nodes[at].attr) for at in self.parts]  # type: ignore
        has_mask, has_score = self.problem.mask is not None, self.problem.score is not None
        sums_at_last = [f"    cuda.atomic.add(g{buffer}, place[{c}], part[{c}])" for c, buffer in enumerate(buffers)]
        return {
            "captured": [f"{name}," for name in captured_names(self.problem, self.kernel)],
            "mask_call": [f"allowed = allowed & (mask_mod({where}, partial, {common}) | (not partial))"] * has_mask,
            "score_call": [f"x = score_mod(x, {where}, allowed, {common})"] * has_score,
            "grad_call": [grad, *sums], "shared_sums": sums_at_last and ["if thread % LANES == 0:", *sums_at_last],
        }  # fmt: skip
