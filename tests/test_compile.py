"""torch.compile around flexref: one clean graph break, nothing of ours compiled, the same results."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import flexref
from flexref import BlockMask, create_block_mask, create_mask, explain, flex_attention
from flexref.variants import masks

pytestmark = pytest.mark.filterwarnings("ignore")


def soft_cap(score, b, h, q_idx, kv_idx):
    return 20 * torch.tanh(score / 20)


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def inputs(length=40):
    random = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, length, 8, generator=random).requires_grad_() for _ in range(3)]


def model(query, key, value):
    return (flex_attention(query * 2, key, value, soft_cap, mask_mod=causal) + 1).square().sum()


@pytest.fixture(autouse=True)
def fresh():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, None, True])
def test_a_model_that_calls_us_has_one_graph_break_with_our_reason(backend, dynamic, fresh):
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    for length in (40, 41, 64):
        q, k, v = inputs(length)
        want = torch.autograd.grad(model(q, k, v), (q, k, v))
        got = torch.autograd.grad(compiled(q, k, v), (q, k, v))
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y)
    (reason,) = fresh["graph_break"]
    assert "flexref's flex_attention compiles kernels of its own and runs between two graphs" in reason


INDUCTOR = """
import sys, torch, flexref
from torch._dynamo.utils import counters

@torch.compiler.disable
def trivial(query, key, value, score_mod=None, mask_mod=None):
    return query * 1.0

def model(query, key, value):
    causal = lambda b, h, q_idx, kv_idx: q_idx >= kv_idx
    return (attention(query * 2, key, value, lambda s, b, h, i, j: 20 * torch.tanh(s / 20), mask_mod=causal) + 1).square().sum()

frames = []
for attention in (trivial, flexref.flex_attention):
    torch._dynamo.reset()
    counters.clear()
    leaves = [torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3)]
    found = [torch.autograd.grad(f(*leaves), leaves, allow_unused=True) for f in (torch.compile(model), model)]
    frames.append((dict(counters["frames"]), len(counters["graph_break"])))
for got, want in zip(*found):
    torch.testing.assert_close(got, want)
