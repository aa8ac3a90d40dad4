"""How large the tiles of a kernel are: one table, what overrides it, and what to try where a tile does not fit.

A row is chosen by compute capability, bytes of an element, padded head size and pass; the first that applies counts.
"""
from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from flexref.problem import Problem
from flexref.program.ir import Graph

OPTIONS = {
    "q_tile": "query rows of a tile, a power of 2 of at least 16",
    "kv_tile": "keys and values of a tile, a power of 2 of at least 16",
    "num_warps": "warps of a program: 1, 2, 4, 8 or 16",
    "num_stages": "tiles that are on their way while one is worked on, 1 to 8",
}


class Tile(NamedTuple):
    """`q` query rows by `kv` keys, worked on by `warps`, with `stages` tiles in flight."""

    q: int
    kv: int
    warps: int
    stages: int


class Row(NamedTuple):
    """Applies from capability `cc` on, to elements of `size` bytes and head sizes up to `dim`. `why`: where it comes from."""

    cc: int
    size: int
    dim: int
    tile: Tile
    why: str


_TIMED = "the fastest of those timed on an H100 over full, causal and soft-cap (bench/results/h100/tiles.txt)"
_CLEAN = "the largest of those tried that compile ahead of time without spills"
_LEAST = "the least tile: products of this type, or rows of this length, leave no room for more"
_SMALL = "decoding is bound by memory: many small programs with deep pipelines"
_REST = tuple(Row(0, size, 1 << 20, Tile(16, 16, 4, 1), _LEAST) for size in (2, 4, 8))
TABLE: dict[str, tuple[Row, ...]] = {
    "forward": (
        Row(100, 2, 64, Tile(128, 64, 8, 3), _CLEAN),
        Row(100, 2, 128, Tile(128, 64, 8, 2), _CLEAN),
        Row(90, 2, 64, Tile(64, 128, 4, 3), _TIMED),
        Row(90, 2, 128, Tile(64, 64, 4, 3), _TIMED),
        Row(90, 2, 256, Tile(128, 32, 8, 3), _CLEAN),
        Row(80, 2, 64, Tile(128, 64, 8, 3), _CLEAN),
        Row(80, 2, 128, Tile(128, 32, 8, 3), _CLEAN),
        Row(80, 2, 256, Tile(64, 32, 8, 2), _CLEAN),
        Row(80, 4, 64, Tile(32, 16, 4, 2), _CLEAN),
        Row(80, 8, 64, Tile(32, 16, 4, 1), _CLEAN),
        *_REST,
    ),
    "decode": (
        Row(80, 2, 128, Tile(16, 64, 4, 4), _SMALL),
        Row(80, 2, 256, Tile(16, 32, 4, 3), _SMALL),
        Row(80, 4, 128, Tile(16, 32, 4, 2), _SMALL),
        *_REST,
    ),
    "backward_kv": (
        Row(100, 2, 64, Tile(64, 64, 8, 2), _CLEAN),
        Row(100, 2, 128, Tile(32, 128, 8, 2), _CLEAN),
        Row(90, 2, 64, Tile(64, 64, 4, 3), _TIMED),
        Row(90, 2, 128, Tile(32, 64, 4, 2), _TIMED),
        Row(80, 2, 64, Tile(32, 128, 8, 2), _CLEAN),
        Row(80, 2, 128, Tile(32, 64, 8, 2), _CLEAN),
        Row(80, 2, 256, Tile(32, 32, 8, 1), _CLEAN),
        Row(80, 4, 64, Tile(32, 16, 4, 1), _CLEAN),
        *_REST,
    ),
    "backward_q": (
        Row(100, 2, 64, Tile(128, 64, 8, 2), _CLEAN),
        Row(100, 2, 128, Tile(128, 64, 8, 2), _CLEAN),
        Row(90, 2, 64, Tile(64, 64, 4, 3), _TIMED),
        Row(90, 2, 128, Tile(128, 64, 8, 3), _TIMED),
        Row(80, 2, 128, Tile(128, 32, 8, 2), _CLEAN),
        Row(80, 2, 256, Tile(32, 32, 8, 1), _CLEAN),
        *_REST,
    ),
}
# a mask_mod that reads captured tensors asks for more of them with short tiles: 0.88 x torch flex against 0.79 on documents
TABLE["forward_reads"] = tuple(
    row._replace(tile=Tile(128, 64, 8, 3)) if row[:3] == (90, 2, 128) else row for row in TABLE["forward"]
)
# of the interpreter, which has no limits but time, and of the kernels that go through rows once and are not in the table
EMULATED = Tile(64, 64, 4, 1)


