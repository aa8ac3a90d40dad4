"""Sinks, R16: logits of a head that take weight and give no value, added to what any engine gives by algebra on out and lse.

With s the logsumexp of a head's sinks, the softmax over keys and sinks together has the weights of the one over keys alone
times w = sigmoid(lse - s), and lse + softplus(s - lse) for its own lse.
"""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flexref.first_derivatives import no_further
from flexref.problem import Output
from flexref.tensor_gate import check_memory

_INF = float("inf")


def checked_sink(sink: Any, query: Tensor) -> Tensor:
    """`sink` as (Hq, n). Raises TypeError for what is no tensor of floats, ValueError for another shape or device."""
    if not isinstance(sink, Tensor):
        instead = f"torch.full(({query.shape[1]},), x) is the same logit for each head"
        raise TypeError(f"sink must be a torch.Tensor, got {type(sink).__name__}; {instead}.")
    check_memory("sink", sink)
    if not sink.is_floating_point() or sink.itemsize < 2:
        raise TypeError(f"sink must be float16, bfloat16, float32 or float64, got {sink.dtype}; convert it with .to().")
    if sink.dim() not in (1, 2) or sink.shape[0] != query.shape[1]:
        raise ValueError(
            f"sink must have the shape (Hq,) or (Hq, n), with a row for each of query's {query.shape[1]} heads, "
            f"got {tuple(sink.shape)}."
        )
    if sink.device != query.device:
        raise ValueError(f"sink is on {sink.device} but query is on {query.device}; move it with .to({str(query.device)!r}).")
    return sink if sink.dim() == 2 else sink[:, None]


def with_sink(output: Output, sink: Tensor) -> Output:
    """`output` of keys alone, as it is with `sink` (Hq, n) beside them; differentiable by both."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (output.out, output.lse, sink)):
        out, lse = _WithSink.apply(output.out, output.lse, sink)
    else:
        distance, total = _distance(output.lse, sink)
        # nobody else has seen this out
        out, lse = output.out.mul_(torch.sigmoid(distance)[..., None]), torch.logaddexp(output.lse, total)
    highest = output.max_scores
    if highest is not None and sink.shape[1]:
        top = sink.detach().to(highest.dtype).amax(1)
        # as in a row of scores, +inf leaves no number
        highest = torch.maximum(highest, torch.where(top == _INF, torch.nan, top)[:, None])
    return replace(output, out=out, lse=lse, max_scores=highest)


class _WithSink(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out: Tensor, lse: Tensor, sink: Tensor):  # type: ignore[override]
        distance, total = _distance(lse, sink)
        ctx.save_for_backward(out, lse, sink, distance, total)
        ctx.set_materialize_grads(False)
        return _scaled(out, torch.sigmoid(distance)), torch.logaddexp(lse, total)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):  # type: ignore[override]
        with torch.no_grad():
            gradients = _gradients(ctx, grad_out, grad_lse)
        if torch.is_grad_enabled():
            return tuple(no_further(gradients, (*ctx.saved_tensors[:3], grad_out, grad_lse)))
        return gradients


def _distance(lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """How far the lse of the keys (B, H, L) is above that of the sinks, and the latter (H, 1)."""
    total = sink.to(lse.dtype).logsumexp(1, keepdim=True)
    total = torch.where(total == _INF, torch.nan, total)
    # both -inf: a row with nothing at all, whose distance is none
    return torch.where((lse == -_INF) & (total == -_INF), _INF, lse - total), total


def _gradients(ctx, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    out, _, sink, distance, total = ctx.saved_tensors
    kept, lost = torch.sigmoid(distance), torch.sigmoid(-distance)
    d_out = d_lse = d_sink = None
    d_total = torch.zeros_like(kept)
    if grad_out is not None:
        d_out = _scaled(grad_out, kept)
        # d kept / d distance is kept * lost
        d_lse = torch.linalg.vecdot(grad_out.to(kept.dtype), out.to(kept.dtype)) * kept * lost
        d_total = -d_lse
    if grad_lse is not None:
        d_lse = grad_lse * kept if d_lse is None else d_lse + grad_lse * kept
        d_total = d_total + grad_lse * lost
    if ctx.needs_input_grad[2]:
        share = torch.exp(sink.to(total.dtype) - torch.where(total == -_INF, 0.0, total))
        d_sink = (d_total.sum((0, 2))[:, None] * share).to(sink.dtype)
    return d_out, d_lse, d_sink


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x (B, H, L, E) times factor (B, H, L), in the factor's type and rounded once."""
    return (x * factor[..., None]).to(x.dtype)
