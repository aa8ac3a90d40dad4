"""Values: any problem at all, and the sizes at which kernels change their way."""

from __future__ import annotations

from hypothesis import given

from flexref.backend import Backend
from flexref.conformance.cases import Case
from flexref.conformance.checks import check_case
from flexref.conformance.strategies import cases


@given(case=cases())
def test_any_forward(backend: Backend, case: Case):
    check_case(backend, case)


def test_long_rows(backend: Backend):
    check_case(backend, Case(q_len=3, kv_len=4099, max_scores=True))
    check_case(backend, Case(q_len=3, kv_len=4099, dtype="bfloat16", mask="kv_idx % 3 != 0"))


def test_many_queries(backend: Backend):
    check_case(backend, Case(q_len=4099, kv_len=3, mask="(q_idx + kv_idx) % 2 == 0"))


def test_many_heads(backend: Backend):
    check_case(backend, Case(q_len=5, kv_len=9, batch=7, kv_heads=5, group=3, score="score + slope[h]"))


def test_scores_that_grow_along_the_row(backend: Backend):
    # each tile raises the maximum, and then each lowers it: every rescaling counts
    for score in ("score + kv_idx * 1.0", "score - kv_idx * 1.0", "score + (kv_idx % 40) * 2.0"):
        check_case(backend, Case(q_len=9, kv_len=150, score=score, max_scores=True))


def test_scores_far_from_zero(backend: Backend):
    for score in ("score + 1000.0", "score - 1000.0", "score * 100.0"):
        check_case(backend, Case(q_len=9, kv_len=65, score=score, max_scores=True))
    check_case(backend, Case(q_len=9, kv_len=65, values="large", scale=4.0, dtype="bfloat16"))
