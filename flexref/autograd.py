"""ONE torch.autograd.Function above every backend."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.autograd.function import once_differentiable

from flexref.backend import Backend
from flexref.errors import Unsupported
from flexref.problem import Output, Problem, Tensors
from flexref.recent import Recent

_accepted = Recent(4096)


def attend(backend: Backend, problem: Problem, tensors: Tensors) -> Output:
    """Run `backend`; out and lse are differentiable in query, key, value and captured tensors, max_scores is not.

    Raises Unsupported, with every reason, if the backend cannot run this problem.
    """
    reasons = _accepted.get((backend, problem), lambda: tuple(backend.unsupported(problem)))
    if reasons:
        raise Unsupported(
            f"backend {backend.name!r} cannot run this problem: {'; '.join(reasons)}.",
            {backend.name: list(reasons)},
        )
    if not problem.needs_backward:
        with torch.no_grad():
            return backend.forward(problem, tensors)
    inputs = (tensors.query, tensors.key, tensors.value, *tensors.captured)
    return Output(*_Attend.apply(backend, problem, tensors, *inputs))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend: Backend, problem: Problem, tensors: Tensors, *inputs):  # type: ignore[override]
        output = backend.forward(problem, tensors)
        ctx.backend, ctx.problem = backend, problem
        # query, key and value come back from the saved tensors, where checkpointing can replace them
        ctx.rest = replace(tensors, query=None, key=None, value=None)
        ctx.save_for_backward(*inputs[:3], output.out, output.lse, *output.saved, *inputs[3:])
        ctx.saved_count = len(output.saved)
        ctx.set_materialize_grads(False)
        if output.max_scores is not None:
            ctx.mark_non_differentiable(output.max_scores)
        return output.out, output.lse, output.max_scores

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse, _):  # type: ignore[override]
        query, key, value, out, lse, *others = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * (6 + len(ctx.rest.captured))
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        tensors = replace(ctx.rest, query=query, key=key, value=value)
        output = Output(out, lse, None, tuple(others[: ctx.saved_count]))
        gradients = ctx.backend.backward(ctx.problem, tensors, output, grad_out, grad_lse)
        return (None, None, None, gradients.query, gradients.key, gradients.value, *gradients.captured)
