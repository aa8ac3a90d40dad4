"""Run by test_guard_pages.py in a process of its own: memory with pages around it that nobody may touch, and calls in it.

Every tensor of a call begins where a forbidden page ends, or ends where one begins, and so does what the engine allocates
for itself. A read or a write outside takes the process down; the last line printed says in which case.
"""
from __future__ import annotations

import ctypes
import importlib
import itertools
import mmap
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import flexref
from flexref.arguments import prepare
from flexref.autograd import attend
from flexref.blocks.lists import Lists
from flexref.blocks.walk import Walk
from flexref.variants import masks

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_kept: list[mmap.mmap] = []


def guarded(size: int, at_end: bool) -> int:
    """The address of `size` bytes, all of them 0xFF, with a forbidden page before and behind the pages they lie in."""
    pages = -(-size // PAGE)
    area = mmap.mmap(-1, (pages + 2) * PAGE)
    _kept.append(area)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    ctypes.memset(start + PAGE, 0xFF, pages * PAGE)
    for page in (start, start + (pages + 1) * PAGE):
        if _libc.mprotect(ctypes.c_void_p(page), PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    return start + PAGE + (pages * PAGE - size if at_end else 0)


def placed(x: Tensor, at_end: bool) -> Tensor:
    """`x` with its strides in guarded memory that is just large enough."""
    if not x.numel():
        return x
    extent = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    size = extent * x.itemsize
    memory = (ctypes.c_char * size).from_address(guarded(size, at_end))
    flat = torch.frombuffer(memory, dtype=torch.uint8).view(x.dtype)
    flat.copy_(x.detach().as_strided((extent,), (1,)))
    return flat.as_strided(x.shape, x.stride())


class Allocating:
    """A module whose allocations are guarded."""

    def __init__(self, module: Any, names: tuple[str, ...], place):
        self._module, self._names, self._place = module, names, place

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if name not in self._names:
            return found
        return lambda *args, **kwargs: self._place(found(*args, **kwargs))


def placed_array(x: np.ndarray, at_end: bool) -> Any:
    if x.dtype == np.uint8:
        # scratch, which is rounded up to 64 bytes in what is 64 bytes too long: so that what is used ends at the page
        used = (x.size - 64) // 64 * 64
        return SimpleNamespace(ctypes=SimpleNamespace(data=guarded(used, True) - 63 if at_end else guarded(used + 64, False)))
    memory = (ctypes.c_char * x.nbytes).from_address(guarded(x.nbytes, at_end))
    result = np.frombuffer(memory, x.dtype).reshape(x.shape)
    result[...] = x
    return result


def block_mask(kind: str, heads: int, q_len: int, kv_len: int, at_end: bool):
    if kind == "none":
        return None
    if kind == "step":
        whole = flexref.create_block_mask(masks.causal, 1, 1, q_len + 3, kv_len, "cpu", (16, 24))
        mask = whole.rows(torch.tensor(2), length=q_len)
        # whose offsets point into the lists of all steps
        vars(mask)["_walk"] = Walk(mask.grid, Lists(*(placed(x, at_end) for x in mask.walk.runs)))
        return mask
    ids = placed(torch.arange(max(q_len, kv_len)) // 5, at_end)
    mod = {"causal": masks.causal, "document": masks.document(ids)}[kind]
    mask = flexref.create_block_mask(mod, 1, heads if kind == "document" else 1, q_len, kv_len, "cpu", (16, 24))
    walk = Walk(mask.grid, Lists(*(placed(x, at_end) for x in mask.walk.runs)))
    vars(mask)["_walk"] = walk
    return mask


STRIDES = {
    "contiguous": lambda b, h, n, e: torch.randn(b, h, n, e),
    "transposed": lambda b, h, n, e: torch.randn(b, n, h, e).transpose(1, 2),
    "columns": lambda b, h, n, e: torch.randn(b, h, e, n).mT,
    "expanded": lambda b, h, n, e: torch.randn(1, h, 1, e).expand(b, h, n, e),
}
SIZES = [(1, 1, 1, 1), (7, 65, 17, 3), (65, 7, 3, 17), (130, 65, 64, 32)]
NAMES = ("empty", "empty_strided", "empty_like", "zeros", "zeros_like")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def call(engine, dtype, sizes, strides: str, kind: str, captured: str, options: dict, at_end: bool) -> None:
    """Forward, and backward of everything, with every tensor guarded."""
    q_len, kv_len, width, value_width = sizes
    shapes = (2, 4, q_len, width), (2, 2, kv_len, width), (2, 2, kv_len, value_width)
    query, key, value = (placed(STRIDES[strides](*shape).to(dtype), at_end) for shape in shapes)
    table = placed(torch.randn(4, q_len + kv_len - 1, dtype=torch.float32), at_end)
    inputs = [x.requires_grad_() for x in (query, key, value, table)]

    def bias(score, b, h, q_idx, kv_idx):
        # reads the first and the last element
        return score + table[h, q_idx - kv_idx + kv_len - 1]

    mask = block_mask(kind, 4, q_len, kv_len, at_end)
    score_mod = bias if captured == "bias" else None
    problem, tensors = prepare(query, key, value, score_mod, mask, enable_gqa=True, options=options)
    output = attend(engine, problem, tensors)
    grads = tuple(placed(torch.randn_like(x), at_end) for x in (output.out, output.lse))
    results = torch.autograd.grad((output.out, output.lse), inputs if score_mod else inputs[:3], grads)
    assert not any(bool(x.isnan().any()) for x in (output.out, output.lse, *results)), "a number that nobody wrote was read"


def out_of_range(engine, at_end: bool) -> None:
    """An index out of range is an error and never a read."""
    table, ids = placed(torch.randn(8), at_end), placed(torch.tensor([0, 7, -8, 8, -9] * 3), at_end)
    query = placed(torch.randn(1, 1, 15, 8), at_end)

    def far(score, b, h, q_idx, kv_idx):
        return score + table[ids[kv_idx] * 100_000_000]

    def near(score, b, h, q_idx, kv_idx):
        return score + table[ids[kv_idx]]

    for mod in (far, near):
        try:
            attend(engine, *prepare(query, query, query, mod))
        except IndexError:
            continue
        raise AssertionError("no IndexError")


def written_unnoticed(engine, at_end: bool) -> None:
    """An index that PyTorch did not see written: an error, or another element of the table, and never a read beside it."""
    table, ids = placed(torch.randn(8), at_end), placed(torch.zeros(15, dtype=torch.int64), at_end)
    query = placed(torch.randn(1, 1, 15, 8), at_end)

    def mod(score, b, h, q_idx, kv_idx):
        return score + table[ids[kv_idx]]

    for index in (7, 8, -9, 10**9, -(10**15)):
        ids.data[3] = index
        try:
            assert attend(engine, *prepare(query, query, query, mod)).out.isfinite().all()
        except IndexError:
            assert index != 7


def engine_of(name: str) -> tuple[Any, list[Any]]:
    """The engine as it runs on a CPU, and its modules that allocate."""
    backend = importlib.import_module(f"flexref.backends.{name}")
    modules = ["launch", "launch_backward", "call"] if name == "triton" else ["launch"]
    found = [importlib.import_module(f"flexref.backends.{name}.{module}") for module in modules]
    return (backend if name == "numba_cpu" else backend.emulated()), found


def cases(name: str) -> Iterator[tuple]:
    """dtype, sizes, strides, block mask, captured, options."""
    emulated = name != "numba_cpu"
    for i, (dtype, sizes) in enumerate(itertools.product(DTYPES[:1] if emulated else DTYPES, SIZES[1:2] if emulated else SIZES)):
        for j, kind in enumerate(("document",) if emulated else ("none", "causal", "document", "step")):
            options = {} if emulated or i % 2 else {"threads": 3, "q_tile": 16, "kv_tile": 5}
            yield dtype, sizes, list(STRIDES)[(i + j) % len(STRIDES)], kind, ("bias", "none")[(i + j) % 2], options


def planted(modules: list[Any]) -> None:
    """An engine that believes in one key more than there is."""
    plan = modules[0]._Plan

    class Wrong(plan):
        def __init__(self, problem, backward):
            super().__init__(problem, backward)
            self.table[P.kv_len] += 1

    from flexref.backends.numba_cpu.kernels.layout import P

    modules[0]._Plan = Wrong


def main(name: str, *faults: str) -> None:
    torch.manual_seed(0)
    engine, modules = engine_of(name)
    if faults:
        planted(modules)
    counts = Counter()

    def guard(place, at_end):
        def counted(x):
            counts[type(x).__name__] += 1
            return place(x, at_end)

        return counted

    for at_end in (True, False):
        with ExitStack() as stack:
            for module in modules:
                patched = Allocating(torch, NAMES, guard(placed, at_end))
                stack.enter_context(mock.patch.object(module, "torch", patched))
                if hasattr(module, "np"):
                    arrays = Allocating(np, ("empty", "zeros", "array"), guard(placed_array, at_end))
                    stack.enter_context(mock.patch.object(module, "np", arrays))
            for case in cases(name):
                print(*case, "ends at" if at_end else "begins at", "a forbidden page", flush=True)
                call(engine, *case, at_end)
            print("out of range", flush=True)
            out_of_range(engine, at_end)
            print("written unnoticed", flush=True)
            written_unnoticed(engine, at_end)
    assert counts["Tensor"] > 10, counts
    print("all")


if __name__ == "__main__":
    main(*sys.argv[1:])
