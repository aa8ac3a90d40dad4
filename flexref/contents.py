"""Whether tensors still hold what they held.

A version counter sees what PyTorch writes, but not what comes in through `.data`, NumPy or DLPack. So memory of the CPU is
also compared by value, which costs little beside attention over it; on other devices the counter has to be believed.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Contents:
    """What some tensors held when this was made."""

    def __init__(self, tensors: Sequence[Tensor]):
        self._marks = [_mark(x) for x in tensors]
        self._values = [x.detach().clone() if x.device.type == "cpu" else None for x in tensors]

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors, as many as then, hold the same."""
        for x, mark, value in zip(tensors, self._marks, self._values, strict=True):
            if value is None and (mark is None or _mark(x) != mark):
                return False
            if value is not None and not (x.shape == value.shape and x.dtype == value.dtype and torch.equal(x, value)):
                return False
        return True


def _mark(x: Tensor) -> tuple | None:
    return None if x.is_inference() else (id(x), x._version, x.data_ptr())
