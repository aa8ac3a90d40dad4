"""torch.nn.functional's pointwise activations in the program's operations, in the form that PyTorch computes them in.

A choice is a `where`, and its condition is such that the derivative at the edge is PyTorch's: there the branch counts that
is taken.
"""

from __future__ import annotations

import math

import torch
from torch.torch_version import TorchVersion

from flexref.program.terms import Term, op, rows, where

# until 2.13 what lies at a bound, or is as great as the other, had the whole derivative of clamp, fmax and fmin
SHARED_TIES = TorchVersion(torch.__version__) >= "2.14"


def clamp(x: Term, low=None, high=None, **_) -> Term:
    """By selection, so that the derivative at a bound is that of this PyTorch: of a number 1 or 0, of a tensor 1 or shared."""
    if SHARED_TIES and any(isinstance(bound, Term) for bound in (low, high)):
        x = x if low is None else op("maximum", x, low)
        return x if high is None else op("minimum", x, high)
    return _between(x, low, high, passes=not SHARED_TIES)


def hardtanh(x: Term, low: float = -1, high: float = 1, **_) -> Term:
    """A clamp whose derivative at a bound is 0."""
    return _between(x, low, high, passes=False)


def _between(x: Term, low, high, passes: bool) -> Term:
    """`passes`: at a bound the derivative is x's own."""
    if low is not None:
        x = where(x < low if passes else x <= low, low, x)
    return x if high is None else where(x > high if passes else x >= high, high, x)


def relu(x: Term, **_) -> Term:
    return where(x <= 0, 0, x)


def silu(x: Term, **_) -> Term:
    return x * op("sigmoid", x)


def gelu(x: Term, approximate="none", **_) -> Term:
    half = x * 0.5
    if approximate == "tanh":
        inner = (x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)
        return half * (op("tanh", inner) + 1.0)
    return half * (op("erf", x * math.sqrt(0.5)) + 1.0)


def leaky_relu(x: Term, slope=0.01, **_) -> Term:
    return where(x > 0, x, x * slope)


def elu(x: Term, alpha=1.0, scale=1.0, input_scale=1.0, **_) -> Term:
    scaled = _times(x, input_scale)
    # the derivative of expm1 is expm1 + 1, which keeps no digit far below 0
    low = where(scaled < -1.0, op("exp", scaled) - 1.0, op("expm1", scaled))
    return where(x > 0, _times(x, scale), _times(low, alpha * scale))


def celu(x: Term, alpha=1.0, **_) -> Term:
    return elu(x, alpha, 1.0, 1.0 / alpha)


def _times(x: Term, factor: float) -> Term:
    return x if factor == 1 else x * factor


def softplus(x: Term, beta=1.0, threshold=20.0, **_) -> Term:
    scaled = _times(x, beta)
    return where(scaled > threshold, x, _times(op("log1p", op("exp", scaled)), 1.0 / beta))


def mish(x: Term, **_) -> Term:
    return x * op("tanh", softplus(x))


def hardsigmoid(x: Term, **_) -> Term:
    return hardtanh(x + 3.0, 0.0, 6.0) / 6.0


def hardswish(x: Term, **_) -> Term:
    return where(x <= -3.0, x * 0.0, where(x >= 3.0, x, x * (x + 3.0) / 6.0))


def hardshrink(x: Term, bound=0.5, **_) -> Term:
    return where((x >= -bound) & (x <= bound), 0.0, x)


def softshrink(x: Term, bound=0.5, **_) -> Term:
    return where(x > bound, x - bound, where(x < -bound, x + bound, x * 0.0))


def threshold(x: Term, bound, value, **_) -> Term:
    return where(x <= bound, value, x)


ACTIVATIONS = rows(
    hardtanh=hardtanh,
    relu=relu,
    silu=silu,
    gelu=gelu,
    leaky_relu=leaky_relu,
    elu=elu,
    celu=celu,
    softplus=softplus,
    mish=mish,
    # what autograd asks for
    tanh_backward=lambda grad, result, **_: grad * (1.0 - result * result),
    sigmoid_backward=lambda grad, result, **_: grad * (1.0 - result) * result,
    hardsigmoid=hardsigmoid,
    hardswish=hardswish,
    hardshrink=hardshrink,
    softshrink=softshrink,
    threshold=threshold,
)
