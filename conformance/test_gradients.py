"""Gradients of query, key, value and captured tensors: any problem, each input alone, and slopes that are hard."""

from __future__ import annotations

from hypothesis import given

from flexref.backend import Backend
from flexref.conformance.cases import Case
from flexref.conformance.checks import check_case
from flexref.conformance.strategies import cases

ALL = ("query", "key", "value", "captured")


@given(case=cases(gradients=True))
def test_any_gradient(backend: Backend, case: Case):
    check_case(backend, case)


def test_each_input_alone(backend: Backend):
    for name in ALL:
        check_case(
            backend,
            Case(
                q_len=20, kv_len=37, score="score + slope[h] * kv_idx", mask="q_idx >= kv_idx", wants=(name,)
            ),
        )


def test_long_sums(backend: Backend):
    check_case(backend, Case(q_len=2051, kv_len=5, wants=ALL, score="score * gain"))
    check_case(backend, Case(q_len=2051, kv_len=5, wants=ALL, dtype="bfloat16"))


def test_repeated_reads_of_one_element(backend: Backend):
    # every position adds to the same few elements: lost updates show
    check_case(
        backend, Case(q_len=65, kv_len=65, batch=2, kv_heads=2, score="score + rel[doc[kv_idx]]", wants=ALL)
    )


def test_slopes_where_a_mod_bends(backend: Backend):
    # scores are small integers, exact in every type, and many of them lie on the bend
    shape = Case(q_len=20, kv_len=33, head_dim=4, values="integers", scale=1.0, wants=ALL)
    for score in (
        "torch.relu(score)",
        "torch.abs(score)",
        "torch.clamp(score, -2, 2)",
        "torch.where(score > 1.0, score, 0.5 * score)",
    ):
        check_case(backend, shape.but(score=score))


def test_a_branch_that_was_not_taken_contributes_nothing(backend: Backend):
    # the other branch has an infinite or a NaN derivative, in float64 too; nobody takes those that only a tensor makes
    shape = Case(q_len=20, kv_len=33, head_dim=4, kv_heads=2, wants=ALL)
    for score in (
        "torch.where(score > 0, score, torch.exp(score * -1e9) * 0 + torch.exp(score))",
        "torch.where(kv_idx >= 0, score, torch.exp(slope[h] * slope[h] * 1e9))",
        "torch.where(q_idx > kv_idx, score * gain, score + torch.sqrt(gain - 1000.0))",
        "torch.exp(score * score * 1e9).clamp(max=2.0) + score",
        "torch.maximum(score, -torch.exp(row[q_idx] * row[q_idx] * 1e9))",
        "(score * 0.5).masked_fill(q_idx < kv_idx, 1.0) + torch.relu(-1.0 - torch.exp(score * score * 1e9))",
    ):
        check_case(backend, shape.but(score=score))


def test_float64_captured_by_a_float32_problem(backend: Backend):
    check_case(
        backend,
        Case(q_len=20, kv_len=33, captured_dtype="float64", score="score * gain + row[q_idx]", wants=ALL),
    )
