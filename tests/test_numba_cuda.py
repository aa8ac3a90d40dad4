"""The parts of the Numba CUDA engine, in Numba's simulator: macros, barriers, layouts, both products, faults, builds, options."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flexref.arguments import prepare
from flexref.autograd import attend
from flexref.backends import numba_cuda
from flexref.backends.numba_cuda import compiler, kernels_for
from flexref.backends.numba_cuda.geometry import SIMULATED, Chip, geometry_of, shared_of
from flexref.backends.numba_cuda.unroll import expand
from flexref.conformance import checks
from flexref.conformance.cases import Blocks, Case
from flexref.errors import Unsupported
from flexref.reference import einsum

ROOT = Path(__file__).parent.parent
ALL = ("query", "key", "value", "captured")
BACKEND = numba_cuda.emulated()
pytestmark = pytest.mark.skipif(bool(BACKEND.unavailable()), reason="; ".join(BACKEND.unavailable()))


@pytest.fixture
def with_options(monkeypatch):
    """Cases are run with these kernel options."""

    def use(**options):
        monkeypatch.setattr(checks, "prepare", lambda **arguments: prepare(**arguments, options=options))

    return use


def run(name: str, source: str, threads: int, lanes: int, shared: int, *arrays: np.ndarray) -> None:
    from flexref.backends.numba_cuda import simulator

    simulator.cuda()
    simulator.run(compiler.function_of(source, name), 1, threads, lanes, shared, [simulator.Flat(a) for a in arrays])


# macros


def test_macros_leave_plain_python():
    text = "def f(a, b, n):\n x = registers(2)\n x = unpacked(g(b))\n for i in unrolled(2):\n"
    text += "  if ROWS == i + 1:\n   x[i] = a[n + i]\n"
    assert expand(text + " return packed(x)\n", {"ROWS": 2}, unsigned=False).splitlines() == [
        "def f(a, b, n):",
        "    x_0, x_1 = g(b)",
        "    x_1 = a[n + 1]",
        "    return (x_0, x_1)",
    ]
    assert "a[unsigned(n + 1)]" in expand(text, {"ROWS": 2}, unsigned=True)
    assert expand("def f(a):\n return a[twice(PLACE) + 1]\n", {"PLACE": 2, "twice": lambda x: 2 * x}, True).endswith("a[5]\n")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("for i in unrolled(n): pass", "n must be a constant"),
        ("x = registers(2); x[2] = 1", "is no register"),
        ("x = registers(2); x[n] = 1", "n must be a constant"),
        ("return packed(n)", "was not declared"),
    ],
)
def test_a_wrong_macro_is_a_syntax_error_with_its_line(line, says):
    with pytest.raises(SyntaxError, match=f"line 2: .*{says}"):
        expand(f"def f(n):\n {line}\n", {}, unsigned=False)


# the simulator

HEAD = "from numba import cuda\n"


def test_threads_see_what_others_wrote_before_the_barrier():
    text = HEAD + (
        "def f(out):\n    i = cuda.threadIdx.x\n    a = cuda.shared.array(0, kind)\n    a[i] = i\n"
        "    cuda.syncthreads()\n    out[i] = a[(i + 1) % 4]\n"
    )
    out = np.zeros(4)
    run("f", "import numpy\nkind = numpy.dtype('float64')\n" + text, 4, 4, 32, out)
    assert out.tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("    if cuda.threadIdx.x == 1:\n        cuda.syncthreads()\n", "wait at different places"),
        ("    if cuda.threadIdx.x:\n        cuda.syncthreads()\n    else:\n        cuda.syncthreads()\n", "different places"),
        ("    out[4] = 0\n", "written at 4 of 4"),
        ("    out[0] = out[cuda.threadIdx.x - 1]\n", "read at -1 of 4"),
    ],
)
def test_what_cuda_leaves_undefined_is_an_error(body, says):
    with pytest.raises((RuntimeError, IndexError), match=says):
        run("f", HEAD + "def f(out):\n" + body, 4, 4, 0, np.zeros(4))


def test_shared_memory_is_nan_at_first():
    out = np.zeros(2)
    text = "import numpy\n" + HEAD + "def f(out):\n    out[cuda.threadIdx.x] = cuda.shared.array(0, numpy.dtype('float64'))[0]\n"
    run("f", text, 2, 2, 16, out)
    assert np.isnan(out).all()


# the tensor cores' instruction: where the PTX manual's m16n8k16 has element i of lane l's fragments


def a_element(lane, i):
    return lane // 4 + (0 if i < 2 or 4 <= i < 6 else 8), lane % 4 * 2 + i % 2 + (8 if i >= 4 else 0)


def b_element(lane, i):
    return lane % 4 * 2 + i % 2 + (8 if i >= 2 else 0), lane // 4


def c_element(lane, i):
    return lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + i % 2


MACHINE = "from numba import cuda\nfrom flexref.backends.numba_cuda.kernels.simulated import *\n"


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_the_model_of_mma_is_the_manuals(half):
    from flexref.backends.numba_cuda.kernels import simulated

    rng = np.random.default_rng(0)
    a, b = rng.integers(-4, 5, (16, 16)).astype(np.float32), rng.integers(-4, 5, (16, 8)).astype(np.float32)
    c = rng.integers(-4, 5, (16, 8)).astype(np.float32)
    bits = getattr(simulated, f"to_{half}")

    def words(matrix, element, count):
        halves = [[int(bits(matrix[element(lane, i)])) for i in range(count)] for lane in range(32)]
        return np.array([[row[i] | row[i + 1] << 16 for i in range(0, count, 2)] for row in halves], np.int64).ravel()

    given = np.array([[c[c_element(lane, i)] for i in range(4)] for lane in range(32)], np.float32).ravel()
    out = np.zeros(128, np.float32)
    text = MACHINE + (
        "def f(a, b, c, out):\n    l = cuda.threadIdx.x\n"
        f"    d = mma_{half}(*[c[4 * l + i] for i in range(4)], *[int(a[4 * l + i]) for i in range(4)],\n"
        "        *[int(b[2 * l + i]) for i in range(2)])\n"
        "    for i in range(4):\n        out[4 * l + i] = d[i]\n"
    )
    run("f", text, 32, 32, 0, words(a, a_element, 8), words(b, b_element, 4), given, out)
    wanted = a @ b + c
    assert all(out[4 * lane + i] == wanted[c_element(lane, i)] for lane in range(32) for i in range(4))


def test_lanes_point_ldmatrix_at_what_mma_wants():
    """With the kernel's own place functions, ldmatrix gives each lane the fragments of the manual."""
    scope: dict = {"device": lambda f: f}
    text = kernels_for.source("mma")
    exec(text[text.index("@device\ndef a_place") : text.index("# each")], scope)
    tile = np.arange(16 * 16).reshape(16, 16)
    lanes = range(32)

    def fetched(place, down, lane):
        rows = [place(other) for other in lanes]
        matrices = [np.array([tile[r, c : c + 8] for r, c in rows[8 * m : 8 * m + 8]]) for m in range(4)]
        matrices = [m.T if down else m for m in matrices]
        return [m[lane // 4, lane % 4 * 2 + i] for m in matrices for i in range(2)]

    for lane in lanes:
        assert fetched(scope["a_place"], False, lane) == [tile[a_element(lane, i)] for i in range(8)]
        # two right operands, 8 columns each: rows of the tile are columns (n), or, read down, rows (k)
        across = [tile[b_element(lane, i)[::-1]] for i in range(4)]
        assert fetched(scope["b_place"], False, lane) == across + [x + 8 * 16 for x in across]
        downward = [tile[b_element(lane, i)] for i in range(4)]
        assert fetched(scope["a_place"], True, lane) == downward + [x + 8 for x in downward]


@pytest.mark.parametrize("product", ["fma", "mma"])
def test_every_element_of_a_tile_has_one_owner(product):
    g = SIMULATED[product]
    scope: dict = {"device": lambda f: f, "LANES": g.lanes, "SPREAD": g.spread, "ROWS": g.rows, "PAIR": g.pair}
    text = kernels_for.source("common")
    exec(text[text.index("@device\ndef row_of") : text.index("@device\ndef row_maximum")], scope)
    owned = [
        (scope["row_of"](thread) + g.down(i), scope["column_of"](thread) + g.across(j))
        for thread in range(g.threads) for i in range(g.rows) for j in range(g.cols)
    ]  # fmt: skip
    assert sorted(owned) == [(r, c) for r in range(g.row_tile) for c in range(g.column_tile)]
    if product == "mma":
        lane = 13
        first = scope["row_of"](lane), scope["column_of"](lane)
        mine = [(first[0] + g.down(i), first[1] + g.across(j)) for i in range(2) for j in range(2)]
        assert mine == [c_element(lane, i) for i in range(4)]


# kernels on the exact model of the tensor cores, and other ways that the suite does not take by itself


HALF = Case(q_len=20, kv_len=21, head_dim=16, value_dim=16, dtype="bfloat16")


@pytest.mark.parametrize(
    "case",
    [
        HALF.but(kv_len=37, max_scores=True),
        HALF.but(head_dim=24, dtype="float16", score="score * gain", mask="q_idx >= kv_idx", wants=ALL),
        HALF.but(q_len=17, kv_len=18, head_dim=5, value_dim=7, group=2, wants=ALL),
        HALF.but(q_len=18, kv_len=33, dtype="float16", mask="q_idx >= kv_idx", values="holes", wants=ALL),
        HALF.but(q_len=2, kv_len=70, group=4, mask="kv_idx % 3 != 1"),
    ],
)
def test_tensor_core_kernels_on_the_model_of_the_instruction(with_options, case):
    with_options(product="mma")
    checks.check_case(BACKEND, case)


def test_keys_shared_out_over_blocks_of_threads(with_options):
    for splits in (2, 5):
        with_options(splits=splits)
        case = Case(q_len=3, kv_len=33, kv_heads=2, group=2, mask="kv_idx < length[b]", max_scores=True, wants=("query",))
        checks.check_case(BACKEND, case)
        checks.check_case(BACKEND, case.but(mask="q_idx < 0"))
        checks.check_case(BACKEND, case.but(values="holes", mask="kv_idx % 2 == 0", wants=()))


def test_a_wide_value_gets_its_gradients_in_two_rounds(monkeypatch, with_options):
    from flexref.backends.numba_cuda import geometry

    with_options(product="mma")
    monkeypatch.setattr(geometry, "_too_wide", lambda problem, product: True)
    checks.check_case(BACKEND, Case(q_len=17, kv_len=18, head_dim=16, value_dim=16, dtype="bfloat16", wants=ALL))


def test_several_heads_in_a_tile_give_what_one_gives(monkeypatch):
    from flexref.backends.numba_cuda import call

    seen = []
    pack = call._pack
    monkeypatch.setattr(call, "_pack", lambda *arguments: seen.append(pack(*arguments)) or seen[-1])
    blocks = Blocks((16, 16), by_hand=True)
    shape = Case(q_len=2, kv_len=20, group=4)
    for case in (shape.but(score="score * slope[h] + q_idx"), shape.but(q_len=1, group=8, blocks=blocks)):
        checks.check_case(BACKEND, case)
    assert seen == [4, 8]


# planted faults: each makes the suite fail, and without it the same problem passes

LISTED = Case(q_len=20, kv_len=23, mask="(q_idx + kv_idx) % 3 != 0", blocks=Blocks((8, 8), by_hand=True))
HOLES = Case(q_len=12, kv_len=12, mask="q_idx >= kv_idx", values="holes", seed=6)
BARRIER = "            arrived()\n            cuda.syncthreads()\n"
# the file, the text that is replaced, by what, and a problem that tells
FAULTS: dict[str, tuple[str, str, str, Case]] = {
    "rescaling left out": ("forward", "o[i, d] *= shrink", "pass", Case(q_len=9, kv_len=30, values="large")),
    "row_sum of one lane": ("forward", "row_sum[i] = row_total(row_sum[i])", "pass", Case()),
    "lse in base 2": ("forward", "row_max[i] + log_sum", "(row_max[i] + log_sum) * LOG2E", Case()),
    "no barrier before values are read": ("forward", BARRIER + "            if t", "            if t", Case()),
    "ragged tail not masked": ("forward", "inside = kv_at < kv_end", "inside = True", Case(kv_len=13)),
    "mask asked in full blocks": ("common", "block_size, length), partial", "block_size, length), True", LISTED),
    "last block dropped": ("common", "return blocks * tiles", "return (blocks - 1) * tiles", LISTED),
    "never careful": ("forward", "careful = True", "break", HOLES),
    "rows past the end written": ("forward", "% Q_ROWS < q_end\n", "% Q_ROWS >= 0\n", Case(q_len=13)),
    "delta left out": ("delta", "deltas[flat] = total", "deltas[flat] = real(0)", Case(wants=ALL)),
    "dq misses the scale": ("backward_query", "factors[i] = scale", "factors[i] = real(1)", Case(wants=("query",))),
    "one head of the group": ("backward_key", "batches * sizes[GROUP])", "batches)", Case(group=2, wants=("key",))),
    "slope left out": ("mods", "select(seen, d_score, real(0))", "grad", Case(score="torch.tanh(score)", wants=("key",))),
    "a sum of one lane": ("backward_query", "+= shuffle_xor", "+= 0 * shuffle_xor", Case(score="score * gain", wants=ALL)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_the_suite(fault, monkeypatch):
    name, line, planted, case = FAULTS[fault]
    plain = kernels_for.source
    assert line in plain(name)
    checks.check_case(BACKEND, case)
    monkeypatch.setattr(kernels_for, "source", lambda n: plain(n).replace(line, planted) if n == name else plain(n))
    with pytest.raises(AssertionError):
        checks.check_case(BACKEND, case)


def test_a_wrong_layout_of_the_instruction_fails_the_suite(monkeypatch, with_options):
    with_options(product="mma")
    plain = kernels_for.source
    case = Case(q_len=16, kv_len=16, head_dim=16, value_dim=16, dtype="bfloat16")
    for line, planted in (("a1 = pack(p[1, 4 * k]", "a1 = pack(p[0, 4 * k]"), ("lane // 8 % 2 * 8", "lane // 16 * 8")):
        assert line in plain("mma")
        with monkeypatch.context() as patch:
            patch.setattr(kernels_for, "source", lambda n, line=line, planted=planted: plain(n).replace(line, planted))
            with pytest.raises(AssertionError):
                checks.check_case(BACKEND, case)


# builds, options, refusals


def test_numbers_lengths_and_batches_need_no_new_kernel():
    before = compiler.builds
    for i, (batch, length) in enumerate(((1, 5), (2, 9), (3, 12), (1, 16))):
        query, key = torch.randn(batch, 2, length, 8), torch.randn(batch, 2, length + i, 8)
        shift, table = 0.5 + i, torch.randn(40 + i)

        def score_mod(score, b, h, q_idx, kv_idx, shift=shift, table=table):
            return score * shift + table[q_idx]

        problem, tensors = prepare(query, key, key, score_mod, scale=0.1 * (i + 1))
        output = attend(BACKEND, problem, tensors)
        torch.testing.assert_close(output.out, einsum(query, key, key, score_mod, scale=0.1 * (i + 1)).out)
    assert compiler.builds == before + 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(q_tile=0), "option q_tile must be a positive int, got 0"),
        (dict(splits=True), "option splits must be a positive int"),
        (dict(product="wgmma"), "option product must be 'mma' or 'fma', got 'wgmma'"),
        (dict(product="mma"), "is for float16 and bfloat16"),
    ],
)
def test_wrong_options_are_refused_with_the_reason(options, says):
    x = torch.randn(1, 1, 8, 8)
    with pytest.raises(Unsupported, match=says):
        attend(BACKEND, *prepare(x, x, x, options=options))


def test_the_module_itself_runs_on_a_gpu_only():
    problem, _ = prepare(*[torch.randn(1, 1, 8, 8)] * 3)
    assert numba_cuda.unsupported(problem) == ["the tensors are on cpu, it runs on cuda"]
    assert BACKEND.unsupported(problem) == []
    if not torch.cuda.is_available():
        assert any("no CUDA GPU" in reason for reason in numba_cuda.unavailable())


def test_captured_gradients_with_the_same_bits_are_refused():
    x, gain = torch.randn(1, 1, 8, 8), torch.ones((), requires_grad=True)
    problem, tensors = prepare(x, x, x, lambda s, b, h, i, j: s * gain, deterministic=True)
    with pytest.raises(Unsupported, match="atomics"):
        attend(BACKEND, problem, tensors)
    assert "atomics" in " ".join(numba_cuda.notes(problem)) and numba_cuda.notes(prepare(x, x, x)[0]) == []


def test_signs_that_are_only_noted_count():
    query, key = (torch.randn(1, 1, 9, 16, dtype=torch.complex64)[..., ::2].conj().imag for _ in range(2))
    assert query.is_neg() and not query.is_contiguous()
    output = attend(BACKEND, *prepare(query, key, key))
    torch.testing.assert_close(output.out, einsum(query, key, key).out)


def test_tiles_fit_the_chip():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for width in (8, 128, 256, 512):
            x = torch.zeros(1, 1, 1, width, dtype=dtype)
            problem, _ = prepare(x, x, x)
            for kernel in ("forward", "backward_query", "backward_key"):
                geometry = geometry_of(problem, kernel, Chip(132, 99 * 1024, True), simulated=False)
                assert shared_of(problem, kernel, geometry).bytes <= 99 * 1024, (dtype, width, kernel)


def test_the_simulator_says_so_where_numba_was_loaded_for_a_gpu():
    code = (
        "import numba.cuda\nfrom flexref.backends import numba_cuda\n"
        "print(numba_cuda.emulated().unavailable(), numba_cuda.unavailable()[-1])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "NUMBA_ENABLE_CUDASIM=1" in done.stdout


@pytest.mark.parametrize("first", ["import torch", "import numba"])
def test_the_simulator_leaves_the_environment_and_the_cpu_engine_alone(first):
    code = f"{first}\n" + """
import os, torch, flexref
from flexref.arguments import prepare
from flexref.autograd import attend
from flexref.backends import numba_cpu, numba_cuda
x = torch.randn(1, 1, 8, 8)
outs = [attend(b, *prepare(x, x, x)).out for b in (numba_cuda.emulated(), numba_cpu)]
torch.testing.assert_close(*outs)
assert "NUMBA_ENABLE_CUDASIM" not in os.environ
assert numba_cuda.unavailable() if not torch.cuda.is_available() else True
assert flexref.explain(x, x, x).choice.name == "numba_cpu"
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, check=True)


def test_the_example_that_edits_a_kernel():
    spec = importlib.util.spec_from_file_location("edit_a_kernel", ROOT / "examples" / "edit_a_kernel.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    with example.sigmoid_kernel():
        assert example.difference(BACKEND, "cpu") < 1e-5
        wrong = example.verdicts(BACKEND, example.RULES["R1 the accumulation type"])
        right = example.verdicts(BACKEND, example.RULES["R6 a row with nothing allowed"])
    assert wrong["out"] and wrong["lse"] and not any(right.values())
    assert not any(example.verdicts(BACKEND, example.RULES["R1 the accumulation type"]).values())


@pytest.mark.parametrize("widths", [(264, 8), (16, 272)])
def test_rows_longer_than_the_threads_can_fetch_at_once(with_options, widths):
    head_dim, value_dim = widths
    with_options(product="mma")
    checks.check_case(BACKEND, Case(q_len=4, kv_len=5, head_dim=head_dim, value_dim=value_dim, dtype="bfloat16"))


def test_tile_options_become_powers_of_two():
    chip = Chip(132, 227 * 1024, True)
    for q_tile, kv_tile in ((48, 48), (1024, 112), (1, 1), (256, 112)):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.zeros(1, 1, 8, 256, dtype=dtype)
            problem, _ = prepare(x, x, x, options=dict(q_tile=q_tile, kv_tile=kv_tile))
            for kernel in ("forward", "backward_key", "backward_query"):
                found = geometry_of(problem, kernel, chip, False)
                assert found.threads & (found.threads - 1) == 0 and found.threads <= 1024
                assert found.cols & (found.cols - 1) == 0


def test_rows_that_do_not_exist_read_nothing():
    query, key = torch.ones(1, 1, 3, 4), torch.ones(1, 1, 5, 4)
    table = torch.arange(10.0)

    def mod(score, b, h, q_idx, kv_idx):
        return score + table[(40 / (score + 1e-3)).to(torch.int64) - 15]

    problem, tensors = prepare(query, key, key, mod)
    wanted = einsum(query.double(), key.double(), key.double(), mod)
    torch.testing.assert_close(BACKEND.forward(problem, tensors).lse, wanted.lse.float())
