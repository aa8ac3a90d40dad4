"""The logarithm of the sum of exponentials and the greatest score: values, and gradients through lse alone."""

from __future__ import annotations

from flexref.backend import Backend
from flexref.conformance.cases import Blocks, Case
from flexref.conformance.checks import check_case

ALL = ("query", "key", "captured")


def test_gradient_through_lse_alone(backend: Backend):
    for dtype in ("float32", "float64", "bfloat16"):
        case = Case(
            q_len=20,
            kv_len=37,
            kv_heads=2,
            group=2,
            dtype=dtype,
            score="score + bias[h, q_idx, kv_idx]",
            loss="lse",
            wants=ALL,
        )
        check_case(backend, case)


def test_value_gets_no_gradient_from_lse(backend: Backend):
    check_case(backend, Case(q_len=20, kv_len=37, loss="lse", wants=("value",)))


def test_lse_alone_looks_at_no_value(backend: Backend):
    # values hold NaN, at allowed positions too
    for seed in (1, 2):
        case = Case(q_len=20, kv_len=37, values="holes", mask="kv_idx % 5 != 0", score="score + slope[h]", seed=seed)
        check_case(backend, case.but(loss="lse", wants=("query", "value", "captured")))


def test_max_scores_are_after_score_mod(backend: Backend):
    for score in ("score * -2.0", "score + slope[h]", "torch.where(kv_idx == 0, -inf, score)"):
        check_case(
            backend, Case(q_len=20, kv_len=37, score=score, mask="q_idx + 1 >= kv_idx", max_scores=True)
        )


def test_lse_of_listed_blocks(backend: Backend):
    check_case(
        backend,
        Case(
            q_len=50,
            kv_len=70,
            mask="kv_idx % 2 == 0",
            blocks=Blocks((16, 16), by_hand=True),
            max_scores=True,
        ),
    )


def test_lse_far_from_zero(backend: Backend):
    for score in ("score + 5000.0", "score - 5000.0"):
        check_case(backend, Case(q_len=9, kv_len=37, score=score, loss="lse", wants=ALL))