def tile_for(kernel: str, problem: Problem, capability: tuple[int, int] | None) -> Tile:
    """The tile of a kernel: the options', else the tuned, else the table's; no larger than the blocks and the lengths.

    `capability` None is the interpreter.
    """
    width = padded(max(problem.head_dim, problem.value_dim))
    options = dict(problem.options)
    if capability is None or kernel not in TABLE:
        tile = _emulated(kernel)
    else:
        reads = kernel == "forward" and problem.mask is not None and bool(problem.mask.loads)
        tile = _tabled("forward_reads" if reads else kernel, capability, problem.dtype.itemsize, width)
    q_block, kv_block = problem.block_size or (problem.q_len, problem.kv_len)
    q = int(options.get("q_tile") or min(tile.q, padded(min(q_block, _rows(kernel, problem)))))  # type: ignore[call-overload]
    kv = int(options.get("kv_tile") or min(tile.kv, padded(min(kv_block, problem.kv_len))))  # type: ignore[call-overload]
    warps = int(options.get("num_warps") or tile.warps)  # type: ignore[call-overload]
    # Triton's pipeliner cannot take along a load whose place depends on a product
    most = 1 if problem.score is not None and reads_by_score(problem.score) else tile.stages
    return Tile(q, kv, warps, int(options.get("num_stages") or most))  # type: ignore[call-overload]


@lru_cache(maxsize=1024)
def reads_by_score(graph: Graph) -> bool:
    """Whether a captured tensor is read at a place that depends on the score."""
    after: set[int] = set()
    for i, node in enumerate(graph.nodes):
        if (node.op == "input" and node.attr == "score") or not after.isdisjoint(node.args):
            after.add(i)
    return any(not after.isdisjoint(graph.nodes[i].args) for i in graph.loads)


def _emulated(kernel: str) -> Tile:
    """Decoding has short tiles, so that short problems are split as well."""
    return EMULATED._replace(kv=32) if kernel == "decode" else EMULATED


def _rows(kernel: str, problem: Problem) -> int:
    return problem.q_len * problem.group if kernel == "decode" else problem.q_len


def _tabled(kernel: str, capability: tuple[int, int], size: int, width: int) -> Tile:
    cc = 10 * capability[0] + capability[1]
    tuned = tuned_tiles().get(f"{kernel}/{cc}/{size}/{width}")
    if tuned is not None:
        return tuned
    return next(row.tile for row in TABLE[kernel] if cc >= row.cc and size == row.size and width <= row.dim)


def smaller(tile: Tile) -> Tile | None:
    """What to try after a tile that does not fit: fewer stages, then half of the longer side; None at the end."""
    if tile.stages > 1:
        return tile._replace(stages=tile.stages - 1)
    if tile.q == tile.kv == 16:
        return None
    half = tile._replace(q=tile.q // 2) if tile.q > tile.kv else tile._replace(kv=tile.kv // 2)
    return half._replace(stages=2)


def padded(n: int) -> int:
    """The power of 2 that holds n, at least 16: the least side of a product on the tensor cores."""
    return max(16, 1 << max(n - 1, 0).bit_length())


def wrong_options(options: dict[str, object]) -> list[str]:
    """A reason for each option that cannot be."""
    reasons = []
    for name in ("q_tile", "kv_tile"):
        value = options.get(name)
        if value is not None and (not _is_int(value) or value < 16 or value & (value - 1)):  # type: ignore[operator]
            reasons.append(f"option {name} must be a power of 2 of at least 16, got {value!r}")
    warps, stages = options.get("num_warps"), options.get("num_stages")
    if warps is not None and warps not in (1, 2, 4, 8, 16):
        reasons.append(f"option num_warps must be 1, 2, 4, 8 or 16, got {warps!r}")
    if stages is not None and (not _is_int(stages) or not 1 <= stages <= 8):  # type: ignore[operator]
        reasons.append(f"option num_stages must be an int from 1 to 8, got {stages!r}")
    return reasons


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def tuned_tiles() -> dict[str, Tile]:
    """The tiles that `tune` found on this machine, from the JSON file that FLEXREF_TILES names."""
    path = os.environ.get("FLEXREF_TILES", "")
    return _read(path, os.stat(path).st_mtime_ns) if path and os.path.exists(path) else {}


@lru_cache(maxsize=4)
def _read(path: str, _: int) -> dict[str, Tile]:
    rows = json.loads(Path(path).read_text())
    return {key: Tile(*row["tile"]) for key, row in rows["tiles"].items()}