assert frames[0] == frames[1] and frames[1][1] == 1, frames
"""


def test_with_a_cold_cache_and_the_default_compiler_no_more_is_compiled_than_around_a_function_of_one_line(tmp_path):
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "FLEXREF_CACHE": str(tmp_path / "flexref")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INDUCTOR], env=os.environ | caches, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_a_model_under_no_grad_and_checkpointing(fresh):
    def checkpointed(q, k, v):
        return checkpoint(model, q, k, v, use_reentrant=False)

    q, k, v = inputs()
    compiled = torch.compile(checkpointed, backend="aot_eager")
    for x, y in zip(*(torch.autograd.grad(f(q, k, v), (q, k, v)) for f in (compiled, model)), strict=True):
        torch.testing.assert_close(x, y)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(q, k, v), model(q, k, v))


@pytest.mark.parametrize("call", ["flex_attention", "explain", "create_block_mask", "create_mask"])
def test_a_function_of_ours_given_to_torch_compile_runs_as_it_is(call, fresh):
    q, k, v = inputs()
    calls = {
        "flex_attention": (flex_attention, (q, k, v, soft_cap)),
        "explain": (explain, (q, k, v, soft_cap)),
        "create_block_mask": (create_block_mask, (causal, 1, 1, 300, 300, "cpu")),
        "create_mask": (create_mask, (causal, 1, 1, 30, 30, "cpu")),
    }
    fn, arguments = calls[call]
    got, want = torch.compile(fn, backend="eager")(*arguments), fn(*arguments)
    same = torch.equal(got, want) if isinstance(got, torch.Tensor) else str(got) == str(want)
    assert same and not fresh["graph_break"] and not fresh["stats"].get("unique_graphs")
    if isinstance(got, BlockMask):
        assert got == want and got.sparsity() == want.sparsity() > 0


def doubled(mod):
    @functools.wraps(mod)
    def wrapper(*arguments):
        return 2 * mod(*arguments)

    return wrapper


class Doubling(torch.nn.Module):
    """Its child has the name that torch.compile gives to what it was given."""

    def __init__(self, mod):
        super().__init__()
        self._orig_mod = mod

    def forward(self, *arguments):
        return 2 * self._orig_mod(*arguments)


class SoftCap(torch.nn.Module):
    def forward(self, *arguments):
        return soft_cap(*arguments)


@pytest.mark.parametrize("backend", ["numba_cpu", "reference"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda mod: doubled(torch.compile(mod, backend="eager")),
        lambda mod: torch.compile(doubled(mod), backend="eager"),
        lambda mod: doubled(torch.compiler.disable(mod)),
        lambda mod: torch.compiler.disable(doubled(mod)),
        lambda mod: doubled(torch._dynamo.optimize("eager")(mod)),
        lambda mod: Doubling(SoftCap()),
        lambda mod: Doubling(torch.compile(SoftCap(), backend="eager")),
        lambda mod: torch.compile(Doubling(SoftCap()), backend="eager"),
    ],
)
def test_what_is_wrapped_around_a_compiled_mod_counts(wrap, backend):
    q, k, v = inputs()
    want = flex_attention(q, k, v, lambda *x: 2 * soft_cap(*x), backend=backend)
    assert torch.equal(flex_attention(q, k, v, wrap(soft_cap), backend=backend), want)


def test_what_is_wrapped_around_a_compiled_mask_counts():
    nothing = functools.wraps(causal)(lambda *x: ~compiled(*x))
    compiled = torch.compile(causal, backend="eager")
    nothing.__dict__.update(vars(compiled))
    assert torch.equal(create_mask(nothing, 1, 1, 9, 9, "cpu"), ~create_mask(compiled, 1, 1, 9, 9, "cpu"))
    made, other = (create_block_mask(x, 1, 1, 9, 9, "cpu", 1) for x in (nothing, compiled))
    assert torch.equal(made.to_dense(), 1 - other.to_dense())


def test_another_number_of_a_mod_is_another_call(fresh):
    q, k, v = inputs()
    numbers = {"cap": 3.0}

    def capped(q, k, v):
        return flex_attention(q, k, v, lambda s, b, h, i, j: numbers["cap"] * torch.tanh(s / numbers["cap"])) * 2

    compiled = torch.compile(capped, backend="eager")
    for cap in (3.0, 0.5, 3.0):
        numbers["cap"] = cap
        assert torch.equal(compiled(q, k, v), capped(q, k, v))


def test_a_nested_block_mask_is_made_between_two_graphs(fresh):
    nested = torch.nested.nested_tensor([torch.randn(n, 2, 8) for n in (5, 9)], layout=torch.jagged).transpose(1, 2)

    def masked(x):
        y = x * 2
        mask = flexref.create_nested_block_mask(causal, None, None, nested, BLOCK_SIZE=16)
        return y + mask.sparsity()

    x = torch.randn(3)
    torch.testing.assert_close(torch.compile(masked, backend="eager")(x), masked(x))
    assert any("flexref's create_nested_block_mask" in reason for reason in fresh["graph_break"])


def test_methods_of_a_block_mask_break_cleanly(fresh):
    def masked(q):
        x = q * 2
        mask = create_block_mask(causal, 1, 1, 64, 64, "cpu", 16)
        mask = (mask & create_block_mask(masks.sliding_window(20), 1, 1, 64, 64, "cpu", 16)).rows(3, 40).to("cpu")
        return x + mask.sparsity()

    q = torch.randn(3)
    torch.testing.assert_close(torch.compile(masked, backend="eager")(q), masked(q))
    assert fresh["graph_break"] and all("flexref's" in reason for reason in fresh["graph_break"])


def test_fullgraph_says_what_to_do(fresh):
    with pytest.raises(Exception, match="(?s)flexref's flex_attention compiles kernels .*leave out fullgraph=True"):
        torch.compile(model, backend="eager", fullgraph=True)(*inputs())


def test_importing_and_calling_us_imports_no_compiler():
    code = """
    import sys, torch, flexref
    q = torch.randn(1, 1, 16, 8)
    flexref.flex_attention(q, q, q, mask_mod=lambda b, h, i, j: i >= j, backend="reference")
    assert not [name for name in sys.modules if name.startswith("torch._dynamo")]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_other_tracers_are_told_in_one_sentence():
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = (x.detach() for x in inputs())
    for how in ("real", "fake"):
        for early in (False, True):
            with pytest.raises(TypeError, match="flexref cannot run inside .*; call it outside"):
                make_fx(lambda q, k, v: flex_attention(q, k, v), tracing_mode=how, pre_dispatch=early)(q, k, v)
    with pytest.raises(TypeError, match="flexref cannot run inside torch.jit.trace"):
        torch.jit.trace(Exported(), (q, k, v))
    for strict, says in ((False, "flexref cannot run inside .*; call it outside"), (True, "flexref's flex_attention")):
        with pytest.raises(Exception, match=says):
            torch.export.export(Exported(), (q, k, v), strict=strict)
    with FlopCounterMode(display=False):
        assert torch.equal(flex_attention(q, k, v), flex_attention(q, k, v))


def test_a_block_mask_is_not_built_where_it_would_be_recorded_or_has_no_memory():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    mask = create_block_mask(causal, 1, 1, 64, 64, "cpu", 16)
    builds = (lambda: create_block_mask(causal, 1, 1, 64, 64, "cpu", 16), lambda: mask.rows(3, 40), lambda: mask.resize(32, 32))
    for build in builds:
        with FakeTensorMode(), pytest.raises(TypeError, match="flexref cannot run inside FakeTensorMode"):
            build()
        with pytest.raises(TypeError, match="flexref cannot run inside ProxyTorchDispatchMode"):
            make_fx(lambda x: x * build().sparsity())(torch.ones(2))  # noqa: B023


class Exported(torch.nn.Module):
    def forward(self, q, k, v):
        return flexref.flex_attention(q, k, v)
