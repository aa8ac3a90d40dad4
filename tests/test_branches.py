"""A branch that was not taken contributes nothing to a gradient (R12): compositions, drawn programs, what it costs."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from flexref import flex_attention
from flexref.program.builder import Builder
from flexref.program.derive import by_autograd, derive
from flexref.program.interpret import interpret
from flexref.program.ir import check
from flexref.program.trace import trace
from flexref.taken import follow
from flexref.variants import score_mods

table = torch.tensor([-300.0, -2.0, -1.0, -0.5, 0.0, 0.25, 1.0, 3.0, 90.0, 400.0])
SCORE = torch.tensor([0.0, -1000.0, 800.0, 1.0, -0.5, 0.25, 2.0, -3.0, 4.0, 0.0])
NAMES = ("score", "b", "h", "q_idx", "kv_idx", "grad")


def gradients(mod, score, dtype=torch.float64):
    """By the derived program: d out / d score, and d out / d load at each position (zero where nothing is read)."""
    traced = trace(mod, "score", dtype)
    graph = derive(traced.graph, tuple(traced.graph.loads))
    check(graph)
    index = torch.arange(len(score))
    inputs = dict(zip(NAMES, (score.to(dtype), *[index] * 4, torch.ones(len(score), dtype=dtype)), strict=True))
    found = interpret(graph, inputs, [x.detach().to(dtype) for x in traced.captured], traced.scalars, dtype)
    loads = [value.expand(len(score)) for name, value in found.items() if name != "score"]
    return found["score"].expand(len(score)), sum(loads, torch.zeros(len(score), dtype=dtype))


# each with its true derivatives at scores of -200, 0.25 and 200
WRITTEN = {
    "where": (lambda s, b, h, q, k: torch.where(s > 0, s, torch.exp(s) - 1), (0.0, 1.0, 1.0)),
    "the other way": (lambda s, b, h, q, k: torch.where(s <= 0, torch.exp(s) - 1, s), (0.0, 1.0, 1.0)),
    "masked_fill": (lambda s, b, h, q, k: (torch.exp(s) * 2).masked_fill(s > 50, 1.0), (0.0, 2.568050833375483, 0.0)),
    "clamp": (lambda s, b, h, q, k: torch.exp(s * s).clamp(max=2.0), (0.0, 0.5322472294297929, 0.0)),
    "minimum": (lambda s, b, h, q, k: torch.minimum(torch.exp(s * s), torch.ones_like(s) * 2), (0.0, 0.5322472294297929, 0.0)),
    "relu": (lambda s, b, h, q, k: torch.relu(1 - torch.exp(s * s)), (0.0, 0.0, 0.0)),
    "nested": (lambda s, b, h, q, k: torch.where(s < 0, s, torch.where(s > 9, s, torch.sqrt(s) / s)), (1.0, -4.0, 1.0)),
    "floor": (lambda s, b, h, q, k: s + torch.floor(torch.exp(s)), (1.0, 1.0, 1.0)),
    "nan": (lambda s, b, h, q, k: torch.where(s > 0.2, s * s, torch.sqrt(-1 - s * s) * 0), (float("nan"), 0.5, 400.0)),
    "elu": (lambda s, b, h, q, k: F.elu(s), (0.0, 1.0, 1.0)),
    "softplus": (lambda s, b, h, q, k: F.softplus(s), (0.0, 0.5621765008857981, 1.0)),
    "mish": (lambda s, b, h, q, k: F.mish(s), (0.0, 0.7541726677205928, 1.0)),
    "chosen by index": (lambda s, b, h, q, k: torch.where(q > 0, s, torch.exp(s * s)), (float("-inf"), 1.0, 1.0)),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_branch_taken_gives_the_derivative(name):
    mod, want = WRITTEN[name]
    got, _ = gradients(mod, torch.tensor([-200.0, 0.25, 200.0]), torch.float32)
    torch.testing.assert_close(got, torch.tensor(want), equal_nan=True, rtol=1e-5, atol=1e-30)


def test_pytorch_itself_gives_nan_there():
    score = torch.tensor([200.0], requires_grad=True)
    mod = WRITTEN["where"][0]
    assert torch.autograd.grad(mod(score, 0, 0, 0, 0), score)[0].isnan()
    assert torch.autograd.grad(follow(mod)(score, 0, 0, 0, 0), score)[0] == 1


def test_a_captured_tensor_is_a_branch_too():
    def mod(s, b, h, q, k):
        return torch.where(table[q] > 0, torch.sqrt(table[q]), s)

    _, by_table = gradients(mod, SCORE)
    torch.testing.assert_close(by_table, torch.where(table > 0, 0.5 / table.double().abs().sqrt(), 0.0))


ONE = {name: getattr(torch, name) for name in """exp sqrt log reciprocal sin abs relu floor tanh expm1 log1p neg square
sigmoid""".split()}  # fmt: skip


def drawn(random, depth):
    """A formula of a score, an element of a table and an index, with many choices in it."""
    if depth == 0:
        return random.choice(["s", "t", "s", "q"])
    kind = random.randrange(7)
    if kind < 2:
        return random.choice(list(ONE)), drawn(random, depth - 1)
    if kind == 2:
        name = random.choice(["mul", "add", "div", "sub", "maximum", "minimum"])
        return name, drawn(random, depth - 1), drawn(random, random.randrange(depth))
    if kind == 3:
        return "clamp", drawn(random, depth - 1)
    condition = drawn(random, random.randrange(min(depth, 2)))
    return "where", condition, drawn(random, depth - 1), drawn(random, random.randrange(depth))


def computed(formula, s, t, q):
    if isinstance(formula, str):
        return {"s": s, "t": t, "q": q.double()}[formula]
    name, *parts = formula
    x = [computed(part, s, t, q) for part in parts]
    if name == "where":
        return torch.where(x[0] > 0.3, x[1], x[2])
    if name == "clamp":
        return x[0].clamp(-1.0, 2.0)
    return ONE[name](x[0]) if name in ONE else getattr(torch, name)(*x)


@pytest.mark.parametrize("seed", range(120))
def test_a_drawn_program_agrees_with_an_autograd_that_follows_the_branches(seed):
    """Whatever is 0, infinite or NaN is so in the same places; without the rule a hundred of these are NaN."""
    index, formula = torch.arange(len(table)), drawn(random.Random(seed), 4)
    score, elements = (x.double().requires_grad_() for x in (SCORE.clone(), table.clone()))
    with torch.no_grad():
        counts = computed(formula, score, elements, index).isfinite().expand(len(table))
    out = follow(lambda s, t, q: computed(formula, s, t, q))(score, elements, index)
    want = (None, None)
    if out.requires_grad:
        want = torch.autograd.grad(out.expand(len(table)).sum(), (score, elements), allow_unused=True)
    got = gradients(lambda s, b, h, q, k: computed(formula, s, table[q], q), SCORE)
    for a, b in zip(got, want, strict=True):
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a[counts], b[counts], equal_nan=True, rtol=1e-9, atol=1e-12, msg=lambda m: f"{formula}: {m}")


def raw(graph, wanted):
    """The derivative as autograd alone writes it."""
    builder = Builder()
    places = builder.copy(graph)
    refs = by_autograd(builder, places, graph, wanted)
    outputs = {"score": refs[0], **{f"load{places[i]}": ref for i, ref in zip(wanted, refs[1:], strict=True)}}
    return builder.graph(outputs, kept=tuple(places[i] for i in wanted))


rows = torch.linspace(-1, 1, 40).reshape(4, 10)
PLAIN = {
    "alibi": score_mods.alibi(4),
    "soft_cap": score_mods.soft_cap(20.0),
    "bias": lambda s, b, h, q, k: s + rows[h, q] * 0.5,
    "gain": lambda s, b, h, q, k: s * rows[h, k],
    "capped bias": lambda s, b, h, q, k: 20.0 * torch.tanh((s * rows[h, 0] + rows[h, q]) / 20.0),
    "causal": lambda s, b, h, q, k: torch.where(q >= k, 20.0 * torch.tanh(s * rows[h, q] / 20.0), -float("inf")),
    "masked_fill": lambda s, b, h, q, k: torch.tanh(s * rows[h, q]).masked_fill(q < k, -float("inf")),
    "two masks": lambda s, b, h, q, k: torch.where(q >= k, torch.where(h > k, -float("inf"), s * rows[h, q]), -float("inf")),
    "chosen bias": lambda s, b, h, q, k: torch.where(q > k, s + rows[h, q], s),
    "finite factor": lambda s, b, h, q, k: torch.where(q > k, 0.5 * s, s * (q - k)),
    "clamp": lambda s, b, h, q, k: s.clamp(-5, 5) * 0.5,
}


@pytest.mark.parametrize("name", PLAIN)
def test_where_nothing_can_go_wrong_nothing_is_added(name):
    graph = trace(PLAIN[name], "score").graph
    wanted = tuple(graph.loads)
    assert derive(graph, wanted) == raw(graph, wanted)


def test_a_chain_of_factors_is_selected_once():
    graph = trace(lambda s, b, h, q, k: torch.where(q > k, torch.exp(torch.exp(torch.exp(s))), s), "score").graph
    count = lambda g: sum(node.op == "where" for node in g.nodes)  # noqa: E731
    assert count(derive(graph)) == count(raw(graph, ())) + 1


def test_an_engine_takes_the_branch():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, 20, 8) for _ in range(3))
    query[0, 0, 3] *= 400
    wanted = []
    # the second makes the other branch harmless first, so that no rule is needed
    for mod in (
        lambda s, b, h, q, k: torch.where(s > 0, s, torch.exp(s) - 1),
        lambda s, b, h, q, k: torch.where(s > 0, s, torch.exp(torch.where(s > 0, 0.0, s)) - 1),
    ):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        out = flex_attention(*leaves, mod, backend="numba_cpu")
        wanted.append(torch.autograd.grad(out.square().sum(), leaves))
    for got, want in zip(*wanted, strict=True):
        torch.testing.assert_close(got, want)


one, other = (torch.linspace(-2, 2, 12).reshape(4, 3) * scale for scale in (1.0, 0.7))
WHOLE_TENSORS = {
    "an outer product": lambda a, c, i, j: (a[:, :1] @ c[:, :1].T)[i, j],
    "a product of matrices": lambda a, c, i, j: (a @ c.T)[i, j],
    "mv": lambda a, c, i, j: torch.mv(a, c[0])[i],
    "index_select": lambda a, c, i, j: torch.index_select(a, 0, torch.tensor([3, 1, 0, 2]))[i, 1],
    "broadcast": lambda a, c, i, j: (a[:, None, 0] * c[None, :, 1])[i, j],
}


@pytest.mark.parametrize("name", WHOLE_TENSORS)
def test_functions_of_whole_tensors_are_pytorchs_in_the_reference(name):
    """They have no positions; the same bias made before the call is the truth."""
    torch.manual_seed(0)
    query = torch.randn(1, 1, 4, 8, dtype=torch.float64)
    i, j = torch.arange(4)[:, None], torch.arange(4)[None]
    results = []
    for backend in ("reference", "numba_cpu", None):
        leaves = [x.double().requires_grad_() for x in (query, one, other)]
        q, a, c = leaves
        if backend is None:
            scores = q @ q.mT / 8**0.5 + WHOLE_TENSORS[name](a, c, i, j)
            out = scores.softmax(-1) @ q
        else:
            out = flex_attention(q, q, q, lambda s, b, h, i, j, a=a, c=c: s + WHOLE_TENSORS[name](a, c, i, j), backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves, materialize_grads=True, allow_unused=True)))
    for got in results[:2]:
        for x, want in zip(got, results[2], strict=True):
            torch.testing.assert_close(x, want)
