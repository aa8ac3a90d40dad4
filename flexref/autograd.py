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
    # an emulated engine has the name of the real one
    key = backend.name, getattr(backend, "how", ""), problem
    reasons = _accepted.get(key, lambda: tuple(backend.unsupported(problem)))
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
        lse_alone = grad_out is None
        if lse_alone:
            # only lse counts: what values hold, and the out that they made, must not come in as 0 times NaN
            grad_out, out, value = (torch.zeros_like(x) for x in (out, out, value))
        tensors = replace(ctx.rest, query=query, key=key, value=value)
        output = Output(out, lse, None, tuple(others[: ctx.saved_count]))
        gradients = ctx.backend.backward(ctx.problem, tensors, output, grad_out, grad_lse)
        d_value = gradients.value.zero_() if lse_alone and gradients.value is not None else gradients.value
        return (None, None, None, gradients.query, gradients.key, d_value, *gradients.captured)
