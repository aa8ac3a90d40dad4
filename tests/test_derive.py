"""The derivative of a program, against PyTorch's autograd on the mod itself."""

from __future__ import annotations

import pytest
import torch

from flexref.program.derive import derive
from flexref.program.interpret import interpret
from flexref.program.ir import check
from flexref.program.trace import trace

weight = torch.linspace(0.5, 1.5, 4, requires_grad=True)
table = torch.linspace(-1, 1, 24).reshape(4, 6).requires_grad_()
gain = torch.tensor(0.7, requires_grad=True)

MODS = {
    "identity": lambda s, b, h, q, k: s,
    "soft_cap": lambda s, b, h, q, k: 2.0 * torch.tanh(s / 2.0),
    "captured": lambda s, b, h, q, k: s * weight[h] + table[h, q],
    "nested": lambda s, b, h, q, k: s + table[h][q] * s,
    "repeated": lambda s, b, h, q, k: s * weight[h] + weight[h] * weight[k % 4],
    "scalar": lambda s, b, h, q, k: torch.sigmoid(s * gain) + gain,
    "without_score": lambda s, b, h, q, k: gain * (q - k) + weight[h],
    "where": lambda s, b, h, q, k: torch.where(q >= k, s * s, -float("inf")),
    "maximum": lambda s, b, h, q, k: torch.maximum(s, gain) + s.clamp(-0.5, 0.5) + torch.relu(s) * 2,
    "softplus": lambda s, b, h, q, k: torch.nn.functional.softplus(s) + torch.nn.functional.gelu(s),
    "elementary": lambda s, b, h, q, k: torch.exp(s) * torch.sin(s) + torch.log1p(s * s) + torch.sqrt(s * s + 1) + s**3,
    "inverse": lambda s, b, h, q, k: torch.atan(s) + torch.asinh(s) + torch.erf(s) + 1 / (2 + s * s) + torch.expm1(s),
    "one_minus": lambda s, b, h, q, k: torch.atanh(torch.tanh(s) * 0.9) + torch.asin(torch.tanh(s) * 0.5) + 1 / (1 + s * s),
    "constant": lambda s, b, h, q, k: 3.0,
    "steps": lambda s, b, h, q, k: torch.floor(s) + torch.round(s) + s.abs() + torch.fmod(s, 2.0),
}

# on whole tensors PyTorch reads a nested index as rows
ON_WHOLE_TENSORS = {**MODS, "nested": lambda s, b, h, q, k: s + table[h, q] * s}


@pytest.mark.parametrize("name", MODS)
def test_derivative_is_autograds(name):
    mod = MODS[name]
    traced = trace(mod, "score")
    wanted = tuple(i for i in traced.graph.loads)
    derivative = derive(traced.graph, wanted)
    check(derivative)
    index = torch.meshgrid(*(torch.arange(n) for n in (1, 4, 6, 6)), indexing="ij")
    score = torch.linspace(-2.05, 2.1, index[0].numel()).reshape(index[0].shape).requires_grad_()
    out = torch.as_tensor(ON_WHOLE_TENSORS[name](score, *index)).expand(score.shape).to(torch.float32)
    grad = torch.linspace(0.5, 1, out.numel()).reshape(out.shape)
    leaves = (score, weight, table, gain)
    want = torch.autograd.grad(out, leaves, grad, allow_unused=True) if out.requires_grad else (None,) * 4
    names = ("score", "b", "h", "q_idx", "kv_idx", "grad")
    inputs: dict[str, torch.Tensor] = dict(zip(names, (score.detach(), *index, grad), strict=True))
    with torch.no_grad():
        got = interpret(derivative, inputs, [t.detach() for t in traced.captured], traced.scalars)
    expected = torch.zeros_like(score) if want[0] is None else want[0]
    torch.testing.assert_close(got["score"].expand_as(score), expected, rtol=1e-5, atol=1e-6)
    for tensor, total in zip(leaves[1:], want[1:], strict=True):
        sums = torch.zeros_like(tensor)
        for node, place in loads_of(derivative):
            if traced.captured[node.attr] is tensor:
                values = interpret_nodes(derivative, inputs, traced, node.args)
                contribution = got[f"load{place}"].expand_as(score)
                sums.index_put_(
                    tuple(v.expand_as(score) for v in values), contribution, accumulate=True
                ) if values else sums.add_(contribution.sum())
        torch.testing.assert_close(sums, torch.zeros_like(tensor) if total is None else total, rtol=1e-4, atol=1e-4)


def loads_of(graph):
    """Each differentiated load with its position."""
    return [(graph.nodes[i], i) for i in graph.loads if f"load{i}" in dict(graph.outputs)]


def interpret_nodes(graph, inputs, traced, positions):
    """The values of some nodes."""
    from dataclasses import replace

    asked = replace(graph, outputs=tuple((str(p), p) for p in positions))
    captured = [t.detach() for t in traced.captured]
    return list(interpret(asked, inputs, captured, traced.scalars).values())


def test_a_mod_that_ignores_the_score_has_a_zero_derivative():
    graph = derive(trace(MODS["constant"], "score").graph)
    assert str(graph) == "%0 = const 0.0 : float\nreturn score=%0"
