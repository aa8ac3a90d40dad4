"""The least and the greatest element that a load can read, for many tiles at once: sparse tables over chunks of a dimension."""
from __future__ import annotations

import torch
from torch import Tensor

from flexref.program.interval import Interval, interval

# a longer dimension is reduced to the extremes of chunks first, which keeps a table below a few megabytes
_FINE, _CHUNK = 1 << 14, 16
# of a larger tensor nothing is known but single elements
_LARGEST = 1 << 27


class Reader:
    """Answers for one captured tensor; its tables are made once, where it is, and held on the CPU."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.detach()
        self.tables: dict[int, _Table] = {}

    def read(self, indices: list[Interval], unknown: Interval) -> Interval:
        """Of each tile what its indices can reach; `unknown` where two of them vary, or one may be out of range."""
        tensor = self.tensor
        if tensor.dtype.is_complex or tensor.dtype == torch.uint64:
            return unknown
        ends = torch.broadcast_tensors(*(end for index in indices for end in index[:2]), unknown.low)
        shape = ends[0].shape
        lows, highs = [x.reshape(-1) for x in ends[:-1:2]], [x.reshape(-1) for x in ends[1:-1:2]]
        low, high = (end.expand(shape).reshape(-1).clone() for end in unknown[:2])
        nan = unknown.nan.expand(shape).reshape(-1).clone()
        varying = torch.zeros(low.shape, dtype=torch.int64, device="cpu")
        within = torch.ones(low.shape, dtype=torch.bool, device="cpu")
        for first, last, size in zip(lows, highs, tensor.shape, strict=True):
            varying += first != last
            within &= (first >= 0) & (last < size)
        points = within & (varying == 0)
        if points.any():
            at = tuple(x[points].long().to(tensor.device) for x in lows)
            low[points], high[points], nan[points] = interval(tensor[at].to("cpu", torch.float64).reshape(-1))
        if tensor.numel() <= _LARGEST:
            for dim in range(tensor.dim()):
                chosen = within & (varying == 1) & (lows[dim] != highs[dim])
                if chosen.any():
                    read = self._range(dim, [x[chosen].long() for x in lows], highs[dim][chosen].long())
                    low[chosen], high[chosen], nan[chosen] = read
        return Interval(low.reshape(shape), high.reshape(shape), nan.reshape(shape))

    def _range(self, dim: int, first: list[Tensor], last: Tensor) -> Interval:
        """From first[dim] to last along `dim`, at first in all others."""
        if dim not in self.tables:
            self.tables[dim] = _Table(self.tensor.movedim(dim, -1))
        others = tuple(x for i, x in enumerate(first) if i != dim)
        return self.tables[dim].range(others, first[dim], last)


class _Table:
    """Minimum and maximum of any range of the last dimension in constant time: rows of powers of two of chunks.

    A range that begins or ends within a chunk is answered for the whole chunk, which is safe.
    """

    def __init__(self, tensor: Tensor):
        length = tensor.shape[-1]
        self.chunk = 1 if tensor.numel() <= _FINE else min(_CHUNK, length)
        whole = length // self.chunk * self.chunk
        body = tensor[..., :whole].unflatten(-1, (-1, self.chunk))
        # PyTorch has no extremes of bool, and unsigned integers are few
        wide = (lambda x: x.double()) if tensor.is_floating_point() else (lambda x: x.long())
        lows, highs = wide(body).amin(-1), wide(body).amax(-1)
        if whole < length:
            tail = wide(tensor[..., whole:])
            lows = torch.cat([lows, tail.amin(-1, keepdim=True)], -1)
            highs = torch.cat([highs, tail.amax(-1, keepdim=True)], -1)
        self.lows, self.highs = [lows.cpu()], [highs.cpu()]
        width = 1
        while 2 * width <= lows.shape[-1]:
            self.lows.append(torch.minimum(self.lows[-1][..., :-width], self.lows[-1][..., width:]))
            self.highs.append(torch.maximum(self.highs[-1][..., :-width], self.highs[-1][..., width:]))
            width *= 2

    def range(self, others: tuple[Tensor, ...], first: Tensor, last: Tensor) -> Interval:
        first, last = first // self.chunk, last // self.chunk
        level = (last - first + 1).double().log2().floor().long()
        low, high = (torch.empty(len(first), dtype=torch.float64, device="cpu") for _ in range(2))
        for i in level.unique().tolist():
            at = level == i
            rows = tuple(x[at] for x in others)
            left, right = (*rows, first[at]), (*rows, last[at] - (1 << i) + 1)
            low[at] = torch.minimum(self.lows[i][left], self.lows[i][right]).double()
            high[at] = torch.maximum(self.highs[i][left], self.highs[i][right]).double()
        # the least of numbers with a NaN among them is NaN
        return interval(low, high)
