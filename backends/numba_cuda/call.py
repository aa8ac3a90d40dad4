"""One call of one kernel: its numbers, its variant, its grid, and the error that it may leave."""
from __future__ import annotations

import torch
from torch import Tensor

from flexref.backends.numba_cuda.device import Device
from flexref.backends.numba_cuda.geometry import Geometry, geometry_of, shared_of
from flexref.backends.numba_cuda.kernels.layout import PLACE
from flexref.backends.numba_cuda.kernels_for import Variant, kernel_source
from flexref.index_error import named_index_error
from flexref.index_proof import proved_in_range
from flexref.problem import Problem, Tensors

# a block of threads shall have this many tiles of keys before they are shared out over several
_LEAST_TILES = 4


class Call:
    """The numbers of `sizes` by name, and what else the kernels of one direction are given. `operands` are what it fetches."""

    def __init__(self, problem: Problem, tensors: Tensors, device: Device, kernel: str, operands: list[Tensor]):
        self.problem, self.tensors, self.device, self.kernel = problem, tensors, device, kernel
        self.chip = device.chip(tensors.query)
        self.geometry = geometry_of(problem, kernel, self.chip, device.simulated)
        self.checked = not proved_in_range(problem, tensors)
        # a flag that no kernel sets needs no memory of its own
        self.errors = device.zeros(torch.int32, tensors.query, fresh=self.checked)
        p, mask = problem, tensors.block_mask
        q_block, kv_block = p.block_size or (p.q_len, p.kv_len)
        self.pack = _pack(p, tensors, self.geometry) if kernel == "forward" else 1
        heads, batches = (1, 1) if mask is None else (mask.H, mask.B)
        heads_left, batches_left = (p.q_heads // self.pack if heads == 1 else 1), (p.batch if batches == 1 else 1)
        self.numbers: dict[str, int] = {
            "BATCH": p.batch, "KV_BATCH": p.kv_batch, "Q_HEADS": p.q_heads, "KV_HEADS": p.kv_heads, "GROUP": p.group,
            "Q_LEN": p.q_len, "KV_LEN": p.kv_len, "Q_BLOCK": q_block, "KV_BLOCK": kv_block,
            "MASK_ROWS": -(-p.q_len // q_block), "MASK_COLUMNS": -(-p.kv_len // kv_block), "MASK_HEADS": heads,
            "MASK_STEP_B": heads if batches > 1 else 0, "MASK_STEP_H": 1 if heads > 1 else 0,
            "RESTS": heads_left * batches_left, "HEADS_LEFT": heads_left, "KV_TASKS": p.kv_batch * p.kv_heads, "SPLITS": 1,
        }  # fmt: skip
        self.list_rows = batches * heads
        self.aligned = all(map(_aligned, operands)) and self.geometry.product == "mma"
        for name, x in zip("QKV", operands, strict=False):
            self.place(name, x)

    def place(self, name: str, x: Tensor) -> None:
        """A tensor's four strides; that of a batch which is shared is 0."""
        steps = [0 if x.shape[0] == 1 else x.stride(0), *x.stride()[1:]]
        self.numbers |= {f"{name}_{side}": step for side, step in zip(("B", "H", "ROW", "COL"), steps, strict=True)}

    def lists(self, kind: str) -> list[Tensor]:
        """offsets, indices, full_offsets, full_indices and the order to launch in, by row ("csr") or by column ("csc")."""
        mask = self.tensors.block_mask
        if mask is None:
            long, short = (self.device.zeros(dtype, self.tensors.query) for dtype in (torch.int64, torch.int32))
            return [long, short, long, short, short]
        walk = mask.walk
        if kind == "csr":
            return [*walk.csr, walk.row_order]
        if mask.B * mask.H == 1:
            return [*walk.csc, walk.column_order]
        return [*walk.csc, torch.arange(self.numbers["MASK_COLUMNS"], dtype=torch.int32, device=walk.csc.offsets.device)]

    def row_tasks(self) -> int:
        """Blocks of threads that cover every query row once."""
        n = self.numbers
        rows = self.geometry.row_tile // self.pack
        return self.list_rows * n["MASK_ROWS"] * -(-min(n["Q_BLOCK"], n["Q_LEN"]) // rows) * n["RESTS"]

    def column_tasks(self) -> int:
        """Blocks of threads that cover every key once."""
        n = self.numbers
        return n["MASK_COLUMNS"] * -(-min(n["KV_BLOCK"], n["KV_LEN"]) // self.geometry.row_tile) * n["KV_TASKS"]

    def splits(self) -> int:
        """Over how many blocks of threads the keys of a row are shared out: as asked, or enough to keep the chip busy."""
        asked = dict(self.problem.options).get("splits")
        if asked is not None:
            return int(asked)  # type: ignore[call-overload]
        tiles = -(-self.problem.kv_len // self.geometry.column_tile)
        return max(1, min(2 * self.chip.processors // self.row_tasks(), tiles // _LEAST_TILES))

    def run(
        self, tasks: int, given: list[Tensor], last: list[Tensor] | None = None, split: bool = False, needs=(False, False, False)
    ) -> None:
        """The kernel that this call is for, with `tasks` blocks of threads; `last` follows the captured tensors."""
        p, simulated = self.problem, self.device.simulated
        variant = Variant(self.geometry, simulated, self.checked, self.aligned, self.pack, split, needs=needs)
        source = kernel_source(p, self.kernel, variant)
        dims = [n for t in self.tensors.captured for pair in zip(t.stride(), t.shape, strict=True) for n in pair]
        numbers = self.tensors.scalars
        floats = (float(self.tensors.scale), *(float(x) for x in numbers))
        # a float that is no 64-bit int is never read as one
        ints = tuple(int(x) if -(2**63) <= x < 2**63 else 0 for x in numbers) or (0,)
        tuples = [self._sizes(), tuple(dims) or (0,), floats, ints]
        captured = [t.to(self.tensors.query.device) for t in self.tensors.captured]
        shared = shared_of(p, self.kernel, self.geometry).bytes
        arguments = [*given, *tuples, *captured, *(last or [])]
        self.device.run(source, self.kernel, tasks, self.geometry, shared, arguments)

    def run_rows(self, kernel: str, given: list[Tensor], lse_grad: bool = False) -> None:
        """A kernel that has one warp a row of query: "delta" or "combine"."""
        p = self.problem
        variant = Variant(self.geometry, self.device.simulated, lse_grad=lse_grad)
        source = kernel_source(p, kernel, variant)
        warps = self.geometry.threads // self.geometry.lanes
        tasks = -(-p.batch * p.q_heads * p.q_len // warps)
        self.device.run(source, kernel, tasks, self.geometry, 0, [*given, self._sizes()])

    def _sizes(self) -> tuple[int, ...]:
        return tuple(self.numbers.get(name, 0) for name in PLACE)

    def raise_errors(self) -> None:
        """Raise IndexError if the kernel read a captured tensor out of range; waits for it only where it had to look."""
        if self.checked and int(self.errors):
            error = named_index_error(self.problem, self.tensors)
            raise error or IndexError("a captured tensor is indexed out of range.")


def _pack(problem: Problem, tensors: Tensors, geometry: Geometry) -> int:
    """How many query heads of a group share a tile: more than one if a head's rows fill less than half of it."""
    if tensors.block_mask is not None and tensors.block_mask.H > 1:
        return 1
    pack = 1
    rows = geometry.row_tile
    while problem.group % (2 * pack) == 0 and rows % (2 * pack) == 0 and 2 * pack * problem.q_len <= rows:
        pack *= 2
    return pack


def _aligned(x: Tensor) -> bool:
    """Whether every row is a whole number of aligned runs of 16 bytes."""
    run = 16 // x.element_size()
    steps = [step for step, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
    dense = x.stride(3) == 1 and x.shape[3] % run == 0
    return dense and x.data_ptr() % 16 == 0 and all(step % run == 0 for step in steps)
