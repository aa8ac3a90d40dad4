"""Forward: allocates the results, chooses between a whole walk and a split one, and launches."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexref.backends.triton.call import UNTILED, Call, fit_key, fitted_tile, plain, processors, q_side
from flexref.backends.triton.tiles import Tile, padded, tile_for
from flexref.problem import Output, Problem, Tensors

# queries shorter than this are decoded: their own tiles do not fill a GPU
SHORT = 128
_WAVES = 8


def forward(problem: Problem, tensors: Tensors, call: Call | None = None) -> Output:
    """out (B, Hq, L, Ev) in query's dtype; lse and max_scores (B, Hq, L) in the accumulation type."""
    call = call or Call(problem, tensors)
    p, device = problem, call.device
    row_shape = p.batch, p.q_heads, p.q_len
    out = torch.empty(*row_shape, p.value_dim, dtype=p.dtype, device=device)
    lse = torch.empty(row_shape, dtype=p.acc_dtype, device=device)
    max_scores = torch.empty_like(lse) if p.need_max_scores else None
    saved = (torch.empty_like(lse), torch.empty_like(lse)) if p.needs_backward else ()
    output = Output(out, lse, max_scores, saved)
    if lse.numel() == 0:
        return output
    if p.kv_len == 0:
        return _nothing_allowed(output)
    if decodes(problem):
        _decode(call, output)
    else:
        _whole(call, output)
    call.raise_bad_reads()
    return output


def decodes(problem: Problem) -> bool:
    """Whether this is a short query against long keys, for which the listed blocks are split."""
    forced = dict(problem.options).get("splits")
    return forced is not None or (problem.q_len < SHORT and problem.kv_len >= 4 * problem.q_len)


def _nothing_allowed(output: Output) -> Output:
    """R6 for every row: there are no keys."""
    output.out.zero_()
    output.lse.fill_(-torch.inf)
    if output.max_scores is not None:
        output.max_scores.fill_(-torch.inf)
    for x, value in zip(output.saved, (0.0, torch.inf), strict=False):
        x.fill_(value)
    return output


