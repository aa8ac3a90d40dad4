"""How a tile is shared out over a block of threads, and what lies where in shared memory."""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from flexref.problem import Problem

HALVES = (torch.float16, torch.bfloat16)
# what every chip since compute capability 8.0 has for one block of threads, and what one has without asking for more
LEAST_SHARED, PLAIN_SHARED = 99 * 1024, 48 * 1024


@dataclass(frozen=True)
class Geometry:
    """`threads` of warps of `lanes`; `spread` lanes share a row; a thread owns rows x cols, `pair` columns side by side."""

    product: str
    threads: int
    lanes: int
    rows: int
    cols: int
    spread: int
    pair: int

    @property
    def row_tile(self) -> int:
        return self.threads // self.spread * self.rows

    @property
    def column_tile(self) -> int:
        return self.cols * self.spread

    def down(self, i: int) -> int:
        """From a thread's first row to its i-th."""
        return i * (self.lanes // self.spread)

    def across(self, j: int) -> int:
        """From a thread's first column to its j-th."""
        return j // self.pair * (self.pair * self.spread) + j % self.pair

    def wide(self, width: int) -> int:
        """Columns of an accumulator that a thread owns."""
        return self.padded(width) // self.spread

    def padded(self, width: int) -> int:
        """A row's length in shared memory: whole pieces of what the threads of a row own."""
        piece = 16 if self.product == "mma" else self.spread * self.pair
        return -(-width // piece) * piece

    def runs(self, width: int) -> int:
        """How many threads fetch a row, 16 bytes each: a power of two."""
        return min(self.threads, 1 << (self.padded(width) // 8 - 1).bit_length())

    def step(self, width: int) -> int:
        """From one row in shared memory to the next, so that rows begin in different banks."""
        return self.padded(width) + 8 if self.product == "mma" else self.padded(width) | 1


# what a simulated block of threads has: two warps, and two lanes that share a row, so that what they do together shows
SIMULATED = {
    "fma": Geometry("fma", threads=8, lanes=4, rows=2, cols=4, spread=2, pair=1),
    "mma": Geometry("mma", threads=32, lanes=32, rows=2, cols=4, spread=4, pair=2),
}


@dataclass(frozen=True)
class Chip:
    """A device: how many processors, shared memory for one block of threads in bytes, whether it has mma.sync m16n8k16."""

    processors: int
    shared: int
    tensor_cores: bool


def product_of(problem: Problem, chip: Chip) -> str:
    """Which product: "mma" for half types on a chip that has it, or what is asked for."""
    asked = dict(problem.options).get("product")
    return str(asked) if asked is not None else "mma" if problem.dtype in HALVES and chip.tensor_cores else "fma"


def geometry_of(problem: Problem, kernel: str, chip: Chip, simulated: bool) -> Geometry:
    """The tile for a kernel: as asked for by the options q_tile and kv_tile, else what registers and shared memory hold."""
    product = product_of(problem, chip)
    if simulated:
        return SIMULATED[product]
    wide = max(problem.head_dim, problem.value_dim)
    if product == "mma":
        # the accumulators take wide / 2 registers a thread, and scores 2 * cols, twice in backward,
        # of the 255 that it can have; a mod that reads memory needs some for addresses
        cols = 16 if wide <= 128 and not _reads(problem) else 8
        cols = cols if kernel == "forward" else cols // 2
        geometry = Geometry("mma", threads=128, lanes=32, rows=2, cols=cols, spread=4, pair=2)
    else:
        double = problem.dtype == torch.float64
        rows = 2 if wide > 128 or double or kernel == "backward_key" else 4
        geometry = Geometry("fma", threads=128, lanes=32, rows=rows, cols=4, spread=8, pair=1)
    geometry = _asked(problem, kernel, geometry)
    while shared_of(problem, kernel, geometry).bytes > chip.shared and (smaller := _smaller(geometry)) is not None:
        geometry = smaller
    return geometry


def _smaller(geometry: Geometry) -> Geometry | None:
    """The next smaller tile: half the columns, then half the threads, then half the rows; None if there is none."""
    tensor_cores = geometry.product == "mma"
    if geometry.cols > (4 if tensor_cores else 1):
        return replace(geometry, cols=geometry.cols // 2)
    if geometry.threads > geometry.lanes:
        return replace(geometry, threads=geometry.threads // 2)
    return replace(geometry, rows=geometry.rows // 2) if geometry.rows > 1 and not tensor_cores else None


def rounds(problem: Problem, geometry: Geometry) -> list[tuple[bool, bool, bool]]:
    """What of (query, key, value) each launch of backward_key computes: both accumulators at once, if registers hold them."""
    _, key, value = problem.needs_grad
    if key and value and _too_wide(problem, geometry.product):
        return [(False, True, False), (False, False, True)]
    return [(False, key, value)]


def _too_wide(problem: Problem, product: str) -> bool:
    return product == "mma" and (max(problem.head_dim, problem.value_dim) > 64 or _reads(problem))


def _reads(problem: Problem) -> bool:
    return any(graph is not None and graph.loads for graph in (problem.score, problem.mask))


def _asked(problem: Problem, kernel: str, geometry: Geometry) -> Geometry:
    options = dict(problem.options)
    rows, columns = ("kv_tile", "q_tile") if kernel == "backward_key" else ("q_tile", "kv_tile")
    if rows in options:
        tile = int(options[rows])  # type: ignore[call-overload]
        a_warp = geometry.lanes // geometry.spread * geometry.rows
        warps = min(_power_of_2(tile // a_warp), 1024 // geometry.lanes)
        geometry = replace(geometry, threads=warps * geometry.lanes)
    if columns in options:
        tile = int(options[columns])  # type: ignore[call-overload]
        piece = 16 if geometry.product == "mma" else geometry.spread
        geometry = replace(geometry, cols=_power_of_2(tile // piece) * piece // geometry.spread)
    return geometry


def _power_of_2(n: int) -> int:
    """The greatest that is no more than n, at least 1: what can be halved until it fits."""
    return 1 << max(n, 1).bit_length() - 1


@dataclass(frozen=True)
class Shared:
    """The tiles in shared memory: where each begins, in elements, and the size of all in bytes."""

    starts: tuple[tuple[str, int], ...]
    weights: int
    bytes: int


def shared_of(problem: Problem, kernel: str, geometry: Geometry) -> Shared:
    """Tiles of query, grad_out, key and value, and for fma the weights, which its threads hand to one another."""
    rows, columns = geometry.row_tile, geometry.column_tile
    if kernel == "backward_key":
        rows, columns = columns, rows
    sizes = {
        "Q_AT": rows * geometry.step(problem.head_dim),
        "K_AT": columns * geometry.step(problem.head_dim),
        "V_AT": columns * geometry.step(problem.value_dim),
        "G_AT": rows * geometry.step(problem.value_dim) if kernel != "forward" else 0,
    }
    weights = geometry.row_tile * (geometry.column_tile + 1) if geometry.product == "fma" else 0
    sizes["WEIGHTS_AT"] = weights
    starts, place = [], 0
    for name, size in sizes.items():
        starts.append((name, place))
        # ldmatrix and copies of 16 bytes want aligned rows
        place += -(-size // 8) * 8
    element = 2 if geometry.product == "mma" else problem.acc_dtype.itemsize
    return Shared(tuple(starts), weights, place * element)
