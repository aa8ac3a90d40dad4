"""Every pointwise function of PyTorch that a mod may call, as a table, and the numbers at which it is looked at."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F

S = torch.special
_POSITIVE = [
    0.0, 1e-42, 1e-30, 1e-3, 0.3, 0.5, 0.999, 1.0, 1.5, 2.0, 2.5, 3.0, 6.0, 7.3, 20.0, 20.5, 88.0, 89.0, 100.0, 1e4, 1e19,
    1e30, 3.4e38,
]  # fmt: skip
POINTS = [*_POSITIVE, *(-x for x in _POSITIVE), math.inf, -math.inf, math.nan]
_FEW = [0.0, 1e-30, 0.3, 1.0, 2.5, 89.0, 1e30, math.inf]
PAIRS = list(itertools.product([*_FEW, *(-x for x in _FEW), math.nan], repeat=2))

ONE = {
    **{name: getattr(torch, name) for name in """abs acos acosh asin asinh atan atanh ceil cos cosh erf erfc exp exp2 expm1 floor
    frac lgamma log log10 log1p log2 neg positive reciprocal relu round rsqrt sgn sigmoid sign sin sinc sinh sqrt square tan
    tanh trunc deg2rad rad2deg nan_to_num digamma logit selu celu""".split()},
    **{f"special.{name}": getattr(S, name) for name in """entr expit ndtr exp2 expm1 erf erfc log1p sinc psi
    gammaln""".split()},
    **{f"F.{name}": getattr(F, name) for name in """elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid
    mish relu6 silu softplus softshrink softsign tanhshrink""".split()},
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "elu 0.7": lambda x: F.elu(x, 0.7),
    "celu 0.7": lambda x: F.celu(x, 0.7),
    "softplus 3 5": lambda x: F.softplus(x, 3.0, 5.0),
    "threshold": lambda x: F.threshold(x, 0.3, -2.0),
    "logit eps": lambda x: torch.logit(x, 1e-3),
    "clamp": lambda x: torch.clamp(x, -1.0, 2.5),
    "clamp min": lambda x: x.clamp(min=0.3),
    "clamp max": lambda x: x.clamp_max(1.0),
    "round decimals": lambda x: torch.round(x, decimals=2),
    "nan_to_num given": lambda x: torch.nan_to_num(x, 1.0, 2.0, -3.0),
    "power 2": lambda x: x**2,
    "power 3": lambda x: x**3,
    "power -1": lambda x: x**-1,
    "power 0.5": lambda x: x**0.5,
    "power 0": lambda x: x**0,
    "power of 2": lambda x: 2.0**x,
    "float_power": lambda x: torch.float_power(x, 2.0).to(x.dtype),
    "tests": lambda x: torch.isfinite(x) * 1.0 + torch.isposinf(x) * 2 + torch.isneginf(x) * 4 + torch.isnan(x) * 8,
    "signs": lambda x: torch.signbit(x) * 1.0 + torch.isinf(x) * 2,
    "heaviside": lambda x: torch.heaviside(x, torch.tensor(0.25, dtype=x.dtype)),
    "ldexp": lambda x: torch.ldexp(x, torch.tensor(3)),
    "rsub": lambda x: torch.rsub(x, 3.0),
}  # fmt: skip

TWO = {
    **{name: getattr(torch, name) for name in """add sub mul div atan2 fmod remainder floor_divide hypot copysign logaddexp
    logaddexp2 xlogy maximum minimum fmax fmin pow""".split()},
    "special.xlog1py": S.xlog1py,
    "div trunc": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "lerp 0.7": lambda x, y: torch.lerp(x, y, 0.7),
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.5),
    "addcdiv": lambda x, y: torch.addcdiv(x, x, y, value=0.5),
    "lerp weight": lambda x, y: torch.lerp(x, y, torch.sigmoid(x)),
    "rsub 2": lambda x, y: torch.rsub(x, y, alpha=2),
    "where": lambda x, y: torch.where(x > y, x, y * 2),
    "masked_fill": lambda x, y: x.masked_fill(x > y, 0.5),
    "signbit": lambda x, y: torch.where(torch.signbit(x), x, y),
}  # fmt: skip
