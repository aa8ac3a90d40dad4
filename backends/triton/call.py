"""What every launch needs: where the tensors are, the arguments of the mods, the walk over the lists, a tile that fits."""
from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flexref.backends.triton import kernels_for
from flexref.backends.triton.tiles import Tile, padded, smaller, tile_for
from flexref.index_error import named_index_error
from flexref.index_proof import proved_in_range
from flexref.problem import Problem, Tensors

_REACH = 2**31 - 1
# a launch without the tensor memory accelerator
UNTILED: dict[str, Any] = {"k_tiles": None, "v_tiles": None, "TMA": False}
# no tile has more rows
_TALLEST = 256
# blocks up to this are walked to their end, so that a length makes no build of its own
_LONG_BLOCK = 1024
# what K and V of the heads that run beside one another may take of the second-level cache, as in FlashAttention-3
_SECTION_BYTES = 32 << 20
# the tile that a kernel ended with after one did not fit, by what decides the size
_fitted: dict[tuple, Tile] = {}
# the functions and tiles whose careful launch is known to fit
_carefully: set[tuple] = set()


class Call:
    """One call's arguments that forward and backward share. On CPU tensors it is the interpreter's."""

    def __init__(self, problem: Problem, tensors: Tensors, *more: Tensor):
        """`more`: what else is read by rows, such as grad_out."""
        self.problem, self.tensors = problem, tensors
        self.device = tensors.query.device
        self.emulated = self.device.type == "cpu"
        self.capability = None if self.emulated else torch.cuda.get_device_capability(self.device)
        self.options = dict(problem.options)
        self.captured = [_readable(t, self.device) for t in tensors.captured]
        self.near = frozenset(i for i, t in enumerate(self.captured) if _extent(t) <= _REACH)
        self.wide = any(_is_wide(x) for x in (tensors.query, tensors.key, tensors.value, *more))
        self.checks = not proved_in_range(problem, tensors)
        self.errors = torch.zeros(1, dtype=torch.int32, device=self.device) if self.checks else None

    def function(self, kernel: str) -> Any:
        """The compiled-when-called function of a kernel."""
        text = kernels_for.text_of(kernel, self.problem, self.near, self.wide, self.checks, self.emulated)
        return getattr(kernels_for.module_of(text, self.emulated), kernel)

    def mods(self) -> dict[str, Any]:
        """The arguments of the mods by name."""
        found: dict[str, Any] = {}
        for line in kernels_for.argument_lists(self.problem, False)["arguments"]:
            name = line.removesuffix(",")
            number, _, part = name[1:].partition("_")
            if name[0] != "c":
                value = self.tensors.scalars[int(number)]
                # a float that is no 64-bit int is never read as one
                found[name] = float(value) if name[0] == "f" else int(value) if -(2**63) <= value < 2**63 else 0
                continue
            tensor = self.captured[int(number)]
            sizes = self.problem.captures[int(number)].shape
            found[name] = tensor if not part else tensor.stride(int(part[1:])) if part[0] == "s" else sizes[int(part[1:])]
        return found

    def arguments(self) -> dict[str, Any]:
        """What every kernel takes that walks: query, key and value, the mods', lengths and heads."""
        p, tensors = self.problem, self.tensors
        q, k, v = (plain(x) for x in (tensors.query, tensors.key, tensors.value))
        return {
            "q": q, "k": k, "v": v, **strides(q, "q"), **strides(k, "k"), **strides(v, "v"), **self.mods(), **self.sizes(),
            "errors": self.errors, "scale": tensors.scale, "kv_batch": p.kv_batch, "q_heads": p.q_heads,
            "kv_heads": p.kv_heads, "group": p.group, "q_len": p.q_len, "kv_len": p.kv_len,
            "FOLD": self.folds(), "FUSED": self.fuses(),
        }  # fmt: skip

    def row_tile(self, tile: Tile) -> dict[str, Any]:
        """The tile of a kernel that walks keys. Without lists, every tile of keys is a block, and all queries are one."""
        found = {"BLOCK_M": tile.q, "BLOCK_N": tile.kv, "num_warps": tile.warps, "num_stages": tile.stages}
        if self.problem.block_size is None:
            return found | {"Q_BLOCK": 1 << 30, "KV_BLOCK": tile.kv, "columns": -(-self.problem.kv_len // tile.kv)}
        return found | dict(zip(("Q_BLOCK", "KV_BLOCK"), block_sides(self.problem), strict=True))

    def walk(self, by_column: bool, heads: int) -> dict[str, Any]:
        """The lists, in the order of rows (or columns), and what says which of `heads` programs work on which of them."""
        p, mask = self.problem, self.tensors.block_mask
        q_block, kv_block = p.block_size or (p.q_len, p.kv_len)
        rows, columns = -(-p.q_len // q_block), -(-p.kv_len // kv_block)
        mask_batch, mask_heads = (1, 1) if mask is None else (mask.B, mask.H)
        lists = (None,) * 4 if mask is None else mask.walk.csc if by_column else mask.walk.csr
        order = None if mask is None else mask.walk.column_order if by_column else mask.walk.row_order
        replicas = (p.batch if mask_batch == 1 else 1) * (heads if mask_heads == 1 else 1)
        lines = columns if by_column else rows
        return {
            "offsets": lists[0], "indices": lists[1], "full_offsets": lists[2], "full_indices": lists[3], "order": order,
            "rows": rows, "columns": columns, "mask_heads": mask_heads, "list_rows": mask_batch * mask_heads * lines,
            "replicas": replicas, "section": self._section(replicas, heads),
        }  # fmt: skip

    def _section(self, replicas: int, heads: int) -> int:
        """How many heads run beside one another: as many as have their keys and values in the cache."""
        p = self.problem
        bytes_a_head = max(1, p.kv_len * (p.head_dim + p.value_dim) * p.dtype.itemsize)
        group = max(1, heads // p.kv_heads)
        return min(replicas, max(1, _SECTION_BYTES // bytes_a_head) * group)

    def sizes(self) -> dict[str, Any]:
        """What is known when a kernel is compiled, beside its tile."""
        p = self.problem
        return {
            "LISTS": p.block_size is not None, "HEAD_DIM": p.head_dim, "VALUE_DIM": p.value_dim,
            "HEAD_COLUMNS": self.columns(p.head_dim), "VALUE_COLUMNS": self.columns(p.value_dim),
            "HAS_SCORE": p.score is not None,
            "HAS_MASK": p.mask is not None and p.block_size is not None, "CHECK_READS": self.checks,
            "PRECISION": str(self.options.get("precision", "ieee")), "CHUNK": 128 if self.emulated else self.columns(1),
        }  # fmt: skip

    def columns(self, n: int) -> int:
        """The columns of a tile that n fit in; of half types on Hopper at least 64.

        Triton 3.6.0 makes wgmma read wrongly what was computed and has 16 or 32 columns (decision 0023).
        """
        narrow = self.capability is None or self.capability[0] != 9 or self.problem.dtype.itemsize != 2
        return padded(n) if narrow else max(64, padded(n))

    def folds(self) -> bool:
        """Whether scale and log2(e) may be one factor: there is no score_mod, and the greatest product stays greatest."""
        return self.problem.score is None and 1e-30 < self.tensors.scale < 1e30

    def fuses(self) -> bool:
        """Whether row_max is kept times that factor: bfloat16 can hold what its rounding leaves over in every weight."""
        return self.folds() and self.problem.dtype == torch.bfloat16

    def run(self, kernel: str, launch: Callable[[Any, Tile], None]) -> None:
        """`launch(function, tile)` with the first tile that fits."""
        tile = tile_for(kernel, self.problem, self.capability)
        key = fit_key(kernel, self.problem, self.device, tile)
        tile = _fitted.get(key) or tile
        function = self.function("forward" if kernel == "decode" else kernel)
        with nullcontext() if self.emulated else torch.cuda.device(self.device):
            while True:
                try:
                    launch(function, tile)
                    return
                except Exception as error:
                    following = _following(tile, error)
                    if following is None:
                        raise
                    tile = _fitted[key] = following

    def twice(self, function: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        """The launch, and one that does again, with care, what did not come out finite: only a masked NaN needs it (R4)."""
        # written by every program of the first launch
        unsound = torch.empty(math.prod(grid), dtype=torch.int32, device=self.device)
        careful = arguments | {"num_stages": 1, "num_warps": max(8, arguments["num_warps"]), "unsound": unsound, "CAREFUL": True}
        if "TMA" in careful:
            # it never loads a whole tile of keys
            careful |= UNTILED
        key = function, arguments["BLOCK_M"], arguments["BLOCK_N"]
        if key not in _carefully:
            # nothing is unsound here, so this does nothing but find out whether it fits, before anything has been added up
            function[grid](**careful | {"unsound": torch.zeros_like(unsound)})
            _carefully.add(key)
        function[grid](**arguments, unsound=unsound, CAREFUL=False)
        function[grid](**careful)

    def raise_bad_reads(self) -> None:
        """IndexError if a checked read was out of range (R13); waits for the device only if there was something to check."""
        if self.errors is not None and bool(self.errors.item()):
            raise named_index_error(self.problem, self.tensors) or IndexError("a captured tensor is indexed out of range.")


def _following(tile: Tile, error: Exception) -> Tile | None:
    """What to try after a tile that does not fit, or that Triton's pipeliner cannot do; None if another is no help."""
    if type(error).__name__ == "OutOfResources":
        return smaller(tile)
    compiling = isinstance(error, RuntimeError) and str(error).startswith("PassManager")
    return tile._replace(stages=1) if compiling and tile.stages > 1 else None


def fit_key(kernel: str, problem: Problem, device: torch.device | str, first: Tile) -> tuple:
    """What decides whether a tile fits, and which was tried first."""
    p = problem
    kinds = p.dtype, p.key_dtype, p.value_dtype, *((c.dtype, c.needs_grad) for c in p.captures)
    return kernel, str(device), first, kinds, p.head_dim, p.value_dim, p.score, p.mask, p.block_size, p.options


def block_sides(problem: Problem) -> tuple[int, int]:
    """The block size as kernels know it: a block that is much longer than the length is not walked to its end."""
    assert problem.block_size is not None
    pairs = zip(problem.block_size, (problem.q_len, problem.kv_len), strict=True)
    q_block, kv_block = (min(block, max(_LONG_BLOCK, padded(length))) for block, length in pairs)
    return q_block, kv_block


def q_side(problem: Problem) -> int:
    """Query rows of a block, or of all if there are no lists."""
    return min(problem.block_size[0], problem.q_len) if problem.block_size else problem.q_len


def fitted_tile(key: tuple) -> Tile | None:
    """The tile that a kernel ended with, if the first did not fit."""
    return _fitted.get(key)


def strides(x: Tensor, prefix: str) -> dict[str, int]:
    """The four strides of `x` as arguments."""
    names = ("b", "h", "row", "column")
    return {f"{prefix}_{name}": stride for name, stride in zip(names, x.stride(), strict=True)}


def plain(x: Tensor) -> Tensor:
    """As its memory says: PyTorch keeps the sign of some views, such as x.conj().imag, as a mere note."""
    return x.detach().resolve_neg()


def _readable(x: Tensor, device: torch.device) -> Tensor:
    """A captured tensor where the kernel can read it: bools as bytes, a number of the CPU moved, never without an element."""
    x = plain(x)
    if x.device != device:
        x = x.to(device)
    if x.dtype == torch.bool:
        x = x.view(torch.uint8)
    return x if x.numel() else x.new_zeros(1).expand([1] * x.dim()) if x.dim() else x


def _is_wide(x: Tensor) -> bool:
    """Whether the rows or the columns of a tile lie further apart than 32 bits can say."""
    return x.stride(2) * _TALLEST > _REACH or x.stride(3) * x.shape[3] > _REACH


def _extent(x: Tensor) -> int:
    return sum((size - 1) * abs(stride) for size, stride in zip(x.shape, x.stride(), strict=True))


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; for the interpreter a number small enough that splits come in several sizes."""
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
