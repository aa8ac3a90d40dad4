"""Every pointwise function of PyTorch in a mod, beside PyTorch's own: values and gradients over the whole range of numbers."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from emitted_table import run
from operations_table import ONE, PAIRS, POINTS, TWO
from torch import Tensor

from flexref.arguments import prepare
from flexref.autograd import attend
from flexref.errors import TraceError
from flexref.program.activations import SHARED_TIES
from flexref.program.derive import derive
from flexref.program.interpret import interpret
from flexref.program.trace import Traced, trace
from flexref.reference import einsum

# where the sum of a function's own terms is much more than the result, as near a zero; in float64 PyTorch's is off by 5e-11
SLACK = {"lgamma": 2**-21, "digamma": 2**-21, "special.psi": 2**-21, "special.gammaln": 2**-21}
# PyTorch's float64 gradient is the one that is off: constants of 24 bits, a trigamma of 9 digits, a difference of equals
OFF_IN_PYTORCH = {"F.hardsigmoid", "celu 0.7", "digamma", "special.psi", "sinc", "special.sinc"}


def points(count: int) -> list[Tensor]:
    rows = [(x,) for x in POINTS] if count == 1 else PAIRS
    return [torch.tensor(column, dtype=torch.float32) for column in zip(*rows, strict=True)]


XS = {1: points(1), 2: points(2)}
TABLE = [*((name, f, 1) for name, f in ONE.items()), *((name, f, 2) for name, f in TWO.items())]


def traced(function, count: int, dtype: torch.dtype) -> Traced:
    """The function as a mod; its second number is an element of a captured tensor."""
    second = XS[2][1].to(dtype)
    if count == 1:
        return trace(lambda s, b, h, q, k: function(s), "score", dtype)
    return trace(lambda s, b, h, q, k: function(s, second[q]), "score", dtype)


def derivative(mod: Traced):
    return derive(mod.graph, tuple(i for i in mod.graph.loads if mod.graph.nodes[i].type == "float"))


def by_pytorch(function, xs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The values, and the gradients by each argument where PyTorch has them."""
    leaves = [x.to(dtype).clone().requires_grad_() for x in xs]
    y = function(*leaves)
    gradients: tuple = (None,) * len(xs)
    if y.requires_grad:
        try:
            gradients = torch.autograd.grad(y.sum(), leaves, allow_unused=True)
        except RuntimeError as error:
            assert "not implemented" in str(error)
            return [y.detach()]
    return [y.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True))]


