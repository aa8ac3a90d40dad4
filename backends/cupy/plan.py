"""Tiles, stages and memory: what is decided of a kernel before its source is printed. Pure arithmetic, no device."""
from __future__ import annotations

from dataclasses import dataclass

import torch

from flexref.problem import Problem

THREADS = 128
HALVES = (torch.float16, torch.bfloat16)
# what a thread block may use on data-centre GPUs; others have less, and say so
SHARED_LIMIT = 163 * 1024
# up to this many query rows, heads that share a key are worked on together, and the keys are split over thread blocks
SHORT = 16


# Task and Walk of walk.cuh; and with them a batch and a head
_WALK_BYTES, _TASK_BYTES = 56, 64


@dataclass(frozen=True)
class Tiles:
    """One kernel's tile: ROWS of its own positions, COLS of the others at a time, STAGES buffers of those."""

    rows: int
    cols: int
    stages: int


def padded(width: int) -> int:
    """Head sizes are whole rows of shared memory."""
    return -(-width // 32) * 32


def on_tensor_cores(problem: Problem) -> bool:
    return problem.dtype in HALVES


def element_bytes(problem: Problem) -> int:
    """Of what shared memory holds: halves for the tensor cores, else the accumulation type."""
    return problem.dtype.itemsize


def tile_bytes(problem: Problem, rows: int, width: int) -> int:
    """One tile in shared memory; on the ordinary units its rows are 16 bytes longer."""
    size = element_bytes(problem)
    return rows * (width * size + (0 if on_tensor_cores(problem) else 16))


def forward_bytes(problem: Problem, tiles: Tiles) -> int:
    """Shared memory of the forward kernel, as `Shared` in forward.cu lays it out."""
    e, v = padded(problem.head_dim), padded(problem.value_dim)
    stage = tile_bytes(problem, tiles.cols, e) + tile_bytes(problem, tiles.cols, v)
    kept = 16 if on_tensor_cores(problem) else tile_bytes(problem, tiles.rows, tiles.cols)
    return _whole(tile_bytes(problem, tiles.rows, e) + tiles.stages * stage + kept + _WALK_BYTES)


def _whole(size: int) -> int:
    return -(-size // 128) * 128


def forward_tiles(problem: Problem, limit: int = SHARED_LIMIT) -> Tiles:
    """The options' tile where they say one, else the largest that fits; ValueError if none does."""
    wide = max(padded(problem.head_dim), padded(problem.value_dim))
    short = problem.q_len * problem.group <= 64
    if on_tensor_cores(problem):
        choices = [Tiles(128, 32, 4)] if wide <= 128 and not short else []
        choices += [Tiles(64, 64, 2)] if wide <= 128 else []
        choices += [Tiles(64, 32, 2), Tiles(64, 32, 1)]
    elif problem.dtype == torch.float32:
        choices = [Tiles(64, 32, 2)] if wide <= 128 else []
        choices += [Tiles(32, 32, 1), Tiles(16, 16, 1)]
    else:
        choices = [Tiles(32, 32, 2)] if wide <= 64 else []
        choices += [Tiles(32, 32, 1)] if wide <= 128 else []
        choices += [Tiles(16, 16, 1)]
    return _first_that_fits(problem, choices, forward_bytes, limit)


def unroll(problem: Problem, backward: bool) -> int:
    """How many steps of a product of scores are laid out one behind the other: as many as registers have room for."""
    steps = 4 if backward or problem.captures else 8
    return steps // 2 if max(padded(problem.head_dim), padded(problem.value_dim)) > 128 else steps


def _first_that_fits(problem: Problem, choices: list[Tiles], size, limit: int) -> Tiles:
    options = dict(problem.options)
    for tiles in choices:
        asked = Tiles(
            int(options.get("q_tile") or tiles.rows),  # type: ignore[call-overload]
            int(options.get("kv_tile") or tiles.cols),  # type: ignore[call-overload]
            int(options.get("stages") or tiles.stages),  # type: ignore[call-overload]
        )
        if size(problem, asked) <= limit:
            return asked
    raise ValueError(f"no tile fits the {limit} bytes of shared memory of this GPU; choose a smaller q_tile or kv_tile.")


def backward_tiles(problem: Problem, limit: int = SHARED_LIMIT) -> Tiles:
    """The tile of both backward kernels: rows stay, columns go by."""
    wide = max(padded(problem.head_dim), padded(problem.value_dim))
    if on_tensor_cores(problem):
        choices = [Tiles(64, 32, 2), Tiles(64, 32, 1)]
    elif problem.dtype == torch.float32:
        choices = [Tiles(64, 32, 2)] if wide <= 64 else []
        choices += [Tiles(32, 32, 2)] if wide <= 128 else []
        choices += [Tiles(32, 32, 1), Tiles(16, 16, 1)]
    else:
        choices = [Tiles(32, 32, 2)] if wide <= 64 else []
        choices += [Tiles(16, 32, 1)] if wide <= 128 else []
        choices += [Tiles(16, 16, 1)]
    for tiles in choices:
        if key_bytes(problem, tiles) <= limit:
            return tiles
    raise ValueError(f"no backward tile fits the {limit} bytes of shared memory of this GPU.")


def key_bytes(problem: Problem, tiles: Tiles) -> int:
    """Shared memory of backward_key, as its `Shared` lays it out; that of backward_query is less."""
    e, v = padded(problem.head_dim), padded(problem.value_dim)
    stage = tile_bytes(problem, tiles.cols, e) + tile_bytes(problem, tiles.cols, v)
    stage += 3 * tiles.cols * problem.acc_dtype.itemsize
    own = tile_bytes(problem, tiles.rows, e) + tile_bytes(problem, tiles.rows, v)
    return _whole(own + tile_bytes(problem, tiles.rows, tiles.cols) + tiles.stages * stage + _TASK_BYTES)


def query_bytes(problem: Problem, tiles: Tiles) -> int:
    """Shared memory of backward_query."""
    e, v = padded(problem.head_dim), padded(problem.value_dim)
    stage = tile_bytes(problem, tiles.cols, e) + tile_bytes(problem, tiles.cols, v)
    own = tile_bytes(problem, tiles.rows, e) + tile_bytes(problem, tiles.rows, v)
    kept = element_bytes(problem) if on_tensor_cores(problem) else tile_bytes(problem, tiles.rows, tiles.cols)
    return _whole(own + tiles.stages * stage + kept)


def key_passes(problem: Problem, flags: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The launches of backward_key for what is wanted: wide heads have no registers for d key and d value together."""
    wide = padded(problem.head_dim) + padded(problem.value_dim) > 256
    if wide and on_tensor_cores(problem) and "DV" in flags and len(flags) > 1:
        return [("DV",), tuple(flag for flag in flags if flag != "DV")]
    return [flags] if flags else []


def packed(problem: Problem, mask_heads: int) -> bool:
    """Whether the query heads that share a key head are rows of one tile, as in decoding."""
    one_row = problem.block_size is None or problem.q_len <= problem.block_size[0]
    return problem.group > 1 and problem.q_len <= SHORT and one_row and mask_heads == 1


def forward_splits(problem: Problem, tasks: int, kv_tiles: int, processors: int) -> int:
    """Into how many parts the walk over keys is cut: enough to give every processor two thread blocks, if rows are few."""
    asked = dict(problem.options).get("splits")
    if asked:
        return min(int(asked), max(kv_tiles, 1))  # type: ignore[call-overload]
    if problem.q_len > SHORT or tasks >= processors:
        return 1
    return max(1, min(-(-2 * processors // tasks), kv_tiles // 2))


def fits(problem: Problem, limit: int = SHARED_LIMIT) -> bool:
    """Whether tiles with the options of this problem fit into `limit` bytes of shared memory."""
    try:
        forward_tiles(problem, limit)
        if problem.needs_backward:
            backward_tiles(problem, limit)
    except ValueError:
        return False
    return True
