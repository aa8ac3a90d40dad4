"""An interval: what is known of a value, elementwise over whatever is asked about at once."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Interval(NamedTuple):
    """Float64 tensors; a bool is 0 or 1."""

    low: Tensor
    high: Tensor


def interval(low: float | Tensor, high: float | Tensor | None = None) -> Interval:
    """From numbers or tensors; one number is a point."""
    low = torch.as_tensor(low, dtype=torch.float64, device="cpu")
    return Interval(low, low if high is None else torch.as_tensor(high, dtype=torch.float64, device="cpu"))
