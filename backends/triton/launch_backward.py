"""Backward: delta of each row, then d key and d value by keys, then d query by queries, or by atomic additions before."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexref.backends.triton.call import Call, plain, processors, q_side, strides
from flexref.backends.triton.tiles import Tile, padded, tile_for
from flexref.problem import Gradients, Output, Problem, Tensors

# up to here the gradient of a captured tensor is added up in float64
_FEW = 1 << 20


def backward(
    problem: Problem,
    tensors: Tensors,
    output: Output,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    call: Call | None = None,
) -> Gradients:
    """The gradients of query, key, value and captured tensors that are needed."""
    need_q, need_k, need_v = problem.needs_grad
    if output.lse.numel() == 0 or problem.kv_len == 0:
        return _no_gradients(problem, tensors)
    sums = _accumulators(problem, tensors)
    call = call or Call(problem, tensors, grad_out)
    arguments = _arguments(call, output, plain(grad_out), grad_lse)
    five = call.options.get("backward") == "five_products" and (need_k or need_v)
    d_query = d_key = d_value = None
    if need_q and five:
        d_query = torch.zeros(tensors.query.shape, dtype=problem.acc_dtype, device=call.device)
    if need_k or need_v or sums:
        d_key, d_value = _by_keys(call, arguments, sums, d_query)
    if need_q and not five:
        d_query = _by_queries(call, arguments)
    call.raise_bad_reads()
    captured = [
        sums[f"a{i}"][: t.numel()].view(t.shape).to(t.dtype) if c.needs_grad else None
        for i, (c, t) in enumerate(zip(problem.captures, tensors.captured, strict=True))
    ]
    at_home = tuple(_home(x, t) for x, t in zip(captured, tensors.captured, strict=True))
    return Gradients(None if d_query is None else d_query.to(problem.dtype), d_key, d_value, at_home)


def _home(grad: Tensor | None, captured: Tensor) -> Tensor | None:
    """On the device of what it is the gradient of: a number of the CPU may have been read by a GPU."""
    return None if grad is None else grad.to(captured.device)


def _accumulators(problem: Problem, tensors: Tensors) -> dict[str, Tensor]:
    """Zeros for the gradients of captured tensors, flat."""
    found = {}
    for i, (capture, tensor) in enumerate(zip(problem.captures, tensors.captured, strict=True)):
        if capture.needs_grad:
            dtype = torch.float64 if tensor.numel() <= _FEW else problem.acc_dtype
            # never without memory: what nobody reads out of an empty tensor adds its zeros somewhere
            found[f"a{i}"] = torch.zeros(max(1, tensor.numel()), dtype=dtype, device=tensors.query.device)
    return found


def _no_gradients(problem: Problem, tensors: Tensors) -> Gradients:
    inputs = tensors.query, tensors.key, tensors.value
    needs = zip(inputs, problem.needs_grad, strict=True)
    query, key, value = (torch.zeros_like(x) if need else None for x, need in needs)
    pairs = zip(problem.captures, tensors.captured, strict=True)
    return Gradients(query, key, value, tuple(torch.zeros_like(t) if c.needs_grad else None for c, t in pairs))


def _arguments(call: Call, output: Output, grad_out: Tensor, grad_lse: Tensor | None) -> dict[str, Any]:
    """What both kernels take, with delta computed."""
    row_max, log_sum = output.saved
    return call.arguments() | strides(grad_out, "g") | {
        "grad_out": grad_out, "saved_max": row_max, "saved_sum": log_sum, "delta": _delta(call, output, grad_out, grad_lse),
    }  # fmt: skip


def _delta(call: Call, output: Output, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    p = call.problem
    result = torch.empty_like(output.lse)
    grad_lse = None if grad_lse is None else plain(grad_lse).contiguous()
    arguments = {
        "out": output.out.contiguous(), "grad_out": grad_out, "grad_lse": grad_lse,
        "result": result, **strides(grad_out, "g"), "q_heads": p.q_heads, "q_len": p.q_len, "BLOCK_M": 32,
        "count": result.numel(),
        "VALUE_DIM": p.value_dim, "VALUE_COLUMNS": padded(p.value_dim), "HAS_LSE": grad_lse is not None,
    }  # fmt: skip
    grid = (-(-result.numel() // 32),)
    call.run("delta", lambda function, _: function[grid](**arguments, num_warps=4))
    return result


def _by_queries(call: Call, arguments: dict[str, Any]) -> Tensor:
    p = call.problem
    d_query = torch.empty(p.batch, p.q_heads, p.q_len, p.head_dim, dtype=p.dtype, device=call.device)
    arguments = arguments | call.walk(by_column=False, heads=p.q_heads) | {"d_query": d_query}

    def launch(function: Any, tile: Tile) -> None:
        q_tiles = -(-q_side(p) // tile.q)
        count = arguments["list_rows"] * q_tiles * arguments["replicas"]
        call.twice(function, (count,), arguments | call.row_tile(tile) | {"q_tiles": q_tiles})

    call.run("backward_q", launch)
    return d_query


def _by_keys(
    call: Call, arguments: dict[str, Any], sums: dict[str, Tensor], d_query: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """d key and d value; adds to `sums`, and to d_query if it is given."""
    p, mask = call.problem, call.tensors.block_mask
    need = p.needs_grad
    tile = tile_for("backward_kv", p, call.capability)
    kv_block = min(p.block_size[1], p.kv_len) if p.block_size else p.kv_len
    programs = p.batch * p.kv_heads * -(-p.kv_len // min(tile.kv, kv_block))
    # a program for each query head where there are few, or where each has lists of its own
    alone = p.group > 1 and (programs < 2 * processors(call.device) or (mask is not None and mask.H > 1))
    units = p.q_heads if alone else p.kv_heads
    whole = units == p.kv_heads and p.batch == p.kv_batch

    def target(needed: bool, like: Tensor, width: int) -> Tensor | None:
        dtype = like.dtype if whole else p.acc_dtype
        return torch.empty(p.batch, units, p.kv_len, width, dtype=dtype, device=call.device) if needed else None

    d_key, d_value = target(need[1], call.tensors.key, p.head_dim), target(need[2], call.tensors.value, p.value_dim)
    arguments = arguments | call.walk(by_column=True, heads=units) | sums | {
        "d_query": d_query, "d_key": d_key, "d_value": d_value, "members": p.group if units == p.kv_heads else 1,
        "ALONE": units == p.q_heads,
        "ATOMIC_Q": d_query is not None, "NEED_K": need[1], "NEED_V": need[2], "SCATTER": bool(sums),
    }  # fmt: skip

    def launch(function: Any, tile: Tile) -> None:
        kv_tiles = -(-kv_block // tile.kv)
        more = call.row_tile(tile)
        if p.block_size is None:
            more |= {"KV_BLOCK": 1 << 30, "Q_BLOCK": tile.q, "rows": -(-p.q_len // tile.q), "columns": 1}
        count = arguments["list_rows"] * kv_tiles * arguments["replicas"]
        call.twice(function, (count,), arguments | more | {"kv_tiles": kv_tiles})

    call.run("backward_kv", launch)
    return _folded(d_key, call.tensors.key), _folded(d_value, call.tensors.value)


def _folded(grad: Tensor | None, like: Tensor) -> Tensor | None:
    """Summed over the query heads of a key head, and over the batches that share it."""
    if grad is None:
        return None
    if grad.shape[1] != like.shape[1]:
        grad = grad.unflatten(1, (like.shape[1], -1)).sum(2)
    if grad.shape[0] != like.shape[0]:
        grad = grad.sum(0, keepdim=True)
    return grad.to(like.dtype)
