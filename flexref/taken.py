"""PyTorch's autograd held to the rule that a branch which was not taken contributes nothing, for the plain reference.

Autograd multiplies the 0 that it hands to such a branch by whatever derivative the branch has, and 0 times inf is NaN.
Each step backward through a mod is followed here together with where its gradient is 0 by selection: there what the step
hands on is 0. Nothing of flexref is used, so that the engines' own way (flexref/program/branches.py) is judged by another.
"""
from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_functorch: Any = torch._C._functorch  # type: ignore[attr-defined]

# backward steps that hand their gradient to one side and 0 to the other
_SELECTING = """Where MaskedFill Clamp ClampMin ClampMax Relu Threshold Hardtanh Maximum Minimum Fmax Fmin Hardshrink Softshrink
Hardswish Hardsigmoid NanToNum Floor Ceil Trunc Round Sign Sgn""".split()
# backward steps whose gradients have another shape or order than what they came from
_MOVING = """Index Select Slice View Expand Squeeze Unsqueeze Permute Transpose Reshape UnsafeView Gather Take T Alias""".split()


def follow(score_mod: Callable) -> Callable:
    """The same function of flat tensors (N,), or of the numbers of one position; gradients through its result obey the rule.

    What is vmapped within it has to be called under `OneShape`.
    """

    def followed(*arguments):
        if not torch.is_grad_enabled():
            return score_mod(*arguments)
        before: Any = torch.zeros((), requires_grad=True, device="cpu").neg().grad_fn
        result = score_mod(*arguments)
        if isinstance(result, Tensor) and result.grad_fn is not None:
            _Follower.of(result.grad_fn, before._sequence_nr())
        return result

    return followed


class OneShape(TorchFunctionMode):
    """What a function of single numbers is given has each position's number: else its backward step sums over positions.

    Tensors with dimensions have no position yet, and PyTorch's functions of them stay as they are.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in args if isinstance(x, Tensor)]
        if any(x.requires_grad for x in tensors) and not any(x.dim() for x in tensors):
            seen = next((x for x in tensors if _functorch.is_batchedtensor(x)), None)
            if seen is not None:
                args = tuple(_spread(x, seen) if isinstance(x, Tensor) else x for x in args)
        return func(*args, **(kwargs or {}))


def _spread(x: Tensor, seen: Tensor) -> Tensor:
    """A number that is the same everywhere, at each position that torch.vmap knows of `seen`."""
    if not x.requires_grad or _functorch.is_batchedtensor(x):
        return x
    positions = _functorch.get_unwrapped(seen).shape[_functorch.maybe_get_bdim(seen)]
    return _functorch._add_batch_dim(x.expand(positions), 0, _functorch.maybe_get_level(seen))


class _Follower:
    """Knows for every step between a mod's result and what it was made of where its gradient counts.

    Steps are known by numbers: a hook that held its own step would keep both, and all that autograd saved, for ever.
    """

    @classmethod
    def of(cls, root: Any, before: int) -> None:
        """Follow all that was made after the step numbered `before`, if a branch is among it."""
        numbers, steps = {root: 0}, [root]
        for node in steps:
            for following, _ in node.next_functions:
                if following is not None and following not in numbers:
                    numbers[following] = len(numbers)
                    # the step that adds up a leaf's gradient has the greatest number there is
                    if before < following._sequence_nr() and not following.name().endswith("AccumulateGrad"):
                        steps.append(following)
        selecting = [node for node in steps if _kind(node) in _SELECTING]
        if not selecting:
            return
        # within somebody's backward a step answers for what that asks; a thread of its own is in none
        with ThreadPoolExecutor(1) as apart:
            passes = dict(zip(selecting, apart.map(_passes, selecting), strict=True))
        follower = cls()
        for node in steps:
            after = tuple((numbers.get(following, -1), place) for following, place in node.next_functions)
            node.register_hook(follower._hook(numbers[node], _kind(node), passes.get(node, ()), after))

    def __init__(self):
        self.counts: dict[tuple[int, int], Tensor] = {}

    def _hook(self, number: int, kind: str, passes: tuple, after: tuple) -> Callable:
        def hook(grads_in: tuple, grads_out: tuple) -> tuple:
            counts = self.counts.pop((number, 0), None)
            if number == 0:
                self.counts.clear()
            handed = []
            for i, (grad, to) in enumerate(zip(grads_in, after, strict=True)):
                here = counts
                if passes and passes[i] is not None:
                    here = passes[i] if counts is None else counts & passes[i]
                handed.append(None if grad is None else self._hand_on(kind, grad, here, to))
            return tuple(handed)

        return hook

    def _hand_on(self, kind: str, grad: Tensor, here: Tensor | None, to: tuple) -> Tensor:
        if here is not None and kind == "Expand":
            here = here.double().sum_to_size(grad.shape) > 0
        elif here is None or kind in _MOVING or here.shape != grad.shape:
            here = torch.ones(grad.shape, dtype=torch.bool, device=grad.device)
        else:
            grad = torch.where(here, grad, 0.0)
        before = self.counts.get(to)
        self.counts[to] = here if before is None else here | before
        return grad


def _kind(node: Any) -> str:
    return node.name().split("Backward")[0]


def _passes(node: Any) -> tuple[Tensor | None, ...]:
    """Where a step that selects hands on what it is given, for each of what it was made of."""
    made = node._input_metadata[0]
    with torch.no_grad():
        handed = node(torch.ones(made.shape, dtype=made.dtype, device=made.device))
    return tuple(None if x is None else x != 0 for x in (handed if isinstance(handed, tuple) else (handed,)))
