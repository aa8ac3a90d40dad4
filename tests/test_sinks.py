"""Sinks (R16) from the public function: what they mean, where they are unusual numbers, and what is no sink."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from flexref import AuxRequest, explain, flex_attention, sinks
from flexref.backends import reference
from flexref.conformance.cases import Case
from flexref.conformance.checks import check_case
from flexref.reference import einsum, loops

BACKENDS = ("numba_cpu", "reference")
AUX = AuxRequest(lse=True, max_scores=True)
RUN = pytest.mark.parametrize("backend", BACKENDS)


def inputs(dtype=torch.float64, length=9):
    random = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, length, 8, generator=random, dtype=dtype).requires_grad_() for _ in range(3)]


def logits(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype).requires_grad_()


def late(b, h, q_idx, kv_idx):
    # the first two queries have nothing to attend to
    return kv_idx <= q_idx - 2


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3), (4, 0)])
def test_two_references_and_plain_algebra_agree(shape):
    query, key, value = inputs()
    sink = logits(*shape)
    first, second = (f(query, key, value, None, late, sink=sink) for f in (loops, einsum))
    plain = einsum(query, key, value, None, late)
    beside = sink.reshape(4, -1).logsumexp(1)[:, None]
    lse = torch.logaddexp(plain.lse, beside)
    out = torch.where(lse == -math.inf, 0.0, torch.exp(plain.lse - lse).nan_to_num(0.0))[..., None] * plain.out
    for got in (first, second):
        torch.testing.assert_close(got.out, out)
        torch.testing.assert_close(got.lse, lse)
    torch.testing.assert_close(first.max_scores, second.max_scores)
    if sink.numel():
        # without any, lse is -inf in some rows
        torch.autograd.gradcheck(lambda q, k, v, s: einsum(q, k, v, None, late, sink=s)[:2], (query, key, value, sink))


@RUN
@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3), (4, 0)])
def test_out_lse_and_gradients_are_the_references(backend, shape):
    query, key, value = inputs(torch.float32)
    sink = logits(*shape, dtype=torch.float32)
    leaves = (query, key, value, sink)
    out, aux = flex_attention(query, key, value, mask_mod=late, sink=sink, backend=backend, return_aux=AUX)
    want = einsum(*(x.detach().double().requires_grad_() for x in leaves[:3]), None, late, sink=sink.detach().double())
    torch.testing.assert_close(out, want.out.float())
    torch.testing.assert_close(aux.lse, want.lse.float())
    torch.testing.assert_close(aux.max_scores, want.max_scores.float())
    wide = [x.detach().double().requires_grad_() for x in leaves]
    loss = lambda out, lse: out.sin().sum() + lse.where(lse > -math.inf, 0.0).cos().sum()  # noqa: E731
    grads = torch.autograd.grad(loss(out, aux.lse), leaves)
    result = einsum(*wide[:3], None, late, sink=wide[3])
    for got, wanted in zip(grads, torch.autograd.grad(loss(*result[:2]), wide), strict=True):
        torch.testing.assert_close(got, wanted.float(), atol=2e-6, rtol=2e-5)


@RUN
def test_a_sink_alone_may_want_a_gradient(backend):
    query, key, value = (x.detach() for x in inputs())
    sink = logits(4)
    out = flex_attention(query, key, value, sink=sink, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), sink)
    (want,) = torch.autograd.grad(einsum(query, key, value, sink=sink).out.sum(), sink)
    torch.testing.assert_close(grad, want)
    assert not flex_attention(query, key, value, sink=sink.detach(), backend=backend).requires_grad


@RUN
def test_unusual_logits(backend):
    query, key, value = inputs()
    none = torch.full((4,), -math.inf, dtype=torch.float64)
    out, aux = flex_attention(query, key, value, mask_mod=late, sink=none, backend=backend, return_aux=AUX)
    plain, without = flex_attention(query, key, value, mask_mod=late, backend=backend, return_aux=AUX)
    assert torch.equal(out, plain) and torch.equal(aux.lse, without.lse) and torch.equal(aux.max_scores, without.max_scores)
    for bad in (math.nan, math.inf):
        one = torch.tensor([0.0, bad, 1.0, -math.inf], dtype=torch.float64)
        out, aux = flex_attention(query, key, value, mask_mod=late, sink=one, backend=backend, return_aux=AUX)
        want = einsum(query, key, value, None, late, sink=one)
        for got, wanted in ((out, want.out), (aux.lse, want.lse), (aux.max_scores, want.max_scores)):
            torch.testing.assert_close(got, wanted, equal_nan=True)
            assert got is not None and got[:, 1].isnan().all() and not got[:, [0, 2, 3]].isnan().any()
    # weights that vanish beside the sink, and a sink that vanishes beside them
    for far in (1e4, -1e4):
        sink = torch.full((4,), far, dtype=torch.float64, requires_grad=True)
        got = flex_attention(query, key, value, mask_mod=late, sink=sink, backend=backend, return_lse=True)
        result = einsum(query, key, value, None, late, sink=sink)
        for mine, theirs in zip(got, result[:2], strict=True):
            torch.testing.assert_close(mine, theirs)
        grads = [torch.autograd.grad(out.sum() + lse.sum(), (query, value, sink)) for out, lse in (got, result[:2])]
        for mine, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, theirs)


@RUN
def test_steps_of_decoding_checkpoints_and_autocast(backend):
    query, key, value = inputs(torch.float32)
    sink = logits(4, 2, dtype=torch.float32)
    whole = flex_attention(query, key, value, sink=sink, backend=backend)
    torch.testing.assert_close(flex_attention(query[:, :, 3:4], key, value, sink=sink, backend=backend), whole[:, :, 3:4])
    call = lambda *x: flex_attention(*x[:3], sink=x[3], backend=backend)  # noqa: E731
    wanted = torch.autograd.grad(whole.square().sum(), (query, sink))
    again = checkpoint(call, query, key, value, sink, use_reentrant=False)
    for got, want in zip(torch.autograd.grad(again.square().sum(), (query, sink)), wanted, strict=True):  # type: ignore[union-attr]
        assert torch.equal(got, want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flex_attention(query, key, value, sink=sink, backend=backend).dtype == torch.bfloat16


def test_explain_says_so():
    query, key, value = inputs()
    assert "3 sinks a head are added to out and lse" in str(explain(query, key, value, sink=logits(4, 3)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit.script:FutureWarning")
def test_second_derivatives_and_tangents_raise():
    query, key, value = inputs()
    sink = logits(4)
    (first,) = torch.autograd.grad(flex_attention(query, key, value, sink=sink).sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated twice"):
        torch.autograd.grad(first.sum(), sink)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(sink.detach(), torch.ones(4, dtype=torch.float64))
        with pytest.raises(NotImplementedError, match="sink has a tangent"):
            flex_attention(query.detach(), key.detach(), value.detach(), sink=dual)


@pytest.mark.parametrize(
    ("sink", "error", "says"),
    [
        (0.5, TypeError, r"sink must be a torch.Tensor, got float; torch.full\(\(4,\), x\) is the same logit"),
        (torch.ones(4, dtype=torch.long), TypeError, "sink must be float16, bfloat16, float32 or float64, got torch.int64"),
        (torch.ones(2), ValueError, r"shape \(Hq,\) or \(Hq, n\), with a row for each of query's 4 heads, got \(2,\)"),
        (torch.ones(4, 1, 1), ValueError, r"got \(4, 1, 1\)"),
        (torch.tensor(1.0), ValueError, r"got \(\)"),
        (torch.ones(4, device="meta"), ValueError, "sink"),
        (torch.ones(4).to_sparse(), TypeError, "sink"),
    ],
)
def test_what_is_no_sink(sink, error, says):
    with pytest.raises(error, match=says):
        flex_attention(*inputs(), sink=sink)
    with pytest.raises(error, match=says):
        explain(*inputs(), sink=sink)


CASE = Case(q_len=20, kv_len=33, kv_heads=2, sinks=2, mask="kv_idx < q_idx - 3", wants=("query", "key", "value", "captured"))
FAULTS = {
    "out not scaled": lambda real: lambda out, lse, sink: (out, real(out, lse, sink)[1]),
    "lse without the sink": lambda real: lambda out, lse, sink: (real(out, lse, sink)[0], lse),
    "the first sink alone": lambda real: lambda out, lse, sink: real(out, lse, sink[:, :1]),
    "heads turned": lambda real: lambda out, lse, sink: real(out, lse, sink.flip(0)),
    "a gradient 1 % off": lambda real: lambda out, lse, sink: real(out, lse, sink * 1.01 - sink.detach() * 0.01),
    "no gradient through the weight": lambda real: lambda out, lse, sink: real(out, lse.detach(), sink),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_suite_catches(fault, monkeypatch):
    check_case(reference, CASE)
    monkeypatch.setattr(sinks._WithSink, "apply", FAULTS[fault](sinks._WithSink.apply))
    with pytest.raises(AssertionError, match="over the error budget|is not finite"):
        check_case(reference, CASE)
