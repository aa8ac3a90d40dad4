"""Settings of the process and of the surroundings do not reach our own tensors: the same call gives the same bits under each."""

from __future__ import annotations

import ast
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

import flexref
from flexref.arguments import prepare
from flexref.autograd import attend
from flexref.backend import Backend
from tests.engines import runnable

ROOT = Path(__file__).resolve().parent.parent
FACTORIES = set(
    """empty zeros ones full arange tensor as_tensor asarray scalar_tensor rand randn randint randperm empty_strided linspace
    logspace eye tril_indices triu_indices range normal frombuffer""".split()
)


@contextmanager
def set_and_back(set: Callable, value, before):
    set(value)
    try:
        yield
    finally:
        set(before)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS: dict[str, Callable[[], AbstractContextManager]] = {
    "default device meta": lambda: set_and_back(torch.set_default_device, "meta", None),
    "default device cuda": lambda: set_and_back(torch.set_default_device, "cuda", None),
    "with device meta": lambda: torch.device("meta"),
    "default dtype bfloat16": lambda: set_and_back(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default dtype float64": lambda: set_and_back(torch.set_default_dtype, torch.float64, torch.float32),
    "deterministic algorithms": deterministic,
    "one thread": lambda: set_and_back(torch.set_num_threads, 1, torch.get_num_threads()),
    "anomaly detection": torch.autograd.detect_anomaly,
    "medium matmul precision": lambda: set_and_back(torch.set_float32_matmul_precision, "medium", "highest"),
}


def operands(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    draw = torch.Generator("cpu").manual_seed(0)
    shapes = {"query": (1, 2, 33, 8), "key": (1, 1, 40, 8), "value": (1, 1, 40, 4), "table": (2, 80), "cap": ()}
    made = {name: torch.randn(shape, generator=draw, dtype=torch.float64, device="cpu") for name, shape in shapes.items()}
    return {name: x.to(dtype, copy=True).requires_grad_() for name, x in made.items()}


def results(backend: Backend, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Forward and backward with captures of three kinds, and a bare mask_mod; afresh, as a first call would."""
    x = operands(dtype)
    table, cap, weight = x["table"], x["cap"], 0.3
    ids = torch.arange(40, device="cpu") // 7

    def score_mod(score, b, h, q_idx, kv_idx):
        near = score + table[h, q_idx - kv_idx + 39] * weight
        return torch.where(q_idx == kv_idx, near * 0.5, torch.tanh(near) * cap)

    def mask_mod(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) | (ids[q_idx] == ids[kv_idx])

    parts = prepare(x["query"], x["key"], x["value"], score_mod, enable_gqa=True, mask_mod=mask_mod)
    output = attend(backend, *parts)
    grads = torch.autograd.grad(output.out.double().square().sum() + output.lse.double().sum(), list(x.values()))
    return [output.out, output.lse, *grads]


PLAIN: dict[str, list[torch.Tensor]] = {}
# what a slow, emulated engine need not be asked again
FOR_THREADS_AND_TORCH = ("one thread", "anomaly detection", "medium matmul precision")
PAIRS = [(s, b) for b in runnable() for s in SETTINGS if s not in FOR_THREADS_AND_TORCH or not hasattr(b, "how")]


@pytest.mark.filterwarnings("ignore:Anomaly")
@pytest.mark.parametrize(("setting", "backend"), PAIRS, ids=lambda x: getattr(x, "name", x))
def test_a_call_gives_the_same_bits_under(setting, backend):
    if backend.name not in PLAIN:
        PLAIN[backend.name] = results(backend)
    with SETTINGS[setting]():
        got = results(backend)
    for a, b in zip(got, PLAIN[backend.name], strict=True):
        assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:Anomaly")
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_block_mask_and_its_errors_are_the_same_under(setting):
    def make() -> tuple:
        ids = torch.arange(300, device="cpu") // 70
        how = {"device": "cpu", "BLOCK_SIZE": 32}
        mask = flexref.create_block_mask(lambda b, h, i, j: (i >= j) & (ids[i] == ids[j]), 1, 2, 300, 300, **how)
        both = mask & flexref.create_block_mask(lambda b, h, i, j: i - j < 50, 1, 1, 300, 300, **how)
        lists = [x.tolist() for m in (mask, both, mask[:, 1:], mask.resize(200, 300), ~mask) for x in m.csr]
        short = torch.zeros(4, device="cpu")
        q = torch.ones(1, 1, 8, 8, device="cpu")
        with pytest.raises(IndexError) as caught:
            flexref.flex_attention(q, q, q, lambda s, b, h, i, j: s + short[j], backend="numba_cpu")
        return lists, both.to_dense().tolist(), str(both), str(caught.value)

    plain = make()
    with SETTINGS[setting]():
        assert make() == plain


@pytest.mark.parametrize("inference", [False, True])
def test_inference_mode_gives_the_same_bits(inference):
    x = operands(torch.float32)
    table = x["table"]

    def call() -> torch.Tensor:
        parts = x["query"], x["key"], x["value"], lambda s, b, h, i, j: s + table[h, j]
        return flexref.flex_attention(*parts, enable_gqa=True, mask_mod=lambda b, h, i, j: i >= j)

    with torch.inference_mode() if inference else nullcontext():
        got = call()
    assert got.is_inference() == inference and got.requires_grad != inference
    assert torch.equal(got, call())


def unnamed(path: Path) -> list[str]:
    """Calls of torch's factories that would take the default device."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES:
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if of_torch and not {"device", None} & {keyword.arg for keyword in node.keywords}:
                found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("folder", ["flexref", "backends", "dispatch"])
def test_every_tensor_that_we_make_names_its_device(folder):
    # what users make with variants is theirs, and follows the default device as torch does; the command line is a program
    theirs = ("variants", "cli", "backends", "dispatch", "conformance") if folder == "flexref" else ("interpreter.py", "tune.py")
    paths = [p for p in (ROOT / folder).rglob("*.py") if p.relative_to(ROOT).parts[1] not in theirs and p.name not in theirs]
    assert len(paths) > 2 and not [line for path in paths for line in unnamed(path)]


def test_a_nameless_factory_would_be_found(tmp_path):
    (tmp_path / "x.py").write_text("import torch\na = torch.zeros(3)\nb = torch.zeros(3, device='cpu')\n")
    assert unnamed(tmp_path / "x.py") == ["x.py:2: torch.zeros(3)"]
