"""A captured tensor with some of its dimensions indexed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partialmethod
from typing import Any

import torch
from torch import Tensor

from flexref.program import mistakes
from flexref.program.tape import flatten


class Partial:
    """A captured tensor with some of its dimensions indexed: `table[h]`, waiting for `[q_idx]`."""

    def __init__(self, recorder: Any, tensor: Tensor, items: tuple):
        self.recorder, self.tensor, self.items = recorder, tensor, items

    def __getitem__(self, item):
        return self.recorder.index(self.tensor, self.items, item)

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape[len(self.items) :]

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def _viewed(self, func: Callable, *args) -> Any:
        """After a view of the dimensions that are left."""
        tensor = self.recorder.kitchen.run(func, self.tensor, *args)
        left = tensor.dim() > len(self.items)
        return Partial(self.recorder, tensor, self.items) if left else self.recorder.load(tensor, self.items)

    T = mT = property(lambda self: self._viewed(torch.transpose, -1, -2) if len(self.shape) == 2 else self._number())

    def reshape(self, *shape):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return self._viewed(torch.reshape, (*self.tensor.shape[: len(self.items)], *shape))

    def flatten(self):
        return self.reshape(-1)

    def to(self, dtype: torch.dtype):
        return self._viewed(Tensor.to, dtype) if isinstance(dtype, torch.dtype) else self._number()

    view = reshape
    float, double, long = partialmethod(to, torch.float32), partialmethod(to, torch.float64), partialmethod(to, torch.int64)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise next(x for x in flatten(args) if isinstance(x, Partial)).refused()

    def __getattr__(self, name: str):
        raise self.refused()

    def refused(self) -> Exception:
        """What is wrong with it where a number is wanted."""
        return self.recorder.refuse(mistakes.partial(self))

    def _number(self, *_):
        raise self.refused()

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __pow__ = __rpow__ = (
        _number
    )
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __neg__ = __abs__ = __invert__ = __bool__ = __int__ = (
        __float__
    ) = _number
    __lt__ = __le__ = __gt__ = __ge__ = __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = _number
