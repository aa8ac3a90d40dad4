"""Functions of PyTorch that no language has, in the program's operations, each exact over the whole range of its type."""

from __future__ import annotations

import math

from flexref.program.activations import SHARED_TIES
from flexref.program.terms import Term, op, rows, where

_INF = float("inf")


def logaddexp(a: Term, b: Term, **_) -> Term:
    """Equal arguments are told apart first: inf - inf is no distance."""
    distance = where(_equal_infinities(a, b), 0.0, abs(a - b))
    return op("maximum", a, b) + op("log1p", op("exp", -distance))


def logaddexp2(a: Term, b: Term, **_) -> Term:
    distance = where(_equal_infinities(a, b), 0.0, abs(a - b))
    return op("maximum", a, b) + op("log1p", op("exp2", -distance)) * (1 / math.log(2.0))


def _equal_infinities(a: Term, b: Term) -> Term:
    return a.equals(b) & op("isinf", a)


def xlogy(x: Term, y: Term, **_) -> Term:
    return _times_log(x, y, op("log", op("add", y, 0.0)), y <= 0.0 if isinstance(y, Term) else y <= 0)


def xlog1py(x: Term, y: Term, **_) -> Term:
    return _times_log(x, y, op("log1p", y), y <= -1.0)


def _times_log(x: Term, y: Term, log: Term, outside: Term) -> Term:
    """x log, which is 0 where x is, also where log is infinite; elsewhere its derivative at x = 0 is log."""
    nothing = op("eq", x, 0.0) & (outside | y.equals(_INF))
    return where(nothing, 0.0, x * log)


def entr(x: Term, **_) -> Term:
    """The square root is 0 at 0, and its derivative is infinite, as this one's is."""
    return where(x > 0.0, -x * op("log", x), where(x.equals(0.0), op("sqrt", x + 0.0), where(x < 0.0, -_INF, x)))


def logit(x: Term, eps=None, **_) -> Term:
    if eps is not None:
        x = where(x < eps, eps, where(x > 1.0 - eps, 1.0 - eps, x))
    return op("log", x / (1.0 - x))


def sinc(x: Term, **_) -> Term:
    """By its series near 0, where the quotient's derivative would lose all its digits."""
    t = x * math.pi
    square, series = t * t, None
    for n in (110, 72, 42, 20, 6):
        series = 1.0 - square / n if series is None else 1.0 - square / n * series
    assert series is not None
    return where(abs(t) < 0.25, series, op("sin", t) / t)


def ndtr(x: Term, **_) -> Term:
    """From erfc, which keeps its digits where erf is close to -1."""
    return op("erfc", x * -math.sqrt(0.5)) * 0.5


def digamma(x: Term, **_) -> Term:
    """Reflected to x > 0, raised to x >= 10 step by step, and then by the asymptotic series."""
    reflected = x < 0.0
    y = where(reflected, 1.0 - x, x)
    total = None
    for _ in range(10):
        low = y < 10.0
        step = where(low, 1.0 / y, 0.0)
        total = step if total is None else total + step
        y = where(low, y + 1.0, y)
    assert total is not None
    z, series = 1.0 / (y * y), None
    for c in (1 / 12, -691 / 32760, 1 / 132, -1 / 240, 1 / 252, -1 / 120, 1 / 12):
        series = c * z if series is None else (series + c) * z
    assert series is not None
    value = op("log", y) - 0.5 / y - series - total
    turn = x - op("round", x)
    value = where(reflected, value - math.pi / op("tan", turn * math.pi), value)
    pole = x.equals(0.0)
    return where(reflected & turn.equals(0.0), float("nan"), where(pole, op("copysign", -_INF, -op("copysign", 1.0, x)), value))


def round_to(x: Term, decimals=0, **_) -> Term:
    """To so many decimals; a whole number stays as it is."""
    if x.type != "float":
        return x
    if decimals == 0:
        return op("round", x)
    power = 10.0 ** abs(decimals)
    return op("round", x * power) / power if decimals > 0 else op("round", x / power) * power


def heaviside(x: Term, at_zero, **_) -> Term:
    return where(x.equals(0.0), at_zero, op("int_to_float", op("bool_to_int", x > 0.0)))


def signbit(x: Term, **_) -> Term:
    return op("copysign", 1.0, x) < 0.0


def fmax(a: Term, b: Term, **_) -> Term:
    """The greater, or the one that is a number."""
    if SHARED_TIES:
        return where(op("isnan", b), a, where(op("isnan", a), b, op("maximum", a, b)))
    return where((a >= b) | op("isnan", b), a, b)


def fmin(a: Term, b: Term, **_) -> Term:
    if SHARED_TIES:
        return where(op("isnan", b), a, where(op("isnan", a), b, op("minimum", a, b)))
    return where((a <= b) | op("isnan", b), a, b)


SPECIAL = rows(
    logaddexp=logaddexp,
    logaddexp2=logaddexp2,
    xlogy=xlogy,
    special_xlog1py=xlog1py,
    special_entr=entr,
    logit=logit,
    sinc=sinc,
    special_ndtr=ndtr,
    digamma=digamma,
    signbit=signbit,
    addcmul=lambda x, a, b, value=1, **_: x + a * b * value if value != 1 else x + a * b,
    addcdiv=lambda x, a, b, value=1, **_: x + a / b * value if value != 1 else x + a / b,
    round=round_to,
    heaviside=heaviside,
    isfinite=lambda x, **_: abs(x) < _INF,
    fmax=fmax,
    fmin=fmin,
    square=lambda x, **_: x * x,
    log10=lambda x, **_: op("log", x) * (1 / math.log(10.0)),
    frac=lambda x, **_: x - op("trunc", x),
    isposinf=lambda x, **_: op("eq", x, _INF),
    isneginf=lambda x, **_: op("eq", x, -_INF),
    deg2rad=lambda x, **_: op("mul", x, math.pi / 180.0),
    rad2deg=lambda x, **_: op("mul", x, 180.0 / math.pi),
)
