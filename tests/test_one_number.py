"""Within a mod there is one float and one integer (R1), also in its work on whole tensors: in programs, masks, the reference."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor

from flexref import TraceError, create_block_mask, create_mask, flex_attention
from flexref.program.mods import traced_mod
from flexref.reference import at_each_position

N = 6
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
ACC = [torch.float32, torch.float64]
# what wraps in few bits, or becomes a float
OF_INTEGERS = {
    "a - 1": lambda a: a - 1,
    "a * 2": lambda a: a * 2,
    "-a": operator.neg,
    "~a": operator.invert,
    "a << 3": lambda a: a << 3,
    "a * a * a * a": lambda a: a * a * a * a,
    "a.sum(0)": lambda a: torch.stack([a] * 9).sum(0),
    "cumsum": lambda a: a.cumsum(0),
    "a + a.flip(0)": lambda a: a + a.flip(0),
    "a.int() * a": lambda a: a.int() * a,
    "a / 7": lambda a: a / 7,
    "true_divide by name": lambda a: torch.true_divide(input=a, other=7),
    "sqrt": lambda a: a.abs().sqrt(),
    "where": lambda a: torch.where(a > 3, 0.1, 0.7),
}
OF_FLOATS = {
    "exp": lambda a: a.exp(),
    "a * a": lambda a: a * a,
    "a.bfloat16()": lambda a: a.bfloat16(),
    "a.to(float16) + 1": lambda a: a.to(torch.float16) + 1,
    "a.double().exp()": lambda a: a.double().exp(),
    "matrix": lambda a: torch.outer(a, a) @ a,
    "softmax": lambda a: a.softmax(0),
    "type_as": lambda a: a.type_as(torch.ones(1, dtype=torch.bfloat16)) * 3,
    "linspace": lambda a: a * torch.linspace(0, 1, N),
    "a list": lambda a: a * torch.tensor([0.1] * N),
    "arange / 7": lambda a: a + torch.arange(N) / 7,
}


def extreme(dtype: torch.dtype) -> Tensor:
    limits = torch.iinfo(dtype)
    small = torch.tensor([0, 1, 5, limits.max // 2 + 1, limits.max, limits.min])
    # 64 bits are all that there are
    return small.clamp(-(2**14), 2**14) if dtype == torch.int64 else small.to(dtype)


def numbers(dtype: torch.dtype) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def wanted(work, tensor: Tensor, acc: torch.dtype, monkeypatch) -> Tensor:
    """The work on a tensor that was widened before, where PyTorch's own widths are the one float and integer."""
    with monkeypatch.context() as patch:
        # conversions to other floats are to this one
        for name in ("bfloat16", "double"):
            patch.setattr(Tensor, name, lambda x: x.to(acc))
        patch.setattr(Tensor, "type_as", lambda x, other: x)
        patch.setattr(Tensor, "int", lambda x: x.long())
        real = Tensor.to
        patch.setattr(Tensor, "to", lambda x, to: real(x, acc if to.is_floating_point else to))
        before = torch.get_default_dtype()
        torch.set_default_dtype(acc)
        try:
            return work(real(tensor, acc if tensor.is_floating_point() else torch.int64))
        finally:
            torch.set_default_dtype(before)


TABLE = [(name, work, extreme(dtype)) for name, work in OF_INTEGERS.items() for dtype in INTEGERS] + [
    (name, work, numbers(dtype)) for name, work in OF_FLOATS.items() for dtype in FLOATS
]


@pytest.mark.parametrize("acc", ACC)
@pytest.mark.parametrize(("work", "tensor"), [pytest.param(w, t, id=f"{n}, {t.dtype}") for n, w, t in TABLE])
def test_work_on_whole_tensors_is_in_the_one_float_and_the_one_integer(work, tensor, acc, monkeypatch):
    want = wanted(work, tensor, acc, monkeypatch)
    mod = lambda s, b, h, i, j: s + work(tensor)[j]  # noqa: E731
    for _ in range(2):
        # traced, and then made again by the recipe of the kept program
        (read,) = traced_mod(mod, "score", acc).captured
        assert torch.equal(read.to(acc), want.to(acc))
    at = torch.arange(N)
    reference = at_each_position(lambda s, b, h, i, j: work(tensor)[j], acc)
    assert torch.equal(reference(at.to(acc), at, at, at, at).to(acc), want.to(acc))


