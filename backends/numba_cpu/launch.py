"""Puts a call together: addresses and strides into one table, scratch memory, workers, and what comes back."""
from __future__ import annotations

import math
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from flexref.backends.numba_cpu import kernels_for
from flexref.backends.numba_cpu.cache import callable_at
from flexref.backends.numba_cpu.kernels.layout import P_SIZE, SCRATCH, T_SIZE, P
from flexref.backends.numba_cpu.workers import run_team, services, team_at
from flexref.index_error import named_index_error
from flexref.problem import Gradients, Output, Problem, Tensors

Q_TILE, KV_TILE = 64, 128
# below this many multiply-adds, waking another thread costs more than it gains
_SMALL_WORK = 1 << 21


def forward(problem: Problem, tensors: Tensors) -> Output:
    """out (B, Hq, L, Ev), lse and max_scores (B, Hq, L). Raises IndexError for a captured index out of range."""
    shape = (problem.batch, problem.q_heads, problem.q_len)
    out = ordered_empty(tensors.query, (*shape, problem.value_dim))
    lse = torch.empty(shape, dtype=problem.acc_dtype, device="cpu")
    max_scores = torch.empty(shape, dtype=problem.acc_dtype, device="cpu") if problem.need_max_scores else None
    if out.numel() == 0 or problem.kv_len == 0:
        out.zero_()
        for x in (lse, max_scores):
            if x is not None:
                x.fill_(-math.inf)
        return Output(out, lse, max_scores)
    call = _Call(problem, tensors, backward=False)
    call.place("o", out)
    call.params[P.lse] = lse.data_ptr()
    call.params[P.max_scores] = 0 if max_scores is None else max_scores.data_ptr()
    saved = ()
    if problem.needs_backward:
        saved = torch.empty_like(lse), torch.empty_like(lse)
        call.params[P.row_max], call.params[P.log_sum] = (x.data_ptr() for x in saved)
    call.keep += [lse, max_scores, *saved]
    call.run(problem.batch * problem.q_heads * call.tile_count)
    return Output(out, lse, max_scores, saved)


