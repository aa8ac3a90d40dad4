"""A call that a recipe repeats gives shapes that do not depend on what its tensors hold, whatever it is called with."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flexref.program.repeatable import STATIC, why_not_repeated

OTHERS = ("repeat_interleave", "tensor_split", "where", "unique", "masked_select", "bincount", "combinations", "argwhere")
OTHERS += ("one_hot", "unique_consecutive", "nonzero_static", "full", "arange", "linspace", "split", "histc", "vander")


def functions(name: str) -> list[Callable]:
    homes = (Tensor, torch, F, torch.linalg)
    spellings = name, f"__{name}__", name.removeprefix("linalg_")
    found = [getattr(home, spelled, None) for home in homes for spelled in spellings]
    return list({id(func): func for func in found if callable(func)}.values())


def arguments(number: int) -> dict[str, object]:
    """Arguments to draw from; the tensors among them hold other numbers for another `number`."""
    some = torch.tensor([number, 1, number, 2])
    return {
        "matrix": (some[:, None] * torch.tensor([1, 2, 0, 1])).float(),
        "numbers": some,
        "mask": some > 1,
        "one": torch.tensor([number]),
        "int": 2,
        "dim": 0,
        "ones in a list": [torch.tensor([number]), 1],
        "tensor in a slice": slice(0, torch.tensor([number])),
        "slice": slice(1, 3),
        "tuple": (slice(None), some > 1),
        "float": 0.5,
    }


def shapes(func: Callable, names: tuple[str, ...], number: int) -> tuple | None:
    """The shapes that it gives; None if it cannot be called so, or if a recipe must not repeat it."""
    values = arguments(number)
    args = tuple(values[name] for name in names)
    try:
        result = func(*args)
    except Exception:
        return None
    results = result if isinstance(result, (tuple, list)) else (result,)
    if not any(isinstance(x, Tensor) for x in results) or why_not_repeated(func, args, {}, results):
        return None
    return tuple(x.shape for x in results if isinstance(x, Tensor))


FIRST, LATER = ("matrix", "numbers"), ("numbers", "one", "int", "ones in a list")
CALLS = [(x,) for x in FIRST] + list(itertools.product(FIRST, arguments(1))) + list(itertools.product(FIRST, LATER, LATER))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", sorted({name[0] for name in STATIC}))
def test_shapes_are_those_of_every_number(start):
    called = 0
    for name in sorted(n for n in (*STATIC, *OTHERS, "getitem") if n[0] == start):
        for func, names in itertools.product(functions(name), CALLS):
            first = shapes(func, names, 1)
            if first is not None:
                called += 1
                assert shapes(func, names, 2) in (None, first), f"{name} of {names} gives another shape for another number"
    assert called


def test_every_name_is_one_of_pytorch():
    assert not [name for name in STATIC if not functions(name)]
