"""Stopped gradients and views of captured tensors inside a mod, beside PyTorch's autograd on the dense scores in float64."""
from __future__ import annotations

import math
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from flexref import flex_attention
from flexref.errors import TraceError
from flexref.program.trace import trace

torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, 9, 4) for _ in range(3))
table = torch.linspace(-1, 1, 9, requires_grad=True)


def dense(x, mod):
    i = [torch.arange(n).view(*(n if d == e else 1 for e in range(4))) for d, n in enumerate((1, 2, 9, 9))]
    return mod(x @ k.double().mT / math.sqrt(4), *i).softmax(-1) @ v.double()


def quiet(s):
    with torch.no_grad():
        return torch.tanh(s)


MODS = {
    "detach": lambda s, t, h, j: s * s.detach(),
    "no_grad": lambda s, t, h, j: s * quiet(s),
    "data": lambda s, t, h, j: s * s.data,
    "straight_through": lambda s, t, h, j: s + (s.round() - s).detach(),
    "transposed": lambda s, t, h, j: s * t.T[h, j],
    "mT": lambda s, t, h, j: s + t.mT[h, j],
    "stopped_read": lambda s, t, h, j: s * t[j, h].detach(),
}


@pytest.mark.parametrize("name", MODS)
def test_gradients_are_those_of_pytorch(name):
    grads = []
    engine = lambda x, mod: flex_attention(x, k, v, mod, backend="numba_cpu")  # noqa: E731
    for dtype, run in ((torch.float32, engine), (torch.float64, dense)):
        table = torch.linspace(-1, 1, 18, dtype=dtype).reshape(9, 2).requires_grad_()
        x = q.to(dtype).requires_grad_() if dtype == torch.float64 else q.clone().requires_grad_()
        run(x, lambda s, b, h, i, j, t=table: MODS[name](s, t, h, j)).square().sum().backward()
        grads.append((x.grad, table.grad))
    (mine, mine_t), (want, want_t) = grads
    torch.testing.assert_close(mine.double(), want, rtol=1e-4, atol=1e-5)
    assert (mine_t is None) == (want_t is None)
    if want_t is not None:
        torch.testing.assert_close(mine_t.double(), want_t, rtol=1e-4, atol=1e-5)


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


def test_a_function_with_its_own_backward_is_refused():
    with pytest.raises(TraceError, match=r"autograd.Function, at .*test_stops.py:.*detach"):
        flex_attention(q, k, v, lambda s, b, h, i, j: Own.apply(s), backend="numba_cpu")


class ReturnsItsArgument(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[override]
        return x

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return -grad


class Around(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query):  # type: ignore[override]
        # a mod that was traced before would not be traced here
        return flex_attention(query, query, query, lambda s, b, h, i, j: s * 1.37 + i)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return grad


def test_a_function_that_returns_its_argument_is_refused_too():
    with pytest.raises(TraceError, match="calls a torch.autograd.Function"):
        trace(lambda s, b, h, i, j: ReturnsItsArgument.apply(s), "score")


def test_a_function_of_the_callers_around_a_call_is_no_part_of_the_mod():
    query = torch.randn(1, 1, 12, 4, requires_grad=True)
    assert Around.apply(query).shape == query.shape
    out = checkpoint(lambda x: flex_attention(x, x, x, lambda s, b, h, i, j: s * 1.41 + i), query, use_reentrant=True)
    assert out is not None
    out.sum().backward()
    assert query.grad is not None


def asks_autograd(call):
    def mod(s, b, h, i, j):
        y = s * table[i]
        call(y)
        return y

    return mod


@pytest.mark.parametrize(
    ("name", "call"),
    {
        "register_hook": lambda y: y.register_hook(lambda grad: 2 * grad),
        "retain_grad": lambda y: y.retain_grad(),
        "requires_grad_": lambda y: y.requires_grad_(False),
        "backward": lambda y: y.backward(),
    }.items(),
)
def test_autograd_cannot_be_asked_within_a_mod(name, call):
    with pytest.raises(TraceError, match=rf"calls {name}\(\), at .*test_stops.py:.*detach"):
        flex_attention(q, k, v, asks_autograd(call))


def test_a_checkpoint_within_a_mod_changes_nothing():
    def mod(s, b, h, i, j):
        return checkpoint(lambda x: torch.tanh(x * table[i]), s, use_reentrant=False)

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    got = torch.autograd.grad(flex_attention(*leaves, mod).square().sum(), [*leaves, table])
    out = flex_attention(*leaves, lambda s, b, h, i, j: torch.tanh(s * table[i]))
    for a, b in zip(got, torch.autograd.grad(out.square().sum(), [*leaves, table]), strict=True):
        assert torch.equal(a, b)


def test_a_profiler_at_work_goes_on_and_sees_the_refusal_too():
    import cProfile
    import pstats

    profiler = cProfile.Profile()
    profiler.enable()
    try:
        with pytest.raises(TraceError, match="calls a torch.autograd.Function"):
            trace(lambda s, b, h, i, j: ReturnsItsArgument.apply(s), "score")
        trace(lambda s, b, h, i, j: s * 1.5, "score")
        quiet(torch.ones(1))
    finally:
        profiler.disable()
    assert any(name == "quiet" for _, _, name in pstats.Stats(profiler).stats)  # type: ignore[attr-defined]
    assert sys.getprofile() is None
    calls = []

    def watch(frame, event, called):
        calls.append(event)

    sys.setprofile(watch)
    try:
        trace(lambda s, b, h, i, j: s * 2.5, "score")
        quiet(torch.ones(1))
        assert sys.getprofile() is watch and calls
    finally:
        sys.setprofile(None)
