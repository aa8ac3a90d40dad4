"""What a dtype's rounding is, in the symbols of compare.py."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Rounding(NamedTuple):
    """u and w of compare.py's derivation for one query dtype, and what underflow may take away.

    `flush`: a weight or a product in the accumulation type below this may be 0; `tiny`: the same for an operand of a
    product of matrices, which may be in the inputs' type.
    """

    acc: torch.dtype
    u: float
    w: float
    flush: float
    tiny: float

    @classmethod
    def of(cls, dtype: torch.dtype) -> Rounding:
        half = dtype in (torch.float16, torch.bfloat16)
        acc = torch.float32 if half else dtype
        u = half_ulp(acc) + half_ulp(torch.float64)
        flush = 2 * smallest(acc)
        return cls(acc, u, half_ulp(dtype) if half else 0.0, flush, max(flush, smallest(dtype)))

    def total(self, n: int) -> float:
        """g(n): the error of a sum of n terms, relative to the sum of their magnitudes."""
        return self.u * (2 * math.sqrt(n) + 2)


def half_ulp(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def smallest(dtype: torch.dtype) -> float:
    """The smallest step of a dtype; the smallest normal number of float32, whose smaller ones hardware may flush."""
    info = torch.finfo(dtype)
    return info.smallest_normal * (info.eps if dtype in (torch.float16, torch.bfloat16) else 1.0)


def finite(x: Tensor) -> Tensor:
    """In float64, with 0 for NaN and infinities."""
    return torch.nan_to_num(x.detach().to(torch.float64), 0.0, 0.0, 0.0)
