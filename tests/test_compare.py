"""The error budget of flexref.conformance.compare: what it lets pass, and how small a fault it sees."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from flexref.conformance.call import Call
from flexref.conformance.cases import Case, build
from flexref.conformance.compare import Expectation, evaluate, expectations, kind

ALL = ("query", "key", "value", "captured")
SHAPE = Case(q_len=33, kv_len=70, batch=2, kv_heads=2, group=2, head_dim=16, wants=ALL)
SCORE = "cap * torch.tanh(score / cap) + bias[h, q_idx, kv_idx] * gain"


def shuffled(call: Call, seed: int) -> dict[str, torch.Tensor]:
    """The plain reference's results with keys summed in another order and the heads' dimension reversed."""
    order = torch.randperm(call.key.shape[2], generator=torch.Generator().manual_seed(seed))
    make, mask = call.make_score, call.mask_mod
    other = replace(
        call,
        query=call.query.flip(3),
        key=call.key[:, :, order].flip(3),
        value=call.value[:, :, order],
        make_score=make and (lambda held: lambda s, b, h, q, kv: make(held)(s, b, h, q, order[kv])),
        mask_mod=mask and (lambda b, h, q, kv: mask(b, h, q, order[kv])),
    )
    results, _ = evaluate(other)
    back = order.argsort()
    for name in ("grad key", "grad value"):
        results[name] = results[name][:, :, back]
    results["grad query"], results["grad key"] = results["grad query"].flip(3), results["grad key"].flip(3)
    return results


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("values", ["normal", "large", "positive"])
def test_another_order_of_the_sums_is_within_budget(dtype, values):
    captured = "float64" if dtype == "float64" else "float32"
    case = SHAPE.but(
        dtype=dtype, captured_dtype=captured, values=values, score=SCORE, mask="q_idx + 40 >= kv_idx"
    )
    call = build(case).call
    wanted = expectations(call)
    for seed in range(3):
        for name, result in shuffled(call, seed).items():
            assert wanted[name].judge(result) <= 1


# the smallest relative fault of a whole result that must show, by dtype
FAULT = {"float64": 1e-13, "float32": 2e-5, "bfloat16": 2e-2, "float16": 2.5e-3}
FAULT_LSE = {"float64": 3e-14, "float32": 5e-6, "bfloat16": 5e-6, "float16": 5e-6}


@pytest.mark.parametrize("dtype", list(FAULT))
def test_a_small_fault_is_over_budget(dtype):
    call = build(SHAPE.but(dtype=dtype, values="positive", score="score + slope[h]")).call
    plain, _ = evaluate(call)
    wanted = expectations(call)
    for name, fault in (("out", FAULT[dtype]), ("grad value", FAULT[dtype]), ("lse", FAULT_LSE[dtype])):
        assert wanted[name].judge(plain[name]) <= 1
        moved = (plain[name].to(torch.float64) * (1 + fault)).to(plain[name].dtype)
        with pytest.raises(AssertionError, match="over the error budget"):
            wanted[name].judge(moved)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_wrong_element_is_named(dtype):
    call = build(SHAPE.but(dtype=dtype, score=SCORE)).call
    plain, _ = evaluate(call)
    wanted = expectations(call)
    for name, result in plain.items():
        place = tuple(n // 2 for n in result.shape)
        wrong = result.clone()
        wrong[place] += result.abs().max() * 0.5 + 1
        with pytest.raises(
            AssertionError, match=f"{name}.*{', '.join(map(str, place))}.*1 of {result.numel()}"
        ):
            wanted[name].judge(wrong)


def test_a_missing_position_shows_in_a_long_row():
    call = build(Case(q_len=4, kv_len=1000, head_dim=16, values="positive")).call
    wanted = expectations(call)
    results, _ = evaluate(replace(call, mask_mod=lambda b, h, q, kv: kv != 999))
    for name in ("out", "lse"):
        with pytest.raises(AssertionError):
            wanted[name].judge(results[name])


def test_bfloat16_scores_are_not_float32_scores():
    call = build(Case(q_len=20, kv_len=33, head_dim=64, dtype="bfloat16")).call
    # 65537 s - (65537 s - s) leaves eight bits of s, as bfloat16 has
    rounded = replace(call, make_score=lambda _: lambda s, b, h, q, kv: 65537 * s - (65537 * s - s))
    with pytest.raises(AssertionError, match="lse"):
        expectations(call)["lse"].judge(evaluate(rounded)[0]["lse"])


def test_nan_and_infinities_must_be_in_place():
    exact = torch.tensor([0.0, math.inf, -math.inf, math.nan, 1.0], dtype=torch.float64)
    zero = torch.zeros(5, dtype=torch.float64)
    wanted = Expectation("out", torch.float32, exact, exact, zero + 1e-6)
    assert kind(exact).tolist() == [0, 1, 2, 3, 0]
    assert wanted.judge(exact.float()) == 0
    for place, value in ((0, math.nan), (1, math.nan), (2, math.inf), (3, 0.0), (4, -math.inf)):
        wrong = exact.float().clone()
        wrong[place] = value
        with pytest.raises(AssertionError, match=rf"out\[{place}\] is not"):
            wanted.judge(wrong)


def test_where_the_references_disagree_nothing_is_said():
    exact, plain = (
        torch.tensor([1.0, 1e300], dtype=torch.float64),
        torch.tensor([1.0, math.inf], dtype=torch.float64),
    )
    wanted = Expectation("out", torch.float32, exact, plain, torch.zeros(2, dtype=torch.float64))
    wanted.judge(torch.tensor([1.0, math.inf]))
    wanted.judge(torch.tensor([1.0, math.nan]))


def test_shape_and_dtype_are_part_of_the_result():
    call = build(Case()).call
    wanted, (plain, _) = expectations(call), evaluate(call)
    with pytest.raises(AssertionError, match="dtype|float64"):
        wanted["out"].judge(plain["out"].double())
    with pytest.raises(AssertionError, match="shape"):
        wanted["out"].judge(plain["out"][..., :-1])
