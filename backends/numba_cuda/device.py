"""Where kernels run: on a GPU, or in Numba's simulator on tensors of the CPU."""
from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from flexref.backends.numba_cuda.compiler import function_of
from flexref.backends.numba_cuda.geometry import LEAST_SHARED, Chip, Geometry

# half types and bools as NumPy and Numba know them
_BITS = {torch.float16: torch.uint16, torch.bfloat16: torch.uint16, torch.bool: torch.uint8}


class Device(Protocol):
    """`simulated`: few threads a block and small tiles. An argument is a tensor or a tuple of Python numbers."""

    simulated: bool

    def chip(self, like: Tensor) -> Chip: ...

    def zeros(self, dtype: torch.dtype, like: Tensor, fresh: bool = False) -> Tensor: ...

    def run(self, source: str, name: str, grid: int, geometry: Geometry, shared: int, arguments: list) -> None: ...


def bits_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a kernel is given for a tensor's elements."""
    return _BITS.get(dtype, dtype)


def plain(x: Tensor) -> Tensor:
    """`x` as its memory says: PyTorch keeps the sign of some views, such as x.conj().imag, as a mere note."""
    return x.resolve_neg() if x.is_neg() else x


def flat(x: Tensor) -> Tensor:
    """The memory of `x` from its first element to its last, as one dimension; a zero if it has none."""
    if x.numel() == 0:
        return torch.zeros(1, dtype=bits_of(x.dtype), device=x.device)
    size = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return x.detach().as_strided((size,), (1,)).view(bits_of(x.dtype))


class Simulator:
    """Numba's simulator on the CPU, as if it were a chip of two processors."""

    simulated = True

    def chip(self, like: Tensor) -> Chip:
        """Two processors: enough to share out the keys of a row."""
        return Chip(2, LEAST_SHARED, tensor_cores=False)

    def zeros(self, dtype: torch.dtype, like: Tensor, fresh: bool = False) -> Tensor:
        return torch.zeros(1, dtype=dtype, device="cpu")

    def run(self, source: str, name: str, grid: int, geometry: Geometry, shared: int, arguments: list) -> None:
        from flexref.backends.numba_cuda import simulator

        simulator.cuda()
        given = [simulator.Flat(flat(x).numpy()) if isinstance(x, Tensor) else x for x in arguments]
        simulator.run(function_of(source, name), grid, geometry.threads, geometry.lanes, shared, given)


@cache
def gpu() -> Device:
    """The GPUs that torch sees."""
    from flexref.backends.numba_cuda.gpu import Gpu

    return Gpu()


@cache
def simulator() -> Simulator:
    return Simulator()
