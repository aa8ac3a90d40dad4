"""Puts a call together: parameters by value, outputs, scratch memory, one kernel after the other on the current stream."""
from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from flexref.backends.cupy import kernels_for, plan
from flexref.backends.cupy.kernels_for import Variant
from flexref.index_error import named_index_error
from flexref.index_proof import proved_in_range
from flexref.problem import Gradients, Output, Problem, Tensors

# how much memory accumulators of their own may take for thread blocks that add in order
_ORDERED_BYTES = 1 << 28


def forward(problem: Problem, tensors: Tensors, machine) -> Output:
    """out (B, Hq, L, Ev), lse and max_scores (B, Hq, L). Raises IndexError for a captured index out of range."""
    shape = (problem.batch, problem.q_heads, problem.q_len)
    device, acc = tensors.query.device, problem.acc_dtype
    out = ordered_empty(tensors.query, (*shape, problem.value_dim))
    lse = torch.empty(shape, dtype=acc, device=device)
    max_scores = torch.empty(shape, dtype=acc, device=device) if problem.need_max_scores else None
    if out.numel() == 0 or problem.kv_len == 0:
        out.zero_()
        for x in (lse, max_scores):
            if x is not None:
                x.fill_(-math.inf)
        return Output(out, lse, max_scores)
    call = Call(problem, tensors)
    call.place("o", out)
    call.point(lse=lse, max_scores=max_scores)
    saved = (torch.empty_like(lse), torch.empty_like(lse)) if problem.needs_backward else ()
    if saved:
        call.point(row_max=saved[0], log_sum=saved[1])
    mask_heads = tensors.block_mask.H if tensors.block_mask is not None else 1
    packed = plan.packed(problem, mask_heads)
    tiles = plan.forward_tiles(problem, machine.shared_limit)
    tasks = call.walk_keys(tiles, packed)
    splits = plan.forward_splits(problem, tasks, -(-problem.kv_len // tiles.cols), machine.processors)
    if splits > 1:
        call.point(partial=torch.empty(*shape, splits, 2 + problem.value_dim, dtype=acc, device=device))
    call.number(splits=splits, tasks=tasks * splits)
    size = plan.forward_bytes(problem, tiles)
    variant = Variant(tiles, size, call.checked, packed, splits > 1)
    _kernel("forward", problem, variant, machine)(tasks * splits, size, call.words)
    if splits > 1:
        rows = problem.batch * problem.q_heads * problem.q_len
        _kernel("combine", problem, variant, machine)(-(-rows // (plan.THREADS // 32)), 0, call.words)
    call.raise_if_wrong()
    return Output(out, lse, max_scores, saved)


def backward(
    problem: Problem, tensors: Tensors, output: Output, grad_out: Tensor, grad_lse: Tensor | None, machine
) -> Gradients:
    """A gradient, in its tensor's dtype and stride order, for each input that needs one."""
    inputs = (tensors.query, tensors.key, tensors.value)
    if 0 in (problem.batch, problem.q_len, problem.kv_len):
        pairs = zip(inputs, problem.needs_grad, strict=True)
        d_query, d_key, d_value = (torch.zeros_like(x) if need else None for x, need in pairs)
        pairs = zip(tensors.captured, problem.captures, strict=True)
        zeros = tuple(torch.zeros_like(t) if c.needs_grad else None for t, c in pairs)
        return Gradients(d_query, d_key, d_value, zeros)
    results = [ordered_empty(x, x.shape) if need else None for x, need in zip(inputs, problem.needs_grad, strict=True)]
    call = Call(problem, tensors)
    call.place("o", output.out)
    call.place("g", grad_out)
    for name, x in zip(("dq", "dk", "dv"), results, strict=True):
        if x is not None:
            call.place(name, x)
    delta = torch.empty_like(output.lse)
    call.point(row_max=output.saved[0], log_sum=output.saved[1], delta=delta)
    call.point(lse_grad=None if grad_lse is None else grad_lse.resolve_neg().contiguous())
    tiles = plan.backward_tiles(problem, machine.shared_limit)
    variant = Variant(tiles, 0, call.checked)
    _kernel("delta", problem, variant, machine)(-(-delta.numel() // (plan.THREADS // 32)), 0, call.words)
    flags = [name for name, need in zip(("DK", "DV"), problem.needs_grad[1:], strict=True) if need]
    captured = any(c.needs_grad for c in problem.captures)
    # with the keys' gradients at hand, query's costs one product more instead of three
    summed = problem.needs_grad[0] and bool(flags) and not problem.deterministic
    if summed:
        flags.append("DQ")
        call.point(dq_sum=torch.zeros(*delta.shape, problem.head_dim, dtype=problem.acc_dtype, device=delta.device))
    totals = None
    if captured:
        flags += ["CAPTURED", "ORDERED"] if problem.deterministic else ["CAPTURED"]
    if flags:
        totals = _walk_queries(call, tiles, tuple(flags), machine)
    if problem.needs_grad[0]:
        tasks = call.walk_keys(tiles)
        size = plan.query_bytes(problem, tiles)
        variant = Variant(tiles, size, call.checked, flags=("BACKWARD", "FROM_SUM") if summed else ("BACKWARD",))
        _kernel("backward_query", problem, variant, machine)(tasks, size, call.words)
    return Gradients(results[0], results[1], results[2], _captured_gradients(problem, tensors, totals))


def _walk_queries(call: Call, tiles: plan.Tiles, flags: tuple[str, ...], machine) -> Tensor | None:
    """Launch backward_key for what is wanted; float64 accumulators of captured gradients (copies, elements), if any."""
    problem, tasks = call.problem, call.walk_queries(tiles)
    blocks, totals = tasks, None
    size = kernels_for.accumulator_starts(problem.captures)[-1]
    if "CAPTURED" in flags:
        ordered = "ORDERED" in flags
        blocks = min(tasks, machine.processors, max(1, _ORDERED_BYTES // (8 * max(size, 1)))) if ordered else tasks
        copies = blocks if ordered else 1
        totals = torch.zeros(copies, max(size, 1), dtype=torch.float64, device=call.tensors.query.device)
        call.point(accumulators=totals)
        call.number(accumulators_step=totals.shape[1] if ordered else 0)
    shared = plan.key_bytes(problem, tiles)
    for wanted in plan.key_passes(problem, flags):
        variant = Variant(tiles, shared, call.checked, flags=("BACKWARD", "LISTS_OF_QUERIES", *wanted))
        _kernel("backward_key", problem, variant, machine)(blocks, shared, call.words)
    return totals


def _captured_gradients(problem: Problem, tensors: Tensors, totals: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradient of each captured tensor that needs one, in its own dtype and device."""
    if totals is None:
        return tuple(None for _ in problem.captures)
    starts, sums = kernels_for.accumulator_starts(problem.captures), totals.sum(0)
    pairs = zip(tensors.captured, problem.captures, starts, strict=False)
    return tuple(
        sums[start : start + t.numel()].view(t.shape).to(t.device, t.dtype) if c.needs_grad else None for t, c, start in pairs
    )


@lru_cache(maxsize=4096)
def _kernel(name: str, problem: Problem, variant: Variant, machine):
    """The compiled kernel of a problem; captured numbers, the scale and strides are no part of it."""
    return machine.kernel(name, kernels_for.filled(f"{name}.cu", problem, variant))


def ordered_empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uninitialised, in `like`'s dtype and device, its dimensions in memory in the order of those of `like`."""
    order = sorted(range(4), key=lambda i: (-like.stride(i), i))
    strides, step = [0] * 4, 1
    for i in reversed(order):
        strides[i] = step
        step *= max(shape[i], 1)
    return torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device)


class Call:
    """The parameters of one call's kernels, and everything that must stay alive until they were launched."""

    def __init__(self, problem: Problem, tensors: Tensors):
        self.problem, self.tensors = problem, tensors
        self.places = kernels_for.parameter_words()
        table = max(1, kernels_for.table_start(problem.captures, len(problem.captures)))
        scalars = kernels_for.scalar_count(problem)
        self.words = np.zeros(kernels_for.parameter_count(problem), np.int64)
        self.keep: list = []
        self.checked = not proved_in_range(problem, tensors)
        for name, x in (("q", tensors.query), ("k", tensors.key), ("v", tensors.value)):
            self.place(name, x)
        self.words[self.places["scale"][0]] = np.float64(tensors.scale).view(np.int64)
        p = problem
        self.number(
            batch=p.batch, kv_batch=p.kv_batch, q_heads=p.q_heads, kv_heads=p.kv_heads, group=p.group, q_len=p.q_len,
            kv_len=p.kv_len, head_dim=p.head_dim, value_dim=p.value_dim, splits=1,
        )  # fmt: skip
        self._place_captures(len(self.words) - table - 2 * scalars, table, scalars)
        if self.checked:
            self.wrong = torch.zeros(1, dtype=torch.int32, device=tensors.query.device)
            self.point(wrong=self.wrong)

    def number(self, **numbers: int) -> None:
        """Set plain members of Params."""
        for name, number in numbers.items():
            self.words[self.places[name][0]] = number

    def point(self, **tensors: Tensor | None) -> None:
        """Set members of Params to where tensors are; None is no tensor."""
        for name, x in tensors.items():
            if x is not None:
                self.keep.append(x)
            self.words[self.places[name][0]] = 0 if x is None else x.data_ptr()

    def place(self, name: str, x: Tensor) -> None:
        """A Tensor of Params: address, strides (0 for a batch that is shared), whether rows are read 16 bytes at a time."""
        x = self.kept(x)
        strides = list(x.stride())
        if x.shape[0] == 1:
            strides[0] = 0
        at, _ = self.places[name]
        steps = [strides[i] for i in range(3) if x.shape[i] > 1]
        bytes_of = [x.data_ptr(), x.shape[3] * x.itemsize, *(step * x.itemsize for step in steps)]
        wide = (strides[3] == 1 or x.shape[3] == 1) and all(n % 16 == 0 for n in bytes_of)
        self.words[at : at + 6] = (x.data_ptr(), *strides, wide)

    def kept(self, x: Tensor) -> Tensor:
        """`x` as its memory says, kept alive: PyTorch keeps the sign of some views, such as x.conj().imag, as a mere note."""
        self.keep.append(x.resolve_neg() if x.is_neg() else x)
        return self.keep[-1]

    def _place_captures(self, first: int, table: int, scalars: int) -> None:
        device, row = self.tensors.query.device, []
        for x in self.tensors.captured:
            x = self.kept(x.detach().to(device) if x.device != device else x)
            strides = x.stride()
            if x.numel() == 0:
                # every read is out of range in some dimension, and is done at place 0
                strides = (0,) * x.dim()
                self.keep.append(torch.zeros(2, dtype=torch.float64, device=device))
            row.append(self.keep[-1].data_ptr())
            for stride, size in zip(strides, x.shape, strict=True):
                row += [stride, size]
        self.words[first : first + len(row)] = row
        numbers = self.tensors.scalars[:scalars]
        at = first + table
        self.words[at : at + len(numbers)] = np.array([float(x) for x in numbers]).view(np.int64)
        # a float that is no 64-bit int is never read as one
        self.words[at + scalars : at + scalars + len(numbers)] = [int(x) if -(2**63) <= x < 2**63 else 0 for x in numbers]

    def walk_keys(self, tiles: plan.Tiles, packed: bool = False) -> int:
        """Tiles of query rows that walk the lists of key blocks; how many tasks that is."""
        p, mask = self.problem, self.tensors.block_mask
        own_len = p.q_len * (p.group if packed else 1)
        own_block = own_len if packed or p.block_size is None else p.block_size[0]
        rows = 1 if packed else -(-p.q_len // own_block)
        self._lists(None if mask is None else mask.walk.csr, rows)
        if mask is not None:
            self.point(order=mask.walk.row_order)
        self.number(own_len=own_len, own_block=own_block, list_len=p.kv_len)
        self.number(list_block=p.block_size[1] if p.block_size else p.kv_len)
        return self._tasks(rows, min(own_block, own_len), tiles, p.batch, p.kv_heads if packed else p.q_heads)

    def walk_queries(self, tiles: plan.Tiles) -> int:
        """Tiles of keys that walk the lists of query blocks; how many tasks that is."""
        p, mask = self.problem, self.tensors.block_mask
        own_block = p.kv_len if p.block_size is None else p.block_size[1]
        columns = -(-p.kv_len // own_block)
        self._lists(None if mask is None else mask.walk.csc, columns)
        self.point(order=mask.walk.column_order if mask is not None and mask.B * mask.H == 1 else None)
        self.number(own_len=p.kv_len, own_block=own_block, list_len=p.q_len)
        self.number(list_block=p.block_size[0] if p.block_size else p.q_len)
        tasks = self._tasks(columns, min(own_block, p.kv_len), tiles, p.kv_batch, p.kv_heads)
        self.number(tasks=tasks)
        return tasks

    def _lists(self, lists, rows: int) -> None:
        mask = self.tensors.block_mask
        self.number(mask_batch=mask.B if mask else 1, mask_heads=mask.H if mask else 1, mask_rows=rows)
        if lists is not None:
            names = ("offsets", "indices", "full_offsets", "full_indices")
            self.point(**dict(zip(names, lists, strict=True)))

    def _tasks(self, rows: int, longest: int, tiles: plan.Tiles, batches: int, heads: int) -> int:
        self.number(tiles=-(-longest // tiles.rows))
        return rows * -(-longest // tiles.rows) * batches * heads

    def raise_if_wrong(self) -> None:
        """Only a kernel that had to check waits for its answer."""
        if self.checked and bool(self.wrong):
            raise named_index_error(self.problem, self.tensors) or IndexError("a captured tensor is indexed out of range.")
