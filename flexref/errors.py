"""Every error that a user can meet, so that its text is in one place and can be tested.

A message says what is wrong, where (the argument, or the mod's file and line) and what to do.
"""

from __future__ import annotations


class FlexrefError(Exception):
    """Base of the errors that are flexref's own; wrong arguments raise ValueError, TypeError or IndexError."""


class TraceError(FlexrefError, ValueError):
    """A score_mod or mask_mod that cannot become a pointwise program.

    It is no TypeError: Python and PyTorch swallow those inside binary operators and try the other operand.
    """


class Unsupported(FlexrefError, NotImplementedError):
    """No backend that was asked for can run this problem; `reasons` maps a backend's name to its reasons."""

    def __init__(self, message: str, reasons: dict[str, list[str]] | None = None):
        super().__init__(message)
        self.reasons = reasons or {}

def index_error(name: str, shape: tuple[int, ...], dim: int, value: int, where: str) -> IndexError:
    """A captured tensor read out of range (R13): its name and shape, the dimension, the index, and the line of the mod."""
    remedy = "index it with 0, since it is not broadcast" if shape[dim] == 1 else "clamp the index, or mask the position"
    return IndexError(
        f"the captured tensor {name} of shape {shape} is indexed with {value} in dimension {dim}, which has indices "
        f"{-shape[dim]} to {shape[dim] - 1}, at {where}; {remedy}."
    )