def backward(
    problem: Problem, tensors: Tensors, output: Output, grad_out: Tensor, grad_lse: Tensor | None
) -> Gradients:
    """A gradient, in its tensor's dtype and stride order, for each input that needs one."""
    inputs = (tensors.query, tensors.key, tensors.value)
    if 0 in (problem.batch, problem.q_len, problem.kv_len):
        pairs = zip(inputs, problem.needs_grad, strict=True)
        d_query, d_key, d_value = (torch.zeros_like(x) if need else None for x, need in pairs)
        pairs = zip(tensors.captured, problem.captures, strict=True)
        zeros = tuple(torch.zeros_like(t) if c.needs_grad else None for t, c in pairs)
        return Gradients(d_query, d_key, d_value, zeros)
    call = _Call(problem, tensors, backward=True)
    need_query, need_key, need_value = problem.needs_grad
    d_query = ordered_empty(tensors.query, tensors.query.shape) if need_query else None
    call.place("o", output.out)
    call.place("g", grad_out)
    if d_query is not None:
        call.place("dq", d_query)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    call.params[P.row_max], call.params[P.log_sum] = (x.data_ptr() for x in output.saved)
    call.params[P.lse_grad] = 0 if grad_lse is None else grad_lse.data_ptr()
    heads = problem.kv_batch * problem.kv_heads
    splits = -(-call.threads // heads)
    width, value_width = call.padded_width, call.padded_value_width
    shape = heads, splits, problem.kv_len * (width + value_width)
    partial = torch.zeros(shape, dtype=problem.acc_dtype, device="cpu")
    starts = kernels_for.accumulator_starts(problem.captures)
    accumulators = np.zeros((call.threads, max(starts[-1], 1)))
    call.params[P.splits], call.params[P.partial] = splits, partial.data_ptr()
    call.params[P.static] = int(starts[-1] > 0)
    call.params[P.accumulators], call.params[P.accumulators_size] = accumulators.ctypes.data, accumulators.strides[0]
    call.keep += [grad_lse, partial, accumulators, *output.saved]
    call.run(heads * splits)
    middle = problem.kv_len * width
    d_key = _summed(partial[..., :middle], tensors.key, width) if need_key else None
    d_value = _summed(partial[..., middle:], tensors.value, value_width) if need_value else None
    totals = torch.from_numpy(accumulators.sum(0))
    captured = tuple(
        totals[start : start + t.numel()].view(t.shape).to(t.dtype) if c.needs_grad else None
        for t, c, start in zip(tensors.captured, problem.captures, starts, strict=False)
    )
    return Gradients(d_query, d_key, d_value, captured)


def _summed(partial: Tensor, like: Tensor, width: int) -> Tensor:
    """The gradient of `like` (B, H, S, E) from the parts of its tasks (B * H, splits, S * width), added in order."""
    parts = partial.reshape(*like.shape[:2], partial.shape[1], like.shape[2], width)[..., : like.shape[3]]
    total = parts[:, :, 0]
    for i in range(1, parts.shape[2]):
        total = total + parts[:, :, i]
    result = ordered_empty(like, like.shape)
    result.copy_(total)
    return result


def ordered_empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uninitialised, in `like`'s dtype, its dimensions in memory in the order of those of `like`."""
    if like.is_contiguous():
        return torch.empty(shape, dtype=like.dtype, device="cpu")
    order = sorted(range(4), key=lambda i: (-like.stride(i), i))
    strides, step = [0] * 4, 1
    for i in reversed(order):
        strides[i] = step
        step *= max(shape[i], 1)
    return torch.empty_strided(shape, strides, dtype=like.dtype, device="cpu")


class _Call:
    """The table of one call, and everything that must stay alive until it returns."""

    def __init__(self, problem: Problem, tensors: Tensors, backward: bool):
        self.problem, self.tensors = problem, tensors
        options = dict(problem.options)
        self.threads = int(options.get("threads") or torch.get_num_threads())  # type: ignore[call-overload]
        self.plan = plan = _plan(problem, backward)
        self.padded_width, self.padded_value_width = plan.padded_width, plan.padded_value_width
        self.tile_count = int(plan.table[P.tiles])
        self.params = plan.table.copy()
        self.params.view(np.float64)[P.scale] = tensors.scale
        self.keep: list = []
        for name, x in (("q", tensors.query), ("k", tensors.key), ("v", tensors.value)):
            self.place(name, x)
        self._place_lists()
        self._place_captures()

    def place(self, name: str, x: Tensor) -> None:
        """A tensor's address and its four strides; the stride of a batch that is shared is 0."""
        at = getattr(P, name)
        x = self.kept(x)
        # a thread that an interrupt left behind may still read or write it
        self.keep.append(x)
        strides = x.stride()
        shared = x.shape[0] == 1
        self.params[at] = x.data_ptr()
        self.params[at + 1 : at + 5] = (0 if shared else strides[0], *strides[1:])

    def kept(self, x: Tensor) -> Tensor:
        """`x` as its memory says: PyTorch keeps the sign of some views, such as x.conj().imag, as a mere note."""
        if not x.is_neg():
            return x
        self.keep.append(x.resolve_neg())
        return self.keep[-1]

    def _place_lists(self) -> None:
        mask = self.tensors.block_mask
        if mask is None:
            return
        lists = mask.walk.runs
        for at, x in zip((P.offsets, P.indices, P.full_offsets, P.full_starts, P.full_counts), lists, strict=True):
            self.params[at] = x.data_ptr()
        rows = int(self.params[P.rows])
        self.params[P.row_step_h] = rows if mask.H > 1 else 0
        self.params[P.row_step_b] = rows * mask.H if mask.B > 1 else 0
        # an empty list has no address, and offsets of 0 would mean that there is no mask at all
        self.lists = lists

    def _place_captures(self) -> None:
        if not self.problem.captures and not self.tensors.scalars:
            return
        table: list[int] = []
        nothing = np.zeros(2, np.int64)
        for x in map(self.kept, self.tensors.captured):
            table.append(x.data_ptr() if x.numel() else nothing.ctypes.data)
            for stride, size in zip(x.stride(), x.shape, strict=True):
                table += [stride, size]
        numbers = self.tensors.scalars
        self.captured = np.array(table or [0], np.int64)
        self.floats = np.array([float(x) for x in numbers] or [0.0])
        # a float that is no 64-bit int is never read as one
        self.ints = np.array([int(x) if abs(x) < 2**63 else 0 for x in numbers] or [0], np.int64)
        self.keep.append(nothing)
        self.params[P.captured] = self.captured.ctypes.data
        self.params[P.floats], self.params[P.ints] = self.floats.ctypes.data, self.ints.ctypes.data

    def run(self, tasks: int) -> None:
        """Run the driver on as many workers as the work is worth; they share out the tasks themselves."""
        p = self.problem
        work = p.batch * p.q_heads * p.q_len * p.kv_len * (p.head_dim + p.value_dim)
        workers = 1 if work < _SMALL_WORK else min(self.threads, tasks)
        size = int(self.params[P.scratch_size])
        scratch = np.empty(workers * size + 64, np.uint8)
        self.params[P.scratch] = (scratch.ctypes.data + 63) // 64 * 64
        self.params[P.tasks], self.params[P.workers] = tasks, workers
        run_team(self.plan.team, self.plan.driver, self.params, workers, keep=(self, scratch))
        if self.params[P.errors]:
            error = named_index_error(self.problem, self.tensors)
            raise error or IndexError("a captured tensor is indexed out of range.")


class _Plan:
    """What is the same for every call of a problem: the driver, and the part of the table that never changes."""

    def __init__(self, problem: Problem, backward: bool):
        p = problem
        options = dict(p.options)
        addresses = kernels_for.addresses(p, backward)
        driver = addresses.pop("backward" if backward else "forward")
        self.driver, self.team = callable_at(driver), team_at(addresses.pop("team"))
        size = p.acc_dtype.itemsize
        lanes = _vector_bytes() // size
        self.padded_width, self.padded_value_width = -(-p.head_dim // lanes) * lanes, -(-p.value_dim // lanes) * lanes
        q_block, kv_block = p.block_size or (p.q_len, p.kv_len)
        q_block, kv_block = min(q_block, p.q_len), min(kv_block, p.kv_len)
        q_tile = min(-(-int(options.get("q_tile") or Q_TILE) // lanes) * lanes, -(-q_block // lanes) * lanes)  # type: ignore
        kv_tile = min(int(options.get("kv_tile") or KV_TILE), p.kv_len)  # type: ignore[call-overload]
        rows = -(-p.q_len // q_block)
        table = np.zeros(P_SIZE, np.int64)
        numbers = {
            "batch": p.batch, "kv_batch": p.kv_batch, "q_heads": p.q_heads, "group": p.group, "q_len": p.q_len,
            "kv_len": p.kv_len, "width": p.head_dim, "value_width": p.value_dim, "q_tile": q_tile, "kv_tile": kv_tile,
            "tiles": rows * -(-q_block // q_tile), "splits": 1, "q_block": q_block, "kv_block": kv_block, "rows": rows,
        }  # fmt: skip
        for name, number in numbers.items():
            table[getattr(P, name)] = number
        for name, address in (addresses | services() | {"driver": driver, "poller": -1}).items():
            table[getattr(P, name)] = address
        wide = max(self.padded_width, self.padded_value_width)
        sizes = dict.fromkeys(SCRATCH, 0) | {
            "tile": T_SIZE * 8,
            "q": q_tile * wide * size, "q_t": wide * q_tile * size, "o": 0, "o_t": wide * q_tile * size,
            "scores": kv_tile * q_tile * size, "live": kv_tile * q_tile,
            # forward.py keeps a row more behind these
            "row_max": 3 * q_tile * size, "row_sum": q_tile * size, "shrink": q_tile * size, "fresh": 2 * q_tile * size,
            "k": kv_tile * p.head_dim * size, "v": kv_tile * p.value_dim * size, "rows": 3 * q_tile * size,
        }  # fmt: skip
        if backward:
            sizes |= {"g": q_tile * wide * size, "g_t": wide * q_tile * size, "grads": kv_tile * q_tile * size}
        place = 0
        for name in SCRATCH:
            table[getattr(P, "at_" + name)] = place
            place += -(-sizes[name] // 64) * 64
        table[P.scratch_size] = place
        self.table = table


@lru_cache(maxsize=4096)
def _plan(problem: Problem, backward: bool) -> _Plan:
    return _Plan(problem, backward)


@cache
def _vector_bytes() -> int:
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 64
    return 32 if features.get("avx2") and features.get("fma") else 16
