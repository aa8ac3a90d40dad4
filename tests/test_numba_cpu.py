"""The parts of the CPU engine: its functions against NumPy, its cache, its bits, its threads, every operation compiled."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numba import float32, float64, njit

from flexref import explain, flex_attention
from flexref.backends.numba_cpu import cache, kernels_for, launch
from flexref.backends.numba_cpu.kernels import maths
from flexref.backends.numba_cpu.kernels.machine import gemm, lanes_of, transpose
from flexref.errors import Unsupported
from flexref.reference import einsum

ROOT = Path(__file__).parent.parent


def qkv(length=70, kv_len=90, dtype=torch.float32, dim=24, heads=2, grad=False):
    torch.manual_seed(1)
    query = torch.randn(1, heads, length, dim, dtype=dtype, requires_grad=grad)
    return query, *(torch.randn(1, heads, kv_len, dim, dtype=dtype, requires_grad=grad) for _ in range(2))


@pytest.mark.parametrize("real", [float32, float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 2, 5), (128, 4, 64), (7, 3, 33), (6, 5, 3)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_gemm(real, shape, order):
    m, vectors, k = shape
    n = vectors * lanes_of(real)
    dtype = np.float32 if real is float32 else np.float64
    rng = np.random.default_rng(0)
    a, b = np.asarray(rng.standard_normal((m, k)), dtype, order=order), rng.standard_normal((k, n)).astype(dtype)
    c = rng.standard_normal((m, n)).astype(dtype)
    size = dtype().itemsize

    product = cache.addresses_of({"gemm": str(real)})["gemm"]

    @njit
    def run(a, b, c, add, row, col):
        m, n = c.shape
        gemm(product, m, n, b.shape[0], a, row, col, b.ctypes.data, n, c.ctypes.data, n, add)

    for add in (1, 0):
        want = a @ b + add * c
        run(a.ctypes.data, b, c, add, a.strides[0] // size, a.strides[1] // size)
        np.testing.assert_allclose(c, want, rtol=0, atol=40 * np.finfo(dtype).eps * k)


def test_transpose():
    a = np.random.default_rng(0).standard_normal((2 * lanes_of(float32), 3 * lanes_of(float32))).astype(np.float32)
    b = np.full(a.T.shape, np.nan, np.float32)

    swap = cache.addresses_of({"transpose": "float32"})["transpose"]

    @njit
    def run(a, b):
        transpose(swap, a.shape[0], a.shape[1], a.ctypes.data, a.shape[1], b.ctypes.data, b.shape[1])

    run(a, b)
    assert np.array_equal(b, a.T)


FUNCTIONS = {
    "exp": (np.exp, -87, 88),
    "exp2": (np.exp2, -126, 127),
    "expm1": (np.expm1, -80, 80),
    "tanh": (np.tanh, -12, 12),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_functions_are_right_to_a_few_units_in_the_last_place(name, dtype):
    exact, low, high = FUNCTIONS[name]
    function = getattr(maths, name)
    small = np.logspace(-30, 0, 500)
    x = np.concatenate([np.linspace(low, high, 20001), small, -small]).astype(dtype)

    @njit
    def run(x, y):
        for i in range(x.size):
            y[i] = function(x[i])

    y = np.empty_like(x)
    run(x, y)
    want = exact(x.astype(np.longdouble))
    units = np.abs(y - want) / (np.maximum(np.abs(want), np.finfo(dtype).tiny) * np.finfo(dtype).eps)
    assert units.max() < 5
    edges = np.array([np.nan, np.inf, -np.inf, 0.0], dtype)
    out = np.empty_like(edges)
    run(edges, out)
    np.testing.assert_array_equal(out, exact(edges))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_exponential_of_softmax(dtype):
    function = maths.exp2_small_float32 if dtype is np.float32 else maths.exp2_small_float64
    end = -126 if dtype is np.float32 else -1022
    x = np.concatenate([np.linspace(end, 0, 9001), [end - 1, -np.inf, np.nan]]).astype(dtype)

    @njit
    def run(x, y):
        for i in range(x.size):
            y[i] = function(x[i])

    y = np.empty_like(x)
    run(x, y)
    want = np.exp2(x[:-3].astype(np.longdouble))
    assert (np.abs(y[:-3] - want) / (want * np.finfo(dtype).eps)).max() < 4
    assert y[-3] == 0 and y[-2] == 0 and np.isnan(y[-1])


# operations that a mod can reach, each on values that its function is defined on
OPERATIONS = {
    "numbers": lambda s, b, h, q, k: s * 2 - s / (k + 1) + abs(s) + torch.sign(s) + (q - k) // 3 + (q - k) % 5 - (-q) % 3,
    "floats": lambda s, b, h, q, k: torch.div(s, 0.9, rounding_mode="floor") + s % 0.7 + torch.fmod(s, 0.4)
    + torch.div(s, 0.3, rounding_mode="trunc"),
    "ints": lambda s, b, h, q, k: s + torch.fmod(q - 5, 3) + torch.div(k - 7, 2, rounding_mode="trunc") + torch.sign(q - k),
    "bits": lambda s, b, h, q, k: s + (q & k) + (q | 3) - (q ^ k) + (~q) + (q << 1) - (k >> 1),
    "bools": lambda s, b, h, q, k: s * (((q > 3) & (k <= 9)) ^ ((q == k) | (q != 2))) + (~(q >= k)) + (s < 0),
    "extremes": lambda s, b, h, q, k: torch.maximum(s, q * s) + torch.minimum(k, q) * s + torch.minimum(s, -s),
    "roots": lambda s, b, h, q, k: torch.sqrt(s * s + 1) + torch.rsqrt(s * s + 1) + (s * s + 1) ** 0.3 + 1 / (s * s + 1),
    "exponentials": lambda s, b, h, q, k: torch.exp(-s * s) + torch.exp2(s) + torch.expm1(s) + torch.sigmoid(s),
    "logarithms": lambda s, b, h, q, k: torch.log(s * s + 1) + torch.log2(s * s + 1) + torch.log1p(s * s) - torch.log10(s * s),
    "angles": lambda s, b, h, q, k: torch.sin(s) + torch.cos(s) + torch.tan(s * 0.1) + torch.atan(s) + torch.atan2(s, s * s + 1),
    "inverses": lambda s, b, h, q, k: torch.asin(torch.tanh(s) * 0.9) + torch.acos(torch.tanh(s) * 0.9) + torch.erf(s),
    "hyperbolic": lambda s, b, h, q, k: torch.sinh(s * 0.1) + torch.cosh(s * 0.1) + torch.asinh(s) + torch.acosh(s * s + 1.5)
    + torch.atanh(torch.tanh(s) * 0.9),
    "roundings": lambda s, b, h, q, k: torch.floor(s) + torch.ceil(s) + torch.trunc(s) + torch.round(s) + s.long(),
    "tests": lambda s, b, h, q, k: torch.where(torch.isnan(s) | torch.isinf(s), 0.0, s),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_compiles_to_what_it_means(name):
    query, key, value = qkv(20, 30, torch.float64, 8, grad=True)
    mod = OPERATIONS[name]
    got = flex_attention(query, key, value, mod, backend="numba_cpu")
    want = einsum(query, key, value, mod).out
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(want)
    pairs = zip(*(torch.autograd.grad((x * weight).sum(), (query, key, value)) for x in (got, want)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_captured_tensors_of_every_dtype_and_rank():
    query, key, value = qkv(20, 20, torch.float64, 8)
    tables = [
        torch.randint(0, 3, (20,)).to(t) for t in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    ]
    tables += [torch.randn(20).to(t) for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)]
    flags, deep = torch.rand(20) > 0.5, torch.randn(1, 2, 20, 40)[..., ::2]

    def mod(score, b, h, q_idx, kv_idx):
        for table in tables:
            score = score + table[kv_idx] * 0.25
        return torch.where(flags[q_idx], score, score * 0.5) + deep[b, h, q_idx, kv_idx] + deep[-1, -2, -3, -4]

    torch.testing.assert_close(flex_attention(query, key, value, mod), einsum(query, key, value, mod).out)


def test_another_captured_number_or_length_needs_no_other_kernel(monkeypatch):
    built = []
    monkeypatch.setattr(cache, "_load_or_compile", _counting(cache._load_or_compile, built))

    def window(size):
        return lambda b, h, q_idx, kv_idx: (q_idx - kv_idx < size * 1) & (q_idx + 917 >= kv_idx)

    for size, length in ((5, 40), (9, 40), (70, 64), (3, 90)):
        query, key, value = qkv(length, length)
        flex_attention(query, key, value, mask_mod=window(size))
    assert len([stem for stem in built if stem.startswith("mask_tile")]) == 1


def _counting(function, calls):
    def counted(stem, *rest):
        calls.append(stem)
        return function(stem, *rest)

    return counted


def test_one_thread_and_several_give_the_same_bits():
    query, key, value = qkv(300, 300, heads=3, grad=True)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(flex_attention(query, key, value, mask_mod=lambda b, h, q, k: q >= k))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("options", [{"q_tile": 16}, {"kv_tile": 7}, {"q_tile": 33, "kv_tile": 50, "threads": 3}])
def test_tiles_do_not_change_the_meaning(options):
    query, key, value = qkv(130, 150, torch.float64)
    got = flex_attention(query, key, value, mask_mod=lambda b, h, q, k: q >= k, kernel_options=options)
    torch.testing.assert_close(got, einsum(query, key, value, None, lambda b, h, q, k: q >= k).out)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "64"])
def test_a_wrong_option_is_refused(value):
    query, key, value_ = qkv()
    with pytest.raises(Unsupported, match="option q_tile must be a positive int, got"):
        flex_attention(query, key, value_, kernel_options={"q_tile": value}, backend="numba_cpu")


def test_explain_shows_the_sources():
    query, key, value = qkv()
    problem = explain(
        query, key, value, lambda s, b, h, q, k: torch.tanh(s), mask_mod=lambda b, h, q, k: q >= k
    ).problem
    sources = kernels_for.tile_sources(problem)
    assert set(sources) == {"mask_tile", "score_tile"}
    assert "maths.tanh(score)" in sources["score_tile"] and "hole" not in sources["score_tile"]


RUN = """
import sys, torch
from flexref import flex_attention
q = torch.linspace(-1, 1, 2 * 40 * 16).reshape(1, 2, 40, 16)
out = flex_attention(q, q, q, lambda s, b, h, i, j: s + torch.tanh(s * 0.37), mask_mod=lambda b, h, i, j: i >= j)
print(repr(out.double().sum().item()), "numba.core" in sys.modules)
"""


def in_new_process(folder: Path) -> list[str]:
    environment = {**os.environ, "FLEXREF_CACHE": str(folder), "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", RUN], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_a_second_process_loads_what_the_first_compiled_and_a_damaged_file_is_made_again(tmp_path):
    first, compiled = in_new_process(tmp_path)
    files = sorted((tmp_path / "numba_cpu").glob("*_tile_*.o"))
    assert compiled == "True" and len(files) == 2
    assert all(f.with_suffix(".py").exists() for f in files)
    assert stat.S_IMODE((tmp_path / "numba_cpu").stat().st_mode) == 0o700
    assert in_new_process(tmp_path) == [first, "False"]
    files[0].write_bytes(files[0].read_bytes()[:-100])
    files[1].write_bytes(b"")
    assert in_new_process(tmp_path) == [first, "True"]
    assert in_new_process(tmp_path) == [first, "False"]


def test_weights_are_right_where_a_rows_scores_share_a_large_offset():
    query, key, value = qkv(64, 64, grad=True)
    valid = torch.arange(64) < 56

    def mod(score, b, h, q_idx, kv_idx):
        return torch.where(valid[q_idx] & (kv_idx <= q_idx), score, -1e9)

    weight = torch.randn(1, 2, 64, 24)
    (got,) = torch.autograd.grad(flex_attention(query, key, value, mod), value, weight)
    exact = einsum(query.double(), key.double(), value.double(), mod).out
    (want,) = torch.autograd.grad(exact, value, weight.double())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_views_whose_sign_is_a_note_are_read_with_it():
    complex_ = torch.complex(torch.zeros(1, 2, 20, 8), torch.randn(1, 2, 20, 8))
    x = complex_.conj().imag
    row = complex_[0, 0, :, 0].conj().imag
    assert x.is_neg() and row.is_neg()
    mod = lambda score, b, h, q_idx, kv_idx: score + row[kv_idx]  # noqa: E731
    plain = x.resolve_neg()
    torch.testing.assert_close(flex_attention(x, x, x, mod), einsum(plain, plain, plain, mod).out)


def test_a_captured_number_too_large_for_an_int():
    query, key, value = qkv(20, 20)
    lowest = torch.finfo(torch.float32).min
    got = flex_attention(query, key, value, lambda s, b, h, q, k: torch.where(k <= q, s, lowest))
    torch.testing.assert_close(got, flex_attention(query, key, value, mask_mod=lambda b, h, q, k: k <= q))


def test_half_types_are_rounded_to_nearest_even():
    value = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 65519.0, 1e-40, -0.0]).reshape(1, 1, 1, 5)
    query = torch.zeros(1, 1, 1, 4)
    for dtype in (torch.bfloat16, torch.float16):
        v = value.to(dtype)
        out = flex_attention(query.to(dtype), query.to(dtype), v)
        assert torch.equal(out, v)


def test_ordered_empty_follows_the_order_of_its_example():
    like = torch.empty(2, 3, 5, 7).transpose(1, 2)
    assert launch.ordered_empty(like, (2, 5, 3, 9)).stride() == (135, 9, 45, 1)


QUIET = """
import gc, threading, torch
from numba.core import config
from flexref import flex_attention
q = torch.linspace(-1, 1, 2 * 40 * 16).reshape(1, 2, 40, 16)
sums = []
def work():
    sums.append(flex_attention(q, q, q, lambda s, b, h, i, j: s * 0.37).double().sum().item())
threads = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in threads], [t.join() for t in threads]
print(len(sums), len(set(sums)), gc.isenabled(), int(config.OPT))
"""


def test_threads_that_compile_at_once_agree_and_leave_numba_and_the_collector_as_they_were(tmp_path):
    environment = {**os.environ, "FLEXREF_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", QUIET], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4", "1", "True", "3"]
