"""Puts a call together: which kernels, over which grid, with which numbers and tensors, and what comes back."""
from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from flexref.backends.numba_cuda.call import Call
from flexref.backends.numba_cuda.device import Device, plain
from flexref.backends.numba_cuda.geometry import rounds
from flexref.backends.numba_cuda.kernels_for import gathered
from flexref.problem import Gradients, Output, Problem, Tensors


def forward(problem: Problem, tensors: Tensors, device: Device) -> Output:
    """out (B, Hq, L, Ev), lse and max_scores (B, Hq, L). Raises IndexError for a captured index out of range."""
    tensors = _plain(tensors)
    shape = (problem.batch, problem.q_heads, problem.q_len)
    out = ordered_empty(tensors.query, (*shape, problem.value_dim))
    lse = _empty(problem, tensors, shape)
    max_scores = torch.empty_like(lse) if problem.need_max_scores else None
    saved = (torch.empty_like(lse), torch.empty_like(lse)) if problem.needs_backward else ()
    if out.numel() == 0 or problem.kv_len == 0:
        out.zero_()
        for x in (lse, max_scores, *saved):
            if x is not None:
                x.fill_(-math.inf)
        return Output(out, lse, max_scores, saved)
    call = Call(problem, tensors, device, "forward", [tensors.query, tensors.key, tensors.value])
    call.place("O", out)
    # what is not asked for is not written, so any tensor may stand in its place
    results = [out, lse, lse if max_scores is None else max_scores, *(saved or (lse, lse))]
    splits = call.splits()
    parts = lse
    if splits > 1:
        parts = _empty(problem, tensors, (splits, *shape, problem.value_dim + 2))
    call.numbers["SPLITS"] = splits
    given = [tensors.query, tensors.key, tensors.value, *results, parts, *call.lists("csr"), call.errors]
    call.run(splits * call.row_tasks(), given, split=splits > 1)
    if splits > 1:
        call.run_rows("combine", [parts, *results])
    call.raise_errors()
    return Output(out, lse, max_scores, saved)


def backward(
    problem: Problem, tensors: Tensors, output: Output, grad_out: Tensor, grad_lse: Tensor | None, device: Device
) -> Gradients:
    """A gradient, in its tensor's dtype and stride order, for each input that needs one."""
    tensors, grad_out = _plain(tensors), plain(grad_out)
    grad_lse = None if grad_lse is None else plain(grad_lse).contiguous()
    inputs = (tensors.query, tensors.key, tensors.value)
    pairs = zip(inputs, problem.needs_grad, strict=True)
    found = [ordered_empty(x, x.shape) if need else None for x, need in pairs]
    sums = {i: _zeros(tensors.captured[i], tensors) for i in gathered(problem, "backward_query")}
    if 0 not in (problem.batch, problem.q_len, problem.kv_len):
        _run_backward(problem, tensors, output, grad_out, grad_lse, found, sums, device)
    else:
        for x in found:
            if x is not None:
                x.zero_()
    captured = tuple(
        _as_gradient(sums.get(i), t) if c.needs_grad else None
        for i, (t, c) in enumerate(zip(tensors.captured, problem.captures, strict=True))
    )
    return Gradients(found[0], found[1], found[2], captured)


def _run_backward(problem, tensors, output, grad_out, grad_lse, found, sums, device) -> None:
    query, key, value = tensors.query, tensors.key, tensors.value
    row_max, log_sum = output.saved
    deltas = torch.empty_like(output.lse)
    operands = [query, key, value, grad_out]
    call = Call(problem, tensors, device, "backward_query", operands)
    call.place("O", output.out)
    call.place("G", grad_out)
    given = deltas if grad_lse is None else grad_lse
    call.run_rows("delta", [output.out, grad_out, given, deltas], lse_grad=grad_lse is not None)
    d_query, d_key, d_value = found
    if d_query is not None or sums:
        if d_query is not None:
            call.place("DQ", d_query)
        target = query if d_query is None else d_query
        arguments = [query, key, value, grad_out, target, row_max, log_sum, deltas, *call.lists("csr"), call.errors]
        call.run(call.row_tasks(), arguments, last=list(sums.values()), needs=(d_query is not None, False, False))
        call.raise_errors()
    if d_key is not None or d_value is not None:
        call = Call(problem, tensors, device, "backward_key", operands)
        call.place("G", grad_out)
        for name, x in (("DK", d_key), ("DV", d_value)):
            if x is not None:
                call.place(name, x)
        targets = [key if d_key is None else d_key, value if d_value is None else d_value]
        arguments = [query, key, value, grad_out, *targets, row_max, log_sum, deltas, *call.lists("csc"), call.errors]
        for needs in rounds(problem, call.geometry):
            call.run(call.column_tasks(), arguments, needs=needs)
        call.raise_errors()


def _plain(tensors: Tensors) -> Tensors:
    """What a call brings, without signs that are only noted."""
    if not any(x.is_neg() for x in (tensors.query, tensors.key, tensors.value, *tensors.captured)):
        return tensors
    query, key, value = map(plain, (tensors.query, tensors.key, tensors.value))
    return replace(tensors, query=query, key=key, value=value, captured=tuple(map(plain, tensors.captured)))


def _empty(problem: Problem, tensors: Tensors, shape) -> Tensor:
    return torch.empty(shape, dtype=problem.acc_dtype, device=tensors.query.device)


def _zeros(captured: Tensor, tensors: Tensors) -> Tensor:
    return torch.zeros(max(1, captured.numel()), dtype=torch.float64, device=tensors.query.device)


def _as_gradient(total: Tensor | None, like: Tensor) -> Tensor:
    if total is None:
        return torch.zeros_like(like)
    return total[: like.numel()].view(like.shape).to(like.device, like.dtype)


def ordered_empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uninitialised, in `like`'s dtype, its dimensions in memory in the order of those of `like`."""
    if like.is_contiguous():
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    order = sorted(range(4), key=lambda i: (-like.stride(i), i))
    strides, step = [0] * 4, 1
    for i in reversed(order):
        strides[i] = step
        step *= max(shape[i], 1)
    return torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device)
