"""Many programs in one compiled function of the numba_cpu engine: as the engine spells them, without attention around them."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from flexref.backends.numba_cpu.cache import addresses_of
from flexref.backends.numba_cpu.emitter import NumbaEmitter
from flexref.problem import Capture
from flexref.program.ir import Graph

_HEAD = """
import math
from numba import float32, float64, int8, int16, int32, int64, uint8
from flexref.backends.numba_cpu.kernels import maths
from flexref.backends.numba_cpu.kernels.machine import pointer, read_bfloat16, read_float16, select
real, INDEX = {real}, int32
INF, NAN = real(math.inf), real(math.nan)

def table(x_at, out_at):
    x = pointer(x_at, real)
    out = pointer(out_at, real)
    n = {n}
    wrong = int32(0)
    concerned = True
"""
_LOOP = """    for i in range(n):
        score = x[i]
        other = x[n + i]
        grad = real(1)
        b = h = q_at = kv_at = q_idx = kv_idx = int64(i)
"""


class _WithOther(NumbaEmitter):
    """A captured tensor is the second number of each pair."""

    def read(self, name, position, node, graph, names):
        return [f"{name} = other"]


def run(graphs: list[Graph], xs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Every output of every program, in order, at the points xs[0] (score) and xs[-1] (whatever is loaded)."""
    n = len(xs[0])
    source, count = _HEAD.format(real=str(dtype).removeprefix("torch."), n=n), 0
    inputs = {name: name for name in ("score", "b", "h", "q_idx", "kv_idx", "grad")}
    for graph in graphs:
        lines, outputs = _WithOther((Capture("x", dtype, (n,)),)).emit(graph, "v", inputs)
        source += _LOOP + "".join(f"        {line}\n" for line in lines)
        for result in outputs.values():
            source += f"        out[{count * n} + i] = real({result})\n"
            count += 1
    x = torch.cat([xs[0], xs[-1]]).to(dtype).contiguous()
    out = torch.full((count, n), torch.nan, dtype=dtype)
    function = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(
        addresses_of({"table": source})["table"]
    )
    unused = (ctypes.c_int64 * 2)()
    function(ctypes.addressof(unused), ctypes.addressof(unused), x.data_ptr(), out.data_ptr())
    return list(out)