def by_program(mod: Traced, xs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    n = len(xs[0])
    inputs = {"score": xs[0].to(dtype), "q_idx": torch.arange(n), "grad": torch.ones(n, dtype=dtype)}
    results = [interpret(graph, inputs, mod.captured, mod.scalars, dtype) for graph in (mod.graph, derivative(mod))]
    return [x.expand(n) for result in results for x in result.values()]


def kind(x: Tensor) -> Tensor:
    return torch.isposinf(x) * 1 + torch.isneginf(x) * 2 + torch.isnan(x) * 3


def judge(name: str, got: list[Tensor], plain: list[Tensor], exact: list[Tensor], xs: list[Tensor]) -> None:
    """Twice PyTorch's own error and eight roundings; a gradient counts where the value is finite.

    Where it is not, R5 and R7 say what gradients are. In float64 PyTorch stands in for the truth.
    """
    double = got[0].dtype == torch.float64
    counts = torch.ones(len(xs[0]), dtype=torch.bool)
    for i, (a, b, c) in enumerate(zip(got, plain, exact, strict=False)):
        if i and double and name in OFF_IN_PYTORCH:
            continue
        a, b, c = a.double(), b.double(), c.double()
        decided = counts & (kind(b) == kind(c))
        budget = 2 * (b - c).abs() + 8 * torch.finfo(got[0].dtype).eps / 2 * c.abs() + torch.finfo(got[0].dtype).tiny
        budget += (1e-10 if name in SLACK else 2**-50) if double else SLACK.get(name, 0.0)
        wrong = decided & ((kind(a) != kind(c)) | (c.isfinite() & ((a - c).abs() > budget)))
        if i:
            # from 2.14 on PyTorch gives fmax and fmin of a number and NaN a gradient to both
            wrong &= ~(sum(x.isnan() for x in xs) > 0) if SHARED_TIES and name in ("fmax", "fmin") else True
            wrong &= ~torch.tensor([(name, *pair) in UNDEFINED for pair in zip(*(x.tolist() for x in xs), strict=True)])
        places = wrong.nonzero().flatten().tolist()
        told = [f"at {[x[j].item() for x in xs]}: {a[j]}, PyTorch {b[j]}, float64 {c[j]}" for j in places]
        assert not told, f"{name}, {'value' if i == 0 else f'gradient {i}'}: {told[:8]}"
        counts = counts & b.isfinite() & c.isfinite()


# 0 times log 0 is 0 by definition, a branch of its own: its derivative is 0 here and 0 / 0 or infinite in PyTorch
UNDEFINED = {
    *(("xlogy", x, y) for x in (0.0, -0.0) for y in (0.0, -0.0, math.inf)),
    *(("special.xlog1py", x, y) for x in (0.0, -0.0) for y in (-1.0, math.inf)),
    # by its series a tiny number has a gradient, -pi^2 x / 3, where PyTorch's difference of equals gives 0
    *((name, x) for name in ("sinc", "special.sinc") for x in XS[1][0].tolist() if 0 < abs(x) < 1e-3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "function", "count"), TABLE, ids=[row[0] for row in TABLE])
def test_a_function_in_a_mod_is_pytorchs(name, function, count, dtype):
    xs = XS[count]
    plain = by_pytorch(function, xs, dtype)
    judge(name, by_program(traced(function, count, dtype), xs, dtype), plain, by_pytorch(function, xs, torch.float64), xs)


def test_the_derivative_of_sinc_near_0():
    """PyTorch's is a difference of equal numbers there."""
    mod = traced(torch.sinc, 1, torch.float32)
    x = torch.tensor([0.0, 1e-30, 1e-3, -1e-3])
    got = interpret(derivative(mod), {"score": x, "grad": torch.ones(4)})["score"]
    torch.testing.assert_close(got, -(math.pi**2) * x / 3, rtol=1e-5, atol=0)


def test_the_trigamma_function():
    mod = traced(torch.digamma, 1, torch.float64)
    got = interpret(derivative(mod), {"score": torch.ones(1).double(), "grad": torch.ones(1).double()}, acc_dtype=torch.float64)
    torch.testing.assert_close(got["score"], torch.tensor([math.pi**2 / 6], dtype=torch.float64), rtol=1e-15, atol=0)


# one of each operation, and of each composition whose parts are not in it already
EMITTED = """acos acosh asin asinh atan atanh cos cosh erf erfc exp exp2 expm1 lgamma log log2 log1p rsqrt sigmoid sign
sin sinc sinh sqrt tan tanh trunc floor ceil round selu logit nan_to_num tests signs F.gelu F.softplus F.mish F.silu
special.entr add div atan2 fmod remainder floor_divide hypot copysign logaddexp xlogy maximum minimum pow where""".split()


def test_the_emitted_functions_are_pytorchs():
    """The same, of what the numba_cpu engine compiles, in vectors as in its kernels."""
    for count in (1, 2):
        rows = [(name, f) for name, f, n in TABLE if n == count and name in EMITTED]
        mods = [traced(f, count, torch.float32) for _, f in rows]
        graphs = [graph for mod in mods for graph in (mod.graph, derivative(mod))]
        results = iter(run(graphs, XS[count], torch.float32))
        for (name, f), mod in zip(rows, mods, strict=True):
            got = [next(results) for _ in range(1 + len(derivative(mod).outputs))]
            plain, exact = (by_pytorch(f, XS[count], dtype) for dtype in (torch.float32, torch.float64))
            judge(name, got, plain, exact, XS[count])


@pytest.mark.parametrize("engine", ["numba_cpu", "triton", "cupy", "numba_cuda"])
def test_every_engine_has_the_operations(engine):
    module = importlib.import_module(f"flexref.backends.{engine}")
    backend = module if engine == "numba_cpu" else module.emulated()
    if backend.unavailable():
        pytest.skip("; ".join(backend.unavailable()))
    torch.manual_seed(0)
    leaves = [torch.randn(1, 1, 12, 16).requires_grad_() for _ in range(3)]
    table = torch.randn(12).requires_grad_()

    def mod(s, b, h, i, j, harmless=lambda condition, x: x):
        y = torch.hypot(s, table[j]) + torch.copysign(table[i], s) + torch.erfc(s) + torch.lgamma(s * s + 0.5) * 0.1
        y = y + torch.logaddexp(s, table[j]) + torch.nn.functional.elu(s * 90) * 0.01
        return torch.where(s < 0.5, torch.sqrt(harmless(s < 0.5, 0.5 - s)), y)

    def for_pytorch(*at):
        return mod(*at, harmless=lambda condition, x: torch.where(condition, x, 1.0))

    results = (attend(backend, *prepare(*leaves, mod)).out, einsum(*leaves, for_pytorch).out)
    for got, want in zip(*((x, *torch.autograd.grad(x.square().sum(), [*leaves, table])) for x in results), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


REFUSED = {
    "erfinv": (torch.erfinv, "the operator erfinv"),
    "i0": (torch.i0, "the operator i0"),
    "ndtri": (torch.special.ndtri, "the operator special_ndtri"),
    "log_ndtr": (torch.special.log_ndtr, "the operator special_log_ndtr"),
    "angle": (torch.angle, "the operator angle"),
    "zeta": (lambda x: torch.special.zeta(x, x), "the operator special_zeta"),
    "igamma": (lambda x: torch.igamma(x, x), "the operator igamma"),
    "nextafter": (lambda x: torch.nextafter(x, x), "the operator nextafter"),
    "rrelu": (torch.nn.functional.rrelu, "rrelu"),
    "softmax": (lambda x: torch.softmax(x, 0), "softmax()"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_engine_has_is_refused_by_its_name(name):
    function, says = REFUSED[name]
    with pytest.raises(TraceError) as error:
        trace(lambda s, b, h, q, k: function(s), "score")
    assert says in str(error.value) and "Instead: " in str(error.value), str(error.value)


bytes_ = torch.tensor([200, 7, 255, 64], dtype=torch.uint8)
shorts = torch.tensor([-5, 7, 300, 64], dtype=torch.int16)


@pytest.mark.parametrize(
    "mod",
    [
        lambda s, b, h, q, k: s + (bytes_[q] & bytes_[k]),
        lambda s, b, h, q, k: s + (bytes_[q] | 9) + (bytes_[k] ^ 255),
        lambda s, b, h, q, k: s + (shorts[q] & -4) + torch.maximum(shorts[q], shorts[k]),
    ],
)
def test_small_integers_are_combined_where_nothing_can_wrap(mod):
    x = {"score": torch.zeros(4), "q_idx": torch.arange(4), "kv_idx": torch.tensor([1, 2, 3, 0])}
    traced_mod = trace(mod, "score")
    got = interpret(traced_mod.graph, x, traced_mod.captured, traced_mod.scalars)["out"]
    assert torch.equal(got, mod(x["score"], 0, 0, x["q_idx"], x["kv_idx"]))


@pytest.mark.parametrize(
    "mod",
    [
        lambda s, b, h, q, k: s + bytes_[q] + (bytes_[q] + bytes_[k]),
        lambda s, b, h, q, k: s + ~bytes_[q],
        lambda s, b, h, q, k: s + (bytes_[q] | -1),
        lambda s, b, h, q, k: s + k.to(torch.uint16),
    ],
)
def test_what_could_wrap_is_refused(mod):
    with pytest.raises(TraceError, match="it gives torch.uint.*int64"):
        trace(mod, "score")
