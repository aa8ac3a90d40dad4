"""ONE torch.autograd.Function above every backend."""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flexref.backend import Backend
from flexref.errors import Unsupported
from flexref.first_derivatives import no_further
from flexref.problem import Output, Problem, Tensors
from flexref.recent import Recent
from flexref.sinks import with_sink

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
    inputs = (tensors.query, tensors.key, tensors.value, *tensors.captured, *tensors.roots)
    if forward_ad._current_level >= 0:
        _refuse_tangents(problem, inputs, tensors.sink)
    if problem.needs_backward:
        output = Output(*_Attend.apply(backend, problem, tensors, *inputs))
    else:
        with torch.no_grad():
            output = backend.forward(problem, tensors)
    return output if tensors.sink is None else with_sink(output, tensors.sink)


def _refuse_tangents(problem: Problem, inputs: tuple, sink: Tensor | None) -> None:
    """Raise NotImplementedError for an input with a forward-mode tangent, which would be dropped (R19)."""
    captured = [f"the captured tensor {capture.name}" for capture in problem.captures]
    named = [*zip_longest(inputs, ("query", "key", "value", *captured), fillvalue="a captured tensor")]
    for x, name in named if sink is None else [*named, (sink, "sink")]:
        if forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[arg-type]
            raise NotImplementedError(
                f"{name} has a tangent, but flexref.flex_attention has no forward-mode derivative; use backward() or "
                "torch.autograd.grad, or detach the tangent with torch.autograd.forward_ad.unpack_dual."
            )


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend: Backend, problem: Problem, tensors: Tensors, *inputs):  # type: ignore[override]
        output = backend.forward(problem, tensors)
        ctx.backend, ctx.problem, ctx.kept = backend, problem, output.kept
        # query, key and value come back from the saved tensors, where checkpointing can replace them
        ctx.rest = replace(tensors, query=None, key=None, value=None)
        ctx.save_for_backward(*inputs[:3], output.out, output.lse, *output.saved, *inputs[3:])
        ctx.saved_count = len(output.saved)
        ctx.set_materialize_grads(False)
        if output.max_scores is not None:
            ctx.mark_non_differentiable(output.max_scores)
        return output.out, output.lse, output.max_scores

    @staticmethod
    def backward(ctx, grad_out, grad_lse, _):  # type: ignore[override]
        with torch.no_grad():
            gradients = _gradients(ctx, grad_out, grad_lse)
        if torch.is_grad_enabled():
            # a graph of the gradients was asked for, and there is none (R19)
            gradients = no_further(gradients, (*ctx.saved_tensors, grad_out, grad_lse))
        return None, None, None, *gradients


def _gradients(ctx, grad_out, grad_lse) -> list:
    query, key, value, out, lse, *others = ctx.saved_tensors
    rest = ctx.rest
    if grad_out is None and grad_lse is None:
        return [None] * (3 + len(rest.captured) + len(rest.roots))
    lse_alone = grad_out is None
    if lse_alone:
        # only lse counts: what values hold, and the out that they made, must not come in as 0 times NaN
        grad_out, out, value = (torch.zeros_like(x) for x in (out, out, value))
    if grad_out.stride(3) != 1:
        # of out.sum() it is one number for all places: wide loads would be off, and kernels made for that layout alone
        grad_out = grad_out.contiguous()
    tensors = replace(rest, query=query, key=key, value=value)
    output = Output(out, lse, None, tuple(others[: ctx.saved_count]), ctx.kept)
    gradients = ctx.backend.backward(ctx.problem, tensors, output, grad_out, grad_lse)
    d_value = gradients.value.zero_() if lse_alone and gradients.value is not None else gradients.value
    roots = gradients.roots or (None,) * len(rest.roots)
    return [gradients.query, gradients.key, d_value, *gradients.captured, *roots]
