"""A score_mod that masks by -inf runs block-sparse: found by its program, and meaning what the reference says of the function."""
from __future__ import annotations

import random
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexref import explain, flex_attention
from flexref.arguments import prepare
from flexref.autograd import attend
from flexref.backends import reference
from flexref.blocks import found
from flexref.program.split_score import split_score
from flexref.program.trace import trace
from tests.engines import runnable

INF = float("inf")
LENGTH = 40
torch.manual_seed(0)
ids = torch.arange(LENGTH) // 11
lengths = torch.tensor([25, 40])
bias = torch.randn(3, LENGTH)
slope = torch.tensor([0.5, 0.25, 0.125])
holes = torch.full((LENGTH,), float("nan"))
relative = torch.randn(2 * LENGTH)


@pytest.fixture(autouse=True)
def small():
    with looked_at():
        yield


def looked_at() -> ExitStack:
    """However few positions there are."""
    stack = ExitStack()
    for name, value in (("_WORTH", 0), ("_WORTH_EACH_CALL", 0), ("_BLOCK", 8)):
        stack.enter_context(mock.patch.object(found, name, value))
    return stack


def inputs(q_len=LENGTH, kv_len=LENGTH, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = (2, 3, q_len, 4), (2, 3, kv_len, 4), (2, 3, kv_len, 4)
    return [torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes]


def looked_for(mod, *x):
    problem, tensors = prepare(*(x or inputs()), mod)
    return problem, tensors.block_mask if tensors.found else None


def check(mod, *x, captured=()):
    """numba_cpu with what was found beside the reference, forward and backward."""
    results = []
    for backend in ("numba_cpu", "reference"):
        leaves = [t.detach().clone().requires_grad_() for t in (x or inputs())]
        out, lse = flex_attention(*leaves, mod, return_lse=True, backend=backend)
        loss = out.square().sum() + lse.masked_fill(lse == -INF, 0.0).sum()
        results.append((out, lse, *torch.autograd.grad(loss, [*leaves, *captured])))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5, equal_nan=True)


