"""What query, key and value may hold, and how they may lie in memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "integers": lambda x: (1.5 * x).round().clamp(-2, 2),
    "large": lambda x: 6 * x,
    "equal": lambda x: torch.ones_like(x),
    "positive": lambda x: x.abs(),
    "holes": lambda x: x,
}


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _columns(x: Tensor) -> Tensor:
    """The last dimension is not the dense one."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def _offset(x: Tensor) -> Tensor:
    """A window of a larger buffer whose other elements are NaN: reading outside shows."""
    around = x.new_full([n + 3 for n in x.shape], math.nan)
    around[tuple(slice(1, 1 + n) for n in x.shape)] = x
    return around[tuple(slice(1, 1 + n) for n in x.shape)]


def _step(x: Tensor) -> Tensor:
    """Every second element of a larger buffer whose other elements are NaN."""
    around = x.new_full([2 * n for n in x.shape], math.nan)
    around[tuple(slice(None, None, 2) for _ in x.shape)] = x
    return around[tuple(slice(None, None, 2) for _ in x.shape)]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "transposed": _transposed,
    "columns": _columns,
    "offset": _offset,
    "step": _step,
    "expanded": lambda x: x[:, :1].expand(x.shape),
    "row": lambda x: x[:, :, :1].expand(x.shape),
}
