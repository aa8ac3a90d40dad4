"""Tensors that a mod makes of captured tensors alone: PyTorch makes them, and a recipe makes them again at each call.

`table.T`, `table[:, 0]`, `table.view(...)`, `table.float()` are no work of one position. The tensor that PyTorch gives is read
as any captured tensor is, and its gradient goes on to what it was made of by PyTorch's own autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexref.one_float import OneFloat, asks_what_it_is, whole_products
from flexref.program.repeatable import why_not_asked, why_not_repeated
from flexref.tensor_gate import check_memory

# what moves numbers and computes none: it needs no other width, and most of it no memory
_MOVES = frozenset(
    """__getitem__ view reshape transpose permute movedim moveaxis swapaxes swapdims squeeze unsqueeze flatten unflatten ravel
    expand expand_as view_as reshape_as select narrow unbind chunk split tensor_split t diagonal unfold as_strided
    detach alias contiguous clone index_select gather take repeat repeat_interleave tile flip roll broadcast_to""".split()
)


class Root(NamedTuple):
    """A tensor that the mod reaches, by its place among the roots."""

    place: int


class Made(NamedTuple):
    """The result of a function, or item `item` of it; Roots and Made stand for tensors among the arguments.

    `acc`: the one float that it was computed in (R1); None for what only moves numbers.
    """

    func: Callable
    args: tuple
    kwargs: dict[str, Any]
    with_grad: bool
    item: int | None
    acc: torch.dtype | None


Recipe = Root | Made


def make(recipe: Recipe, roots: Sequence[Tensor]) -> Tensor:
    """The tensor of a recipe, of these roots; autograd records it where the caller's grad mode says so."""
    if isinstance(recipe, Root):
        return roots[recipe.place]

    def made(x):
        return make(x, roots) if isinstance(x, (Root, Made)) else x

    args = mapped(recipe.args, made)
    with torch.set_grad_enabled(recipe.with_grad and torch.is_grad_enabled()):
        result = _computed(recipe.acc, recipe.func, args, {k: mapped(v, made) for k, v in recipe.kwargs.items()})
    return result if recipe.item is None else result[recipe.item]


def _computed(acc: torch.dtype | None, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    if acc is None:
        return func(*args, **kwargs)
    with OneFloat(acc), whole_products():
        return func(*args, **kwargs)


def roots_of(recipe: Recipe, learned: bool = False) -> frozenset[int]:
    """The places of the roots that it is made of; `learned`: only of those that a gradient goes back to."""
    if isinstance(recipe, Root):
        return frozenset((recipe.place,))
    found: set[int] = set()
    if not learned or recipe.with_grad and recipe.func is not Tensor.detach:
        parts = recipe.args, tuple(recipe.kwargs.values())
        mapped(parts, lambda x: isinstance(x, (Root, Made)) and found.update(roots_of(x, learned)))
    return frozenset(found)


class Kitchen:
    """Makes tensors of captured ones while a mod is traced, in the one float `acc`, and remembers how."""

    def __init__(self, acc: torch.dtype) -> None:
        self.acc = acc
        self.roots: list[Tensor] = []
        self.made: dict[int, tuple[Tensor, Made]] = {}
        # what a kept program would not see change; None if there is nothing
        self.why: str | None = None

    def asked(self, func: Callable) -> None:
        """The mod asks a tensor, by a method or an attribute, for what is no tensor."""
        self.why = self.why or why_not_asked(func)

    def recipe(self, x: Tensor) -> Recipe:
        """How `x` is made; one that nothing here made is a root."""
        if id(x) in self.made:
            return self.made[id(x)][1]
        place = next((i for i, root in enumerate(self.roots) if root is x), len(self.roots))
        if place == len(self.roots):
            self.roots.append(x)
        return Root(place)

    def run(self, func: Callable, *args: Any, **kwargs: Any) -> Any:
        """`func` on captured tensors and other arguments that belong to no position."""
        # what is asked here is not asked by the mod
        with torch._C.DisableTorchFunction():
            mapped((args, tuple(kwargs.values())), lambda x: isinstance(x, Tensor) and check_memory("a captured tensor", x))
        moves = asks_what_it_is(func) or getattr(func, "__name__", "") in _MOVES
        acc = None if moves and not any(isinstance(x, torch.dtype) for x in args) else self.acc
        result = _computed(acc, func, args, kwargs)

        def written(x):
            return self.recipe(x) if isinstance(x, Tensor) else x

        many = isinstance(result, (tuple, list))
        with torch._C.DisableTorchFunction():
            self.why = self.why or why_not_repeated(func, args, kwargs, result if many else (result,))
        for i, x in enumerate(result if many else (result,)):
            if isinstance(x, Tensor) and id(x) not in self.made and not any(x is root for root in self.roots):
                named = {k: mapped(v, written) for k, v in kwargs.items()}
                how = Made(func, mapped(args, written), named, torch.is_grad_enabled(), i if many else None, acc)
                self.made[id(x)] = x, how
        return result


def mapped(x: Any, function: Callable) -> Any:
    """`function` on the leaves of nested tuples, lists and slices; a recipe is a leaf."""
    if isinstance(x, (Root, Made)):
        return function(x)
    if type(x) is slice:
        return slice(*[mapped(i, function) for i in (x.start, x.stop, x.step)])
    return type(x)(mapped(i, function) for i in x) if type(x) in (tuple, list) else function(x)


class Picked(NamedTuple):
    """A tensor whose leading dimensions have their indices, `items`: a view in which those dimensions come first."""

    tensor: Tensor
    items: tuple


def pick(kitchen: Kitchen, tensor: Tensor, before: tuple, items: tuple) -> Picked:
    """`tensor[*before, *items]` as far as indices pick elements: slices, None and `...` become views."""
    if Ellipsis in [x for x in items if not isinstance(x, Tensor)]:
        at = [i for i, x in enumerate(items) if x is Ellipsis][0]
        used = sum(x is not None and x is not Ellipsis for x in items)
        items = (*items[:at], *(slice(None),) * (tensor.dim() - len(before) - used), *items[at + 1 :])
    picks = [not (x is None or isinstance(x, slice)) for x in items]
    whole = (slice(None),) * len(before)
    still = tuple(slice(None) if p else x for x, p in zip(items, picks, strict=True))
    if any(x != slice(None) for x in still):
        tensor = kitchen.run(Tensor.__getitem__, tensor, (*whole, *still))
    dims = [len(before) + i for i, p in enumerate(picks) if p]
    chosen = (*before, *(x for x, p in zip(items, picks, strict=True) if p))
    if dims != list(range(len(before), len(chosen))):
        tensor = kitchen.run(torch.movedim, tensor, dims, list(range(len(before), len(chosen))))
    return Picked(tensor, chosen)
