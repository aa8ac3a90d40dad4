"""What cannot be differentiated further raises; nothing is silently a constant (R19)."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from flexref import flex_attention

# PyTorch makes formulas for its forward mode with a part of it that it warns of
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit.script:FutureWarning")
BACKENDS = ("numba_cpu", "reference")
TWICE = "flex_attention is differentiated twice, and it has first derivatives only; leave out create_graph"


def inputs(**how):
    random = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 9, 4, generator=random).requires_grad_(**how) for _ in range(3)]


def table():
    return torch.randn(2, 9, generator=torch.Generator().manual_seed(1)).requires_grad_()


def through(what, q, k, v, t, backend):
    out, lse = flex_attention(q, k, v, lambda s, b, h, i, j: s + t[h, j], return_lse=True, backend=backend)
    return {"out": out.sum(), "lse": lse.sum(), "both": out.sum() + lse.sum()}[what]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["out", "lse", "both"])
@pytest.mark.parametrize("of", ["query", "key", "value", "captured"])
def test_first_derivatives_are_right_and_second_ones_raise(backend, what, of):
    q, k, v, t = *inputs(), table()
    x = {"query": q, "key": k, "value": v, "captured": t}[of]
    (plain,) = torch.autograd.grad(through(what, q, k, v, t, backend), x)
    (graph,) = torch.autograd.grad(through(what, q, k, v, t, backend), x, create_graph=True)
    assert torch.equal(plain, graph) and graph.requires_grad
    with pytest.raises(NotImplementedError, match=TWICE):
        (graph * graph).sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_usual_ways_to_second_derivatives(backend):
    q, k, v = inputs()

    def loss(x):
        return flex_attention(x, k, v, backend=backend).sum()

    with pytest.raises(NotImplementedError, match=TWICE):
        torch.autograd.functional.hessian(loss, q.detach())
    with pytest.raises(NotImplementedError, match=TWICE):
        torch.autograd.functional.hvp(loss, q.detach(), torch.ones_like(q))
    penalty = torch.autograd.grad(loss(q), q, create_graph=True)[0].square().sum()
    with pytest.raises(NotImplementedError, match=TWICE):
        (loss(q) + penalty).backward()
    (first,) = torch.autograd.grad(loss(q), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=TWICE):
        torch.autograd.grad(first.sum(), (q, k), allow_unused=True)
    # a graph that nothing is asked of does no harm
    (first,) = torch.autograd.grad(loss(q), q, create_graph=True)
    loss(q).backward()
    assert torch.equal(q.grad, first.detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("of", [0, 1, 2, 3])
def test_a_tangent_is_not_dropped(backend, grad, of):
    tensors = [x.detach().requires_grad_(grad) for x in (*inputs(), table())]
    names = ("query", "key", "value", "the captured tensor t")
    with forward_ad.dual_level():
        tensors[of] = forward_ad.make_dual(tensors[of].detach(), torch.ones_like(tensors[of]))
        with pytest.raises(NotImplementedError, match=f"^{names[of]} has a tangent, but .* no forward-mode derivative"):
            through("out", *tensors, backend)
        tensors[of] = forward_ad.unpack_dual(tensors[of]).primal
        through("out", *tensors, backend)
    with pytest.raises(TypeError, match="cannot run inside torch.func.jvp"):
        torch.func.jvp(lambda x: flex_attention(x, x, x, backend=backend), (tensors[0].detach(),), (torch.ones_like(tensors[0]),))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ways_of_going_back_agree(backend):
    def run(around=None, retain=False):
        q, k, v, t = *inputs(), table()
        if around is None:
            loss = through("both", q, k, v, t, backend)
        else:
            loss = around(lambda q, k, v, t: through("both", q, k, v, t, backend), q, k, v, t)
        if retain:
            loss.backward(retain_graph=True)
            for x in (q, k, v, t):
                x.grad = None
        loss.backward()
        return [x.grad for x in (q, k, v, t)]

    def offloaded(fn, *tensors):
        with torch.autograd.graph.save_on_cpu():
            return fn(*tensors)

    def checkpointed(reentrant):
        def around(fn, *tensors):
            return checkpoint(fn, *tensors, use_reentrant=reentrant)

        return around

    wanted = run()
    for way in (run(retain=True), run(offloaded), run(checkpointed(True)), run(checkpointed(False))):
        assert all(torch.equal(x, y) for x, y in zip(way, wanted, strict=True))