@pytest.mark.parametrize("acc", ACC)
@pytest.mark.parametrize("tensor", [numbers(dtype) for dtype in FLOATS], ids=lambda t: str(t.dtype))
def test_a_mask_is_decided_in_the_one_float_whoever_is_asked(tensor, acc, monkeypatch):
    """At the boundary: each compares with what the one float makes of the same number."""
    square = wanted(lambda a: a * a * 3, tensor, acc, monkeypatch)
    edge = float(square[2])
    mod = lambda b, h, i, j: (tensor * tensor * 3)[j] >= edge  # noqa: E731
    want = (square >= edge).expand(N, N)
    query = torch.eye(N, dtype=acc)[None, None]
    for backend in ("numba_cpu", "reference"):
        out = flex_attention(query, query, query, mask_mod=mod, scale=1.0, backend=backend)
        assert torch.equal(out[0, 0] > 0, want)
    if acc == torch.float32:
        assert torch.equal(create_mask(mod, 1, 1, N, N, device="cpu")[0, 0], want)
        assert torch.equal(create_block_mask(mod, 1, 1, N, N, "cpu", 1).to_dense()[0, 0].bool(), want)


def test_a_mask_traced_or_asked_is_the_same(monkeypatch):
    from flexref.blocks import build

    half = torch.randn(300, generator=torch.Generator().manual_seed(1)).bfloat16()
    edge = float((half[7] * half[7]).float())
    # in bfloat16 the square of half[7] is this edge, in float32 it is not
    mod = lambda b, h, i, j: (half[i] * half[j] > edge) | ((half * half)[j] == edge)  # noqa: E731
    monkeypatch.setattr(build, "_WORTH_TRACING", -1)
    traced = create_block_mask(mod, 1, 1, 300, 300, "cpu", 16)
    monkeypatch.setattr(build, "_WORTH_TRACING", 1 << 60)
    assert torch.equal(traced.to_dense(), create_block_mask(mod, 1, 1, 300, 300, "cpu", 16).to_dense())
    dense = create_mask(mod, 1, 1, 300, 300, device="cpu")
    wide = half.float()
    assert torch.equal(dense[0, 0], (wide[:, None] * wide > edge) | (wide * wide == edge))


HALF = torch.ones(N, dtype=torch.bfloat16)
BYTE = torch.ones(N, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("mod", "factor"),
    [
        (lambda s, b, h, i, j: s * 2 if HALF.dtype == torch.bfloat16 else s, 2),
        (lambda s, b, h, i, j: s * BYTE.itemsize * HALF.element_size(), 2),
        (lambda s, b, h, i, j: s * (torch.finfo(HALF.dtype).eps * 2**8), 2),
        (lambda s, b, h, i, j: s * (torch.iinfo(BYTE.dtype).max - 253), 2),
        (lambda s, b, h, i, j: s * 2 if HALF[j].dtype == torch.float32 else s, 2),
    ],
)
def test_a_captured_tensor_is_asked_for_its_own_dtype(mod, factor):
    query = torch.randn(1, 1, N, 4)
    want = flex_attention(query, query, query, scale=0.5 * factor)
    for backend in ("numba_cpu", "reference"):
        torch.testing.assert_close(flex_attention(query, query, query, mod, backend=backend), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "mod",
    [
        lambda s, b, h, i, j: s + s // (j + 0.3),
        lambda s, b, h, i, j: s * 2 + 0.3 // s.exp(),
        lambda s, b, h, i, j: s * 2 + torch.floor_divide(input=s, other=0.3),
        lambda s, b, h, i, j: s * 2 + torch.heaviside(s, torch.tensor(0.5)),
        lambda s, b, h, i, j: s + torch.div(input=j, other=7),
        lambda s, b, h, i, j: s + torch.mul(input=j, other=0.1),
    ],
)
def test_steps_have_the_derivative_0_and_arguments_may_be_named(mod, dtype):
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, N, 4, generator=random, dtype=dtype) for _ in range(3))
    got = []
    for backend in ("numba_cpu", "reference"):
        leaf = query.clone().requires_grad_()
        out = flex_attention(leaf, key, value, mod, backend=backend)
        out.sum().backward()
        got.append(torch.cat([out.detach(), leaf.grad]))
    torch.testing.assert_close(*got)


