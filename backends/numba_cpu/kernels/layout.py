"""Where everything stands in the two int64 tables that drivers and tile functions share.

`P`: one table a call, written by launch.py and read by everybody. Addresses are in bytes, strides in elements;
four strides (b, h, row, column) follow each of query, key, value, out and their gradients. An `at_` is the place of
a piece of a worker's scratch memory, in bytes from its start. An address of 0 is a thing that is not there.
"driver" to "check_signals" are for team.py, which runs the call; from "parallel" on they are addresses of C functions.
`T`: one table a worker, which tells a tile function where it is: rows `lo` to `hi` of the `scores` tile, (kv, q)
with `ld` numbers a row, are kv positions `kv0 + row`; its first `n` columns are q positions `q0 + column`.
"""
from __future__ import annotations

from types import ModuleType

TENSORS = ("q", "k", "v", "o", "g", "dq", "dk", "dv")
SCRATCH = (
    "tile", "q", "q_t", "o", "o_t", "g", "g_t", "scores", "grads", "live", "row_max", "row_sum", "shrink",
    "fresh", "k", "v", "rows",
)  # fmt: skip
_PARAMS = (
    "counter", "errors", "tasks", "workers", "static", "scale",
    "batch", "kv_batch", "q_heads", "group", "q_len", "kv_len", "width", "value_width", "q_tile", "kv_tile",
    "tiles", "splits", "q_block", "kv_block", "rows", "row_step_b", "row_step_h",
    "offsets", "indices", "full_offsets", "full_starts", "full_counts", "lse", "lse_grad", "max_scores",
    "row_max", "log_sum", "scratch", "scratch_size",
    "partial", "accumulators", "accumulators_size", "mask_tile", "score_tile", "grad_tile", "gemm", "transpose", "captured",
    "floats", "ints",
    "driver", "next_worker", "finished", "poller", "poll", "stop", "thread_state", "clock_kind",
    "parallel", "thread_number", "thread_count", "pause", "clock",
    "save_thread", "restore_thread", "check_signals",
)  # fmt: skip
_PARAMS += tuple("at_" + name for name in SCRATCH)
_PARAMS += tuple(name + stride for name in TENSORS for stride in ("", "_b", "_h", "_row", "_col"))
_TILE = (
    "b", "h", "q0", "n", "kv0", "lo", "hi", "allowed", "ld", "scores", "grads", "live", "masked", "rows",
    "accumulators", "error", "ticks", "last", "seconds", "nanoseconds",
)  # fmt: skip


def _constants(name: str, fields: tuple[str, ...]) -> ModuleType:
    """A module of numbers: Numba compiles `module.name` to a plain constant, and a tuple to hundreds of steps."""
    module = ModuleType(name)
    vars(module).update(zip(fields, range(len(fields)), strict=True))
    return module


P, P_SIZE = _constants("P", _PARAMS), len(_PARAMS)
T, T_SIZE = _constants("T", _TILE), len(_TILE)
