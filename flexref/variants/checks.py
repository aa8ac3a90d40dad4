"""What the variants' arguments are checked for; an error names the argument and what it was."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# the greatest position there can be
LAST = (1 << 63) - 1


def count(name: str, n: int, least: int = 0) -> int:
    """An int of at least `least`, and no more than an index can be."""
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"{name} must be an int, got {type(n).__name__}")
    if n < least:
        raise ValueError(f"{name} must be at least {least}, got {n}")
    if n > LAST:
        raise ValueError(f"{name} must be at most 2**63 - 1, got {n}")
    return n


def number(name: str, x: float) -> float:
    """A positive finite number."""
    if isinstance(x, bool) or not isinstance(x, (int, float)) or not 0 < x < float("inf"):
        raise ValueError(f"{name} must be a positive number, got {x!r}")
    return float(x)


def integers(name: str, x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """An integer tensor of one of these numbers of dimensions."""
    return _tensor(name, x, dims, "an integer", lambda dtype: dtype in _INTEGERS)


def bools(name: str, x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """A bool tensor of one of these numbers of dimensions."""
    return _tensor(name, x, dims, "a bool", lambda dtype: dtype == torch.bool)


def floats(name: str, x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """A float tensor of one of these numbers of dimensions."""
    return _tensor(name, x, dims, "a float", lambda dtype: dtype.is_floating_point)


def _tensor(name: str, x: Tensor, dims: tuple[int, ...], what: str, fits: Callable[[torch.dtype], bool]) -> Tensor:
    if not isinstance(x, Tensor) or not fits(x.dtype) or x.dim() not in dims:
        raise TypeError(f"{name} must be {what} tensor of {_either(dims)} dimensions, got {kind(x)}")
    return x


def sizes(name: str, n: Sequence[int], least: int = 1) -> tuple[int, ...]:
    """One int for each axis."""
    if not isinstance(n, (tuple, list)) or not n:
        raise TypeError(f"{name} must be a tuple of ints, one for each axis, got {n!r}")
    return tuple(count(f"{name}[{i}]", x, least) for i, x in enumerate(n))


def each_axis(name: str, n: int | Sequence[int], axes: int, least: int = 1) -> tuple[int, ...]:
    """One int for each of `axes` axes, or one for all."""
    found = sizes(name, [n] * axes if isinstance(n, int) else n, least)
    if len(found) != axes:
        raise ValueError(f"{name} must have one int for each of {axes} axes, got {n!r}")
    return found


def lengths_of(name: str, lengths: Sequence[int] | Tensor) -> Tensor:
    """Lengths of at least 0, as int64 (N,) where they were; of a list, on the CPU."""
    found = lengths if isinstance(lengths, Tensor) else torch.tensor(list(lengths), dtype=torch.int64, device="cpu")
    found = integers(name, found, (1,)).long()
    if bool((found < 0).any()):
        raise ValueError(f"{name} must be at least 0, got {found.tolist()}")
    return found


def parents_of(name: str, parents: Sequence[int] | Tensor) -> list[int]:
    """The parent of each node of a tree, where a parent comes before its node and -1 marks a root."""
    found = integers(name, parents, (1,)).tolist() if isinstance(parents, Tensor) else list(parents)
    for node, parent in enumerate(found):
        if isinstance(parent, bool) or not isinstance(parent, int):
            raise TypeError(f"{name}[{node}] must be an int, got {type(parent).__name__}")
        if not -1 <= parent < node:
            raise ValueError(f"{name}[{node}] is {parent}; a parent comes before its node, and -1 marks a root")
    return found


def placed(x: Tensor, device: torch.device | str | None) -> Tensor:
    """A tensor that was made on the CPU, where the caller wants it: without a word, on the default device."""
    return x.to(torch.get_default_device() if device is None else device)


def _either(dims: tuple[int, ...]) -> str:
    return " or ".join(map(str, dims))


def kind(x: object) -> str:
    """What an argument is, for a message."""
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
