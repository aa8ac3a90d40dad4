"""Gradients that have no derivative themselves, and say so when somebody asks for one (R19)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def no_further(gradients: Sequence[Tensor | None], made_of: Iterable[Tensor | None]) -> list[Tensor | None]:
    """The gradients as results of what they were made of, by something whose own derivative raises."""
    found = [x for x in gradients if x is not None]
    sources = [x for x in made_of if x is not None and x.requires_grad]
    if not found:
        return list(gradients)
    results = iter(_NotTwice.apply(len(found), *found, *sources))
    return [None if x is None else next(results) for x in gradients]


class _NotTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, count: int, *tensors):  # type: ignore[override]
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx, *_):  # type: ignore[override]
        raise NotImplementedError(
            "flexref.flex_attention is differentiated twice, and it has first derivatives only; leave out create_graph=True, "
            "or write the part that needs second derivatives with plain PyTorch operations."
        )
