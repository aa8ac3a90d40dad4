"""The reference as a backend: right for every problem, in O(L x S) memory, never chosen by `auto`.

It takes no part in trace, derive or emit: it calls the user's own functions and uses torch's autograd.
"""
from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from flexref.index_error import named_index_error
from flexref.problem import Gradients, Output, Problem, Tensors
from flexref.reference import Result, einsum

name = "reference"
rank = 0
options: dict[str, str] = {}

# the flag of torch.set_deterministic_debug_mode belongs to the process, so one backward at a time may hold it
_determinism = threading.RLock()


def unavailable() -> list[str]:
    """Nothing but torch is needed."""
    return []


def unsupported(problem: Problem) -> list[str]:
    """Whatever is a Problem has a meaning, and this is it."""
    return []


def forward(problem: Problem, tensors: Tensors) -> Output:
    """out (B, Hq, L, Ev) in query's dtype; lse and max_scores (B, Hq, L) in the accumulation type."""
    with torch.no_grad(), _no_autocast(tensors):
        try:
            result = _attend(tensors, tensors.query, tensors.key, tensors.value)
        except IndexError as error:
            raise named_index_error(problem, tensors) or error from None
    return Output(_ordered_like(tensors.query, result.out), result.lse, result.max_scores)


def backward(
    problem: Problem, tensors: Tensors, output: Output, grad_out: Tensor, grad_lse: Tensor | None
) -> Gradients:
    """Runs the reference again under autograd; a gradient, in its tensor's dtype, for each that needs one."""
    inputs = (tensors.query, tensors.key, tensors.value, *tensors.captured)
    needs = (*problem.needs_grad, *(capture.needs_grad for capture in problem.captures))
    leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(inputs, needs, strict=True)]
    stand_ins = {id(tensor): leaf for tensor, leaf in zip(tensors.captured, leaves[3:], strict=True)}
    with torch.enable_grad(), _no_autocast(tensors), _StandIns(stand_ins), _same_bits(grad_out.device):
        result = _attend(tensors, *leaves[:3])
        # a mod that ignores the score leaves lse, or even out, without a path to any leaf
        pairs = [(result.out, grad_out), (result.lse, grad_lse)]
        pairs = [(value, grad) for value, grad in pairs if grad is not None and value.requires_grad]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(_gradients(pairs, wanted))
    grads = [_ordered_like(leaf, next(found)) if leaf.requires_grad else None for leaf in leaves]
    return Gradients(grads[0], grads[1], grads[2], tuple(grads[3:]))


def _attend(tensors: Tensors, query: Tensor, key: Tensor, value: Tensor) -> Result:
    block_mask = tensors.block_mask
    blocks = None if block_mask is None else block_mask.listed()
    return einsum(query, key, value, tensors.score_mod, tensors.mask_mod, scale=tensors.scale, blocks=blocks)


def _ordered_like(like: Tensor, x: Tensor) -> Tensor:
    """`x` with its dimensions in memory in the order of those of `like`."""
    order = sorted(range(like.dim()), key=lambda i: (-like.stride(i), i))
    if order == list(range(like.dim())):
        return x.contiguous()
    return x.permute(order).contiguous().permute(sorted(range(like.dim()), key=order.__getitem__))


def _no_autocast(tensors: Tensors) -> torch.autocast:
    """Autocast would move the products, and their gradients, out of the accumulation type."""
    return torch.autocast(tensors.query.device.type, enabled=False)


def _gradients(pairs: list[tuple[Tensor, Tensor]], wanted: list[Tensor]) -> list[Tensor]:
    """d of all outputs by each wanted leaf; zeros for a leaf that nothing reads."""
    if not pairs or not wanted:
        return [torch.zeros_like(leaf) for leaf in wanted]
    outputs, grads = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outputs, wanted, grads, allow_unused=True, materialize_grads=True))


class _StandIns(TorchFunctionMode):
    """Every torch function that is given a captured tensor gets the leaf that stands for it.

    The mod closes over the user's own tensors; to differentiate by those would follow the graph behind them.
    """

    def __init__(self, leaves: dict[int, Tensor]):
        super().__init__()
        self.leaves = leaves

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def swap(value):
            return self.leaves.get(id(value), value)

        return func(*tree_map(swap, args), **tree_map(swap, kwargs or {}))


@contextmanager
def _same_bits(device: torch.device) -> Iterator[None]:
    """On a CPU, torch scatters gradients of reads back with float atomics unless it is told otherwise."""
    if device.type != "cpu":
        yield
        return
    with _determinism:
        before = torch.get_deterministic_debug_mode()
        torch.set_deterministic_debug_mode("error")
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(before)