# each with whether it is split into mask and score
FORMS = {
    "causal": (lambda s, b, h, q, k: torch.where(q >= k, s, -INF), True),
    "the other way": (lambda s, b, h, q, k: torch.where(q < k, -INF, s), True),
    "masked_fill": (lambda s, b, h, q, k: s.masked_fill(q < k, -INF), True),
    "nested": (lambda s, b, h, q, k: torch.where(q >= k, torch.where(q - k < 9, s * slope[h], -INF), -INF), True),
    "multiplied": (lambda s, b, h, q, k: torch.where((q >= k) * (ids[q] == ids[k]), s, -INF), True),
    "soft-cap before": (lambda s, b, h, q, k: torch.where(q >= k, 5 * torch.tanh(s / 5), -INF), True),
    "a bias before": (lambda s, b, h, q, k: torch.where(ids[q] == ids[k], s + bias[h, k], -INF), True),
    "by batch": (lambda s, b, h, q, k: torch.where(k < lengths[b], s, -INF), True),
    "by head": (lambda s, b, h, q, k: torch.where(q - k < 4 + 8 * h, s, -INF), True),
    "one of two masks": (
        lambda s, b, h, q, k: torch.where(h == 1, torch.where(q >= k, s, -INF), torch.where(q <= k, 2 * s, -INF)), True,
    ),
    "the score chooses too": (lambda s, b, h, q, k: torch.where(s > -1.5, torch.where(q >= k, s, -INF), -INF), True),
    "a number after": (lambda s, b, h, q, k: torch.where(q >= k, s, -INF) * 0.5 + 1.0, False),
    "a distance after": (lambda s, b, h, q, k: torch.where(q >= k, s, -INF) - 0.1 * (q - k), False),
    "ALiBi after": (lambda s, b, h, q, k: torch.where(q >= k, s, -INF) + slope[h] * (k - q), False),
    "relative": (lambda s, b, h, q, k: torch.where(q >= k, s + relative[q - k], -INF), True),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_a_form_of_masking_is_found_and_means_the_same(name):
    mod, apart = FORMS[name]
    problem, blocks = looked_for(mod)
    assert blocks is not None and blocks.sparsity() > 5
    assert (problem.mask is not None) == apart
    assert (split_score(trace(mod, "score").graph) is not None) == apart
    check(mod)


NOTHING = {
    "no mask": lambda s, b, h, q, k: s * 2,
    "by the score": lambda s, b, h, q, k: torch.where(s > 0, s, -INF),
    "soft-cap after, which gives a number": lambda s, b, h, q, k: 5 * torch.tanh(torch.where(q >= k, s, -INF) / 5),
    "NaN after": lambda s, b, h, q, k: torch.where(q >= k, s, -INF) + holes[k],
    "the smaller of two, which may be NaN": lambda s, b, h, q, k: torch.minimum(torch.where(q >= k, 0.0, -INF) + 0 * q, s),
    "turned round": lambda s, b, h, q, k: -torch.where(q >= k, s, -INF),
    "times 0": lambda s, b, h, q, k: torch.where(q >= k, s, -INF) * (q * 0),
    "more than a type holds": lambda s, b, h, q, k: torch.where(q >= k, s, -INF) + 1e38 * 100.0,
    "no whole block": lambda s, b, h, q, k: torch.where((q + k) % 3 != 0, s, -INF),
    "a tensor made in it, which is read like any other": lambda s, b, h, q, k: torch.where(q >= k, s, torch.tensor(-INF)),
    "a number that is not -inf": lambda s, b, h, q, k: torch.where(q >= k, s, -1e30),
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_is_no_mask_is_not_taken_for_one(name):
    assert looked_for(NOTHING[name])[1] is None
    check(NOTHING[name])


def test_the_same_bits_as_the_mask():
    x = inputs()
    out = flex_attention(*x, lambda s, b, h, q, k: torch.where(q >= k, 2 * s, -INF))
    from flexref import create_block_mask

    mask = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, LENGTH, LENGTH, "cpu", 8)
    assert torch.equal(out, flex_attention(*x, lambda s, b, h, q, k: 2 * s, mask))


def test_a_masked_nan_and_an_empty_row():
    query, key, value = inputs()
    key[:, :, 20:] = float("nan")
    value[:, :, 20:] = INF
    check(lambda s, b, h, q, k: torch.where((k < 20) & (q != 3) & (q < 30), s, -INF), query, key, value)


def test_it_follows_what_the_condition_reads_and_nothing_else():
    x = inputs()
    limit, table = torch.tensor([12]), torch.zeros(LENGTH, requires_grad=True)

    def mod(s, b, h, q, k):
        return torch.where(k < limit[0], s + table[k], -INF)

    check(mod, *x, captured=(table,))
    with mock.patch.object(found, "split", side_effect=AssertionError("looked at again")):
        with torch.no_grad():
            table += 1.0
        check(mod, *x, captured=(table,))
    for write in (lambda: limit.fill_(30), lambda: limit.data.fill_(17)):
        write()
        check(mod, *x, captured=(table,))
        blocks = looked_for(mod, *x)[1]
        assert blocks and blocks.sparsity() == pytest.approx(100 * (1 - (32, 24)[limit.item() == 17] / 40))


def test_a_read_out_of_range_stays_an_error():
    mod = lambda s, b, h, q, k: torch.where(q < 8, s + bias[0, k + 1], -INF)  # noqa: E731
    assert looked_for(mod)[1] is None
    with pytest.raises(IndexError, match="captured tensor bias"):
        flex_attention(*inputs(), mod, backend="numba_cpu")


def test_explain_tells():
    told = str(explain(*inputs(), FORMS["causal"][0]))
    assert "score_mod makes 40.00% of the positions -inf by whole blocks of 8 x 8: they are left out, and the rest" in told
    assert "runs as a mask and the plain score" in told and "░" in told
    assert "the rest runs as it is" in str(explain(*inputs(), FORMS["ALiBi after"][0]))
    assert "left out" not in str(explain(*inputs(), FORMS["causal"][0], backend="reference"))


@pytest.mark.parametrize("name", ["causal", "a bias before", "ALiBi after", "by head"])
def test_every_engine_runs_what_was_found(name):
    mod = FORMS[name][0]
    for backend in runnable():
        results = []
        for engine in (backend, reference):
            leaves = [t.requires_grad_() for t in inputs(24, 24)]
            problem, tensors = prepare(*leaves, mod)
            assert tensors.found
            out = attend(engine, problem, tensors).out
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5, msg=lambda m, of=backend.name: f"{of}: {m}")


