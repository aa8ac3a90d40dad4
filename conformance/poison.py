"""Memory that nobody wrote is NaN: torch.empty, numpy.empty and their kin, filled while a backend runs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy
import torch

_PLACES = [
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
    (numpy, "empty"),
    (numpy, "empty_like"),
]


def _filled(allocate):
    @functools.wraps(allocate)
    def wrapper(*args, **kwargs):
        result = allocate(*args, **kwargs)
        if isinstance(result, numpy.ndarray):
            if result.dtype.kind == "f":
                result.fill(numpy.nan)
        elif type(result) is torch.Tensor and result.is_floating_point() and not result.requires_grad:
            # not a fake tensor: a fill would be recorded as part of a mod that is being traced
            result.fill_(torch.nan)
        return result

    return wrapper


@contextmanager
def poisoned() -> Iterator[None]:
    """Within it, every newly allocated float array that has no value holds NaN."""
    patches = [mock.patch.object(owner, name, _filled(getattr(owner, name))) for owner, name in _PLACES]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
