"""An interval: what is known of a value, elementwise over whatever is asked about at once."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NEVER = torch.tensor(False, device="cpu")
# smaller float32 numbers may be taken for 0
_NORMAL = 2.0**-126
# more than what float64 rounds when an end is calculated, less than what float32 sees
_END = 2.0**-50


class Interval(NamedTuple):
    """Float64 ends, and bool whether it may be NaN beside a number between them; a bool is 0 or 1."""

    low: Tensor
    high: Tensor
    nan: Tensor = NEVER


def interval(low: float | Tensor, high: float | Tensor | None = None) -> Interval:
    """From numbers or tensors; one number is a point. A NaN may be anything, and NaN."""
    low = torch.as_tensor(low, dtype=torch.float64, device="cpu")
    return known(Interval(low, low if high is None else torch.as_tensor(high, dtype=torch.float64, device="cpu")))


def known(x: Interval) -> Interval:
    """An end that is NaN, as of inf - inf, is not known, and then the value may be NaN."""
    missing = x.low.isnan() | x.high.isnan()
    if not missing.any():
        return x
    low, high = torch.where(x.low.isnan(), -torch.inf, x.low), torch.where(x.high.isnan(), torch.inf, x.high)
    return Interval(low, high, x.nan | missing)


def rounded(x: Interval) -> Interval:
    """Of the exact result of a float operation: what it may be once rounded, in float32 or in float64.

    Rounding keeps the order, so an end is moved only if float32 does not have it; and none is moved past 0.
    """
    down, up = (torch.where(end * side > 0, end * (1 + _END), end * (1 - _END)) for end, side in ((x.low, -1), (x.high, 1)))
    low, high = torch.minimum(x.low, down.float().double()), torch.maximum(x.high, up.float().double())
    low = torch.where((low > 0) & (low < _NORMAL), 0.0, low)
    high = torch.where((high < 0) & (high > -_NORMAL), 0.0, high)
    return Interval(low, high, x.nan)