def drawn(draw: random.Random, depth: int) -> str:
    """A formula of a score with masks in it."""
    if depth == 0:
        return draw.choice(["s", "s * 0.5", "s + bias[h, k]", "-INF", "torch.tanh(s)", "s * slope[h]"])
    conditions = ["q >= k", "ids[q] == ids[k]", "q - k < 9", "k < lengths[b]", "h != 1", "s > 0.3", "(q < k) ^ (h == 2)"]
    condition = draw.choice([*conditions, "relative[k] > -0.5"])
    x, y = drawn(draw, depth - 1), drawn(draw, draw.randrange(depth))
    return draw.choice([
        f"torch.where({condition}, {x} + 0 * q, -INF)", f"torch.where({condition}, -INF, {x} + 0 * q)",
        f"torch.where({condition}, {x} + 0 * q, {y} + 0 * q)", f"({x}) + 0.25 * q", f"({x}) * 2",
        f"({x}) / slope[h]", f"({x}) - bias[h, q]",
    ])  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**9), depth=st.integers(1, 4))
def test_any_score_mod_means_what_it_meant(seed, depth):
    text = drawn(random.Random(seed), depth)
    mod = eval(f"lambda s, b, h, q, k: {text}", globals())
    with looked_at():
        check(mod, *inputs(33, 37))


NAN = torch.ones(512).index_fill(0, torch.tensor(40), float("nan"))


@pytest.mark.parametrize(
    "mod",
    [
        lambda s, b, h, q, k: torch.where(q >= k, s, -INF) - torch.where(q >= k, 0.0, -INF),
        lambda s, b, h, q, k: torch.where(q >= k, s, -INF) / torch.where(q >= k, 1.0, -INF),
        lambda s, b, h, q, k: torch.where(q >= k, s, -INF) * torch.where(q >= k, 1.0, -INF),
        lambda s, b, h, q, k: torch.where(q >= k, s, -INF) + torch.where(q >= k, 1.0, INF),
        lambda s, b, h, q, k: torch.where(((k - 5.0).sqrt() % 3.0) < 4.0, -INF, s),
        lambda s, b, h, q, k: torch.where(q >= k, s, -INF) + (NAN[k] % 3.0),
        lambda s, b, h, q, k: torch.where(torch.minimum(s * NAN[k], 3.0 + 0 * s) < 4.0, -INF, s) + 1.0,
        lambda s, b, h, q, k: torch.where(torch.maximum(NAN[k], 3.0 + 0 * NAN[q]) > 2.0, -INF, s),
    ],
)
def test_minus_infinity_beside_what_is_no_number_is_none(mod):
    x = [torch.randn(1, 1, 512, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    query, key, value = x
    out, lse = flex_attention(query, key, value, mod, backend="numba_cpu", return_lse=True)
    want, want_lse = flex_attention(query, key, value, mod, backend="reference", return_lse=True)
    torch.testing.assert_close(out, want, equal_nan=True)
    torch.testing.assert_close(lse, want_lse, equal_nan=True)