def caught(f):
    try:
        return f()
    except Exception:
        return 1.0


FLOAT = torch.ones(N)
GRADED = torch.ones(N, requires_grad=True)
GRADED.grad = torch.ones(N)


def under_autocast(f):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return f()


REFUSED = {
    "bits": (lambda s, b, h, i, j: s + BYTE.view(torch.int8)[j], r"calls view\(dtype\)"),
    "a refusal caught": (lambda s, b, h, i, j: s * caught(lambda: float(FLOAT[0])), r"calls float\(\)"),
    "a branch caught": (lambda s, b, h, i, j: s * caught(lambda: 2.0 if i > j else 3.0), r"calls bool\(\)"),
    "an operator caught": (lambda s, b, h, i, j: s + caught(lambda: torch.special.zeta(s, s)), "zeta"),
    "a row caught": (
        lambda s, b, h, i, j: s + caught(lambda: torch.outer(FLOAT, FLOAT)[i] * 2),
        "with 1 of its 2 indices",
    ),
    "written by out=": (lambda s, b, h, i, j: s + torch.mul(FLOAT, 2.0, out=FLOAT)[j], "calls mul.. with out=, inplace="),
    "written by inplace=": (lambda s, b, h, i, j: s + torch.nn.functional.relu(FLOAT, inplace=True)[j], "calls relu.. with out="),
    "randperm": (lambda s, b, h, i, j: s + torch.randperm(N)[j], "cannot draw random numbers"),
    "gumbel": (lambda s, b, h, i, j: s + torch.nn.functional.gumbel_softmax(FLOAT, 1.0)[j], "cannot draw random numbers"),
    "its gradient": (lambda s, b, h, i, j: s + GRADED.grad[j],  # type: ignore[index]
        "asks a captured tensor for grad"),
    "autocast": (lambda s, b, h, i, j: s + under_autocast(lambda: torch.outer(FLOAT, FLOAT) @ FLOAT)[j], "turns autocast on"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_program_cannot_say_is_refused_also_if_the_mod_catches_it(name):
    mod, says = REFUSED[name]
    query = torch.randn(1, 1, N, 4)
    for backend in ("numba_cpu", "reference"):
        with pytest.raises(TraceError, match=says):
            flex_attention(query, query, query, mod, backend=backend)


def test_autocast_of_the_caller_chooses_no_float_within_a_mod():
    query = torch.randn(1, 1, N, 4)
    weights = torch.randn(N, N)
    mod = lambda s, b, h, i, j: s + (weights @ weights)[i, j]  # noqa: E731
    want = flex_attention(query.bfloat16(), query.bfloat16(), query.bfloat16(), mod)
    for backend in ("numba_cpu", "reference"):
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = flex_attention(query, query, query, mod, backend=backend)
            torch.testing.assert_close(out, want)


def test_fewer_digits_in_products_of_matrices_are_not_for_a_mod():
    query = torch.randn(1, 1, N, 4)
    weights = torch.randn(256, 256)
    mod = lambda s, b, h, i, j: s + (weights @ weights)[i, j]  # noqa: E731
    want = flex_attention(query, query, query, mod)
    torch.set_float32_matmul_precision("medium")
    try:
        for backend in ("numba_cpu", "reference"):
            torch.testing.assert_close(flex_attention(query, query, query, mod, backend=backend), want)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
