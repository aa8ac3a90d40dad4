"""PyTorch's autograd held to the rule that a branch which was not taken contributes nothing, for the plain reference.

Autograd multiplies the 0 that it hands to such a branch by whatever derivative the branch has, and 0 times inf is NaN.
Each step backward through a mod is followed here together with where its gradient is 0 by selection: there what the step
hands on is 0. Nothing of flexref is used, so that the engines' own way (flexref/program/branches.py) is judged by another.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# backward steps that hand their gradient to one side and 0 to the other
_SELECTING = """Where MaskedFill Clamp ClampMin ClampMax Relu Threshold Hardtanh Maximum Minimum Fmax Fmin Hardshrink Softshrink
Hardswish Hardsigmoid NanToNum Floor Ceil Trunc Round Sign Sgn""".split()
# backward steps whose gradients have another shape or order than what they came from
_MOVING = """Index Select Slice View Expand Squeeze Unsqueeze Permute Transpose Reshape UnsafeView Gather Take T Alias""".split()


def follow(score_mod: Callable) -> Callable:
    """The same score_mod; gradients through its result obey the rule."""

    def followed(*arguments):
        with _OneShape():
            result = score_mod(*arguments)
        if isinstance(result, Tensor) and result.grad_fn is not None:
            _Follower(result.grad_fn, {x.grad_fn for x in arguments if isinstance(x, Tensor)})
        return result

    return followed


class _OneShape(TorchFunctionMode):
    """Arguments of a function get one shape first: else its backward step sums over positions, taken or not."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in args if isinstance(x, Tensor)]
        if func is not Tensor.__getitem__ and len({x.shape for x in tensors}) > 1 and any(x.requires_grad for x in tensors):
            shape = torch.broadcast_shapes(*(x.shape for x in tensors))
            args = tuple(x.expand(shape) if isinstance(x, Tensor) else x for x in args)
        return func(*args, **(kwargs or {}))


class _Follower:
    """Knows for every step between a mod's result and what it was made of where its gradient counts.

    Steps are known by numbers: a hook that held its own step would keep both, and all that autograd saved, for ever.
    """

    def __init__(self, root: Any, ends: set):
        self.counts: dict[tuple[int, int], Tensor] = {}
        numbers = {root: 0}
        todo = [root]
        while todo:
            node = todo.pop()
            after = []
            for following, place in node.next_functions:
                if following is not None and following not in numbers:
                    numbers[following] = len(numbers)
                    if following not in ends and not following.name().endswith("AccumulateGrad"):
                        todo.append(following)
                after.append((numbers.get(following, -1), place))
            node.register_hook(self._hook(numbers[node], node, tuple(after)))

    def _hook(self, number: int, node: Any, after: tuple) -> Callable:
        kind = node.name().split("Backward")[0]
        passes: tuple = ()
        if kind in _SELECTING:
            made = node._input_metadata[0]
            passes = tuple(None if g is None else g != 0 for g in _as_tuple(node(torch.ones(made.shape, dtype=made.dtype))))

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


def _as_tuple(x: Any) -> tuple:
    return x if isinstance(x, tuple) else (x,)
