"""The reference as a backend: right for every problem, in O(L x S) memory, never chosen by `auto`.

It takes no part in trace, derive or emit: it calls the user's own functions and uses torch's autograd.
"""
from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from flexref.index_error import named_index_error
from flexref.one_float import asks_what_it_is, whole_products
from flexref.problem import Gradients, Output, Problem, Tensors
from flexref.reference import Result, einsum

name = "reference"
rank = 0
lists = "none"
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
    """out (B, Hq, L, Ev) in query's dtype; lse and max_scores (B, Hq, L) in the accumulation type.

    Where a gradient is needed the graph of this run is kept, so that backward asks no mod again, whatever it would read then.
    """
    inputs = (tensors.query, tensors.key, tensors.value)
    leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, problem.needs_grad, strict=True)]
    reads = _read_by_mods(problem, tensors)
    grad, reading = torch.set_grad_enabled(problem.needs_backward), _StandIns(reads)
    with grad, _no_autocast(tensors), whole_products(), _no_foreign_hooks(), reading:
        try:
            result = _attend(tensors, *leaves)
        except IndexError as error:
            raise named_index_error(problem, tensors) or error from None
    kept = (result, leaves, reads) if problem.needs_backward else None
    out, lse, max_scores = (x.detach() for x in result)
    return Output(_ordered_like(tensors.query, out), lse, max_scores, kept=kept)


def backward(
    problem: Problem, tensors: Tensors, output: Output, grad_out: Tensor, grad_lse: Tensor | None
) -> Gradients:
    """A gradient, in its tensor's dtype, for each that needs one, through the graph that forward kept."""
    result, leaves, reads = output.kept  # type: ignore[misc]
    like = (tensors.query, tensors.key, tensors.value, *tensors.captured, *tensors.roots)
    leaves = [*leaves, *(reads.get(id(x)) for x in like[3:])]
    needs = [*problem.needs_grad, *_captured_needs(problem, tensors)]
    # a mod that ignores the score leaves lse, or even out, without a path to any leaf
    pairs = [(result.out, grad_out), (result.lse, grad_lse)]
    pairs = [(value, grad) for value, grad in pairs if grad is not None and value.requires_grad]
    with torch.enable_grad(), _no_autocast(tensors), whole_products(), _same_bits(grad_out.device):
        found = iter(_gradients(pairs, [leaf for leaf, need in zip(leaves, needs, strict=True) if need]))
    grads = [_ordered_like(x, next(found).to(x.dtype)) if need else None for x, need in zip(like, needs, strict=True)]
    behind = 3 + len(tensors.captured)
    return Gradients(grads[0], grads[1], grads[2], tuple(grads[3:behind]), tuple(grads[behind:]))


def _captured_needs(problem: Problem, tensors: Tensors) -> list[bool]:
    needs = [capture.needs_grad for capture in problem.captures]
    return needs + [x.requires_grad and problem.needs_backward for x in tensors.roots]


def _read_by_mods(problem: Problem, tensors: Tensors) -> dict[int, Tensor]:
    """What stands for each tensor that the mods read, by id: floats in the accumulation type, where gradients add up."""
    found: dict[int, Tensor] = {}
    for x, need in zip((*tensors.captured, *tensors.roots), _captured_needs(problem, tensors), strict=True):
        if x.is_floating_point():
            leaf = found.setdefault(id(x), x.detach().to(problem.acc_dtype, copy=True))
            leaf.requires_grad_(need or leaf.requires_grad)
    return found


def _no_foreign_hooks() -> AbstractContextManager:
    """The graph that is kept saves its tensors itself: checkpointing, which would make them again, knows of it nothing."""
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:  # type: ignore[attr-defined]
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def _attend(tensors: Tensors, query: Tensor, key: Tensor, value: Tensor) -> Result:
    # what its program says of a score_mod is not believed here
    block_mask = None if tensors.found else tensors.block_mask
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
    return list(torch.autograd.grad(outputs, wanted, grads, retain_graph=True, allow_unused=True, materialize_grads=True))


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

        if asks_what_it_is(func):
            answer = func(*args, **(kwargs or {}))
            if not isinstance(answer, Tensor):
                return answer
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