def _whole(call: Call, output: Output) -> None:
    """One program for each tile of query rows."""
    arguments = _arguments(call, output, packed=False) | {"splits": 1, "part": None, "PACK": False, "SPLIT": False}

    def launch(function: Any, tile: Tile) -> None:
        q_tiles = -(-q_side(call.problem) // tile.q)
        count = arguments["list_rows"] * q_tiles * arguments["replicas"]
        call.twice(function, (count, 1), arguments | _descriptors(call, tile) | call.row_tile(tile) | {"q_tiles": q_tiles})

    call.run("forward", launch)


def _decode(call: Call, output: Output) -> None:
    """A share of the listed blocks for each program, the heads of a group in one tile; then combine joins the shares."""
    p, mask = call.problem, call.tensors.block_mask
    packed = p.group > 1 and (mask is None or mask.H == 1)
    tile = tile_for("decode", p, call.capability)
    members = q_side(p) * (p.group if packed else 1)
    programs = p.batch * (p.kv_heads if packed else p.q_heads) * -(-p.q_len // q_side(p)) * -(-members // tile.q)
    asked: Any = call.options.get("splits")
    splits = asked or split_count(programs, -(-p.kv_len // tile.kv), processors(call.device))
    if splits == 1 and not packed:
        return _whole(call, output)
    rows = output.lse.numel()
    shares = torch.empty(rows, splits, p.value_dim, dtype=p.acc_dtype, device=call.device) if splits > 1 else output.out
    part = torch.empty(rows, splits, 2, dtype=p.acc_dtype, device=call.device) if splits > 1 else None
    arguments = _arguments(call, output, packed)
    arguments |= {"splits": splits, "part": part, "PACK": packed, "SPLIT": splits > 1, "out": shares}

    def launch(function: Any, tile: Tile) -> None:
        q_tiles = -(-members // tile.q)
        count = arguments["list_rows"] * q_tiles * arguments["replicas"]
        call.twice(function, (count, splits), arguments | _descriptors(call, tile) | call.row_tile(tile) | {"q_tiles": q_tiles})

    call.run("decode", launch)
    if splits > 1:
        _combine(call, output, shares, part, splits)
    return None


def split_count(programs: int, tiles: int, processors: int) -> int:
    """The fewest splits that keep the GPU at least 85 % as busy as the best number would; none for a few tiles.

    The rule of FlashAttention-3, with two programs on each processor.
    """
    if tiles <= 4 or programs >= 0.8 * 2 * processors:
        return 1
    room = min(tiles // 2, 128, _WAVES * processors // programs + 1)

    def busy(splits: int) -> float:
        waves = programs * splits / (2 * processors)
        return waves / -(-programs * splits // (2 * processors))

    best = max(busy(n) for n in range(1, room + 1))
    return next(n for n in range(1, room + 1) if busy(n) >= 0.85 * best)


def _combine(call: Call, output: Output, shares: Tensor, part: Tensor | None, splits: int) -> None:
    rows, p = output.lse.numel(), call.problem
    arguments = _results(output) | {
        "shares": shares, "part": part, "scale": call.tensors.scale, "count": rows, "splits": splits,
        "BLOCK_M": 8, "VALUE_DIM": p.value_dim, "VALUE_COLUMNS": padded(p.value_dim), "FOLD": call.folds(), "FUSED": call.fuses(),
        "SAVE": bool(output.saved), "MAX_SCORES": output.max_scores is not None,
    }  # fmt: skip
    call.run("combine", lambda function, _: function[(-(-rows // 8),)](**arguments, num_warps=4))


def _results(output: Output) -> dict[str, Any]:
    saved = dict(zip(("saved_max", "saved_sum"), output.saved or (None, None), strict=True))
    return {"out": output.out, "lse": output.lse, "max_scores": output.max_scores, **saved}


def _arguments(call: Call, output: Output, packed: bool) -> dict[str, Any]:
    heads = call.problem.kv_heads if packed else call.problem.q_heads
    saves = {"SAVE": bool(output.saved), "MAX_SCORES": output.max_scores is not None}
    return call.arguments() | _results(output) | call.walk(by_column=False, heads=heads) | saves


def _descriptors(call: Call, tile: Tile) -> dict[str, Any]:
    """Of key and value for the tensor memory accelerator, where the GPU has one and their layout allows it."""
    wanted = call.options.get("tma", call.capability is not None and call.capability >= (9, 0))
    key, value = plain(call.tensors.key), plain(call.tensors.value)
    if not wanted or not all(_describable(x) for x in (key, value)):
        return UNTILED
    from triton.tools.tensor_descriptor import TensorDescriptor

    def described(x: Tensor) -> Any:
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, tile.kv, call.columns(x.shape[3])])

    return {"k_tiles": described(key), "v_tiles": described(value), "TMA": True}


def _describable(x: Tensor) -> bool:
    """Dense rows, at steps of 16 bytes from a multiple of 16, that no padding makes longer than a descriptor allows."""
    steps = all(stride > 0 and stride * x.itemsize % 16 == 0 for stride in x.stride()[:3])
    return x.stride(3) == 1 and steps and x.data_ptr() % 16 == 0 and padded(x.shape[3]) <= 256


def notes(problem: Problem) -> list[str]:
    """The tile of each kernel, and whether it is smaller than the table's because that did not fit."""
    device = _device(problem)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    lines = []
    for kernel in ("forward", *(("backward_kv", "backward_q") if problem.needs_backward else ())):
        tile = tile_for(kernel, problem, capability)
        fitted = fitted_tile(fit_key(kernel, problem, device, tile))
        text = f"{kernel}: tiles of {tile.q} queries by {tile.kv} keys, {tile.warps} warps, {tile.stages} stages"
        if fitted is not None:
            text += f"; did not fit into shared memory, so {fitted.q} by {fitted.kv}, {fitted.stages} stages"
        lines.append(text)
    return lines


def _device(problem: Problem) -> torch.device:
    if problem.device == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(problem.device)
