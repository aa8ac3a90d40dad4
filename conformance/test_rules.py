"""One test for each rule of meaning, R1 to R16 (docs/semantics.md): the smallest problems that tell it apart."""

from __future__ import annotations

import math

import pytest
import torch

from flexref.arguments import prepare
from flexref.autograd import attend
from flexref.backend import Backend
from flexref.conformance.cases import Blocks, Built, Case, build
from flexref.conformance.checks import check_case, check_same_bits, device_of, run_case
from flexref.conformance.layouts import LAYOUTS
from flexref.conformance.ledger import LEDGER

ALL = ("query", "key", "value", "captured")
CAUSAL = "q_idx >= kv_idx"


def _call(backend: Backend, built: Built) -> None:
    """The call that must raise an error; counted as a comparison by the caller."""
    problem, tensors = prepare(**built.arguments)
    if reasons := backend.unsupported(problem):
        LEDGER.refuse(reasons)
        pytest.skip(f"unsupported: {'; '.join(reasons)}")
    attend(backend, problem, tensors)


def test_r01_accumulation_type(backend: Backend):
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        check_case(backend, Case(q_len=20, kv_len=33, head_dim=64, dtype=dtype, max_scores=True, wants=ALL))
    check_case(backend, Case(head_dim=128, dtype="bfloat16", values="integers", scale=1.0, max_scores=True))
    for dtype in (torch.int32, torch.complex64, torch.bool):
        x = torch.ones(1, 1, 4, 8, dtype=dtype)
        with pytest.raises(TypeError, match="query"):
            prepare(x, x, x)


def test_r02_arguments_of_a_score_mod(backend: Backend):
    shape = Case(q_len=20, kv_len=23, batch=2, kv_heads=2, group=2, wants=ALL)
    check_case(backend, shape.but(score="score + b * 1.5 - h * 0.75 + q_idx * 0.1 - kv_idx * 0.2"))
    check_case(backend, shape.but(score="score + (q_idx * 3000000019 + kv_idx * 4000000007) % 11 * 0.1"))
    # a score in the inputs' type would lose 2 ** -12
    check_case(
        backend, shape.but(dtype="bfloat16", score="(score + 256.0) - 256.0 + 0.000244140625 * kv_idx")
    )


def test_r03_allowed_position(backend: Backend):
    shape = Case(q_len=50, kv_len=70, batch=2, kv_heads=2, wants=ALL)
    for batch, heads, seed in ((False, True, 1), (True, False, 2)):
        blocks = Blocks((16, 16), batch, heads, by_hand=True)
        check_case(backend, shape.but(mask="(q_idx + kv_idx) % 3 != 0", blocks=blocks, seed=seed))
    check_case(backend, shape.but(mask="True"))
    check_case(backend, shape.but(mask="False"))


def test_r04_masked_position_contributes_nothing(backend: Backend):
    shape = Case(q_len=40, kv_len=40, batch=2, values="holes", wants=ALL)
    for seed in (0, 1, 2):
        check_case(backend, shape.but(mask=CAUSAL, score="score + col[b, kv_idx]", seed=seed))
    blocks = Blocks((16, 16), by_hand=True)
    check_case(backend, shape.but(mask="kv_idx % 2 == 0", blocks=blocks))
    dividing = "(score + col[b, kv_idx]) / torch.where(flag[kv_idx], 1.0, 0.0)"
    check_case(backend, shape.but(values="normal", mask="flag[kv_idx]", score=dividing))


def test_r05_minus_infinity_is_masked(backend: Backend):
    shape = Case(q_len=40, kv_len=37, kv_heads=2, wants=ALL)
    check_case(backend, shape.but(score="torch.where(q_idx >= kv_idx, score, -inf)", max_scores=True))
    check_case(backend, shape.but(score="torch.where(keep[h, q_idx, kv_idx], score + slope[h], -inf)"))
    check_case(backend, shape.but(score="torch.where(q_idx % 2 == 0, score, -inf)", mask=CAUSAL))


def test_r06_row_with_no_allowed_position(backend: Backend):
    shape = Case(q_len=40, kv_len=37, batch=2, wants=ALL, max_scores=True)
    for mask in ("kv_idx < q_idx - 3", "q_idx < 0", "kv_idx < length[b] * (b - 0)"):
        ran = check_case(backend, shape.but(mask=mask, score="score + slope[h] * kv_idx"))
        if ran is not None:
            empty = torch.isneginf(ran.results["lse"])
            assert empty.any() and not ran.results["out"][empty].any(), (
                "a row with nothing allowed is 0, lse -inf"
            )
            assert not ran.results["grad query"][empty].any()


def test_r07_nan_stays_in_its_row(backend: Backend):
    shape = Case(q_len=20, kv_len=33, wants=("query",))
    for score in (
        "torch.where((q_idx == 5) & (kv_idx == 3), inf, score)",
        "torch.where(q_idx == 7, nan, score)",
        "torch.sqrt(torch.where(q_idx == 7, -1.0, 1.0)) * score",
    ):
        ran = check_case(backend, shape.but(score=score))
        if ran is not None:
            rows = torch.isnan(ran.results["out"]).any(-1).sum()
            assert rows == 1, f"{int(rows)} rows are NaN, not 1"


def test_r08_lse_is_natural_and_differentiable(backend: Backend):
    check_case(
        backend, Case(q_len=20, kv_len=37, kv_heads=2, loss="lse", wants=ALL, score="score * slope[h]")
    )
    check_case(backend, Case(q_len=20, kv_len=37, dtype="bfloat16", loss="both", wants=ALL, mask=CAUSAL))
    ran = run_case(backend, Case(kv_len=37, scale=0.0))
    if ran is not None:
        error = (ran.results["lse"] - math.log(37)).abs().max()
        assert error < 1e-5, f"lse of 37 equal scores is log(37), off by {float(error)}"


def test_r09_shapes_and_zero_lengths(backend: Backend):
    for head_dim, value_dim in ((1, 1), (3, 17), (65, 2), (130, 96)):
        check_case(backend, Case(q_len=17, kv_len=19, head_dim=head_dim, value_dim=value_dim, wants=ALL))
    for q_len, kv_len in ((1, 1), (1, 65), (65, 1), (0, 5), (5, 0), (0, 0)):
        check_case(backend, Case(q_len=q_len, kv_len=kv_len, kv_heads=2, wants=ALL, max_scores=True))


def test_r10_grouped_heads(backend: Backend):
    for kv_heads, group in ((1, 3), (2, 2), (3, 5)):
        check_case(backend, Case(q_len=17, kv_len=33, kv_heads=kv_heads, group=group, wants=ALL))
    query, key = torch.ones(1, 3, 4, 8), torch.ones(1, 2, 4, 8)
    with pytest.raises(ValueError, match="heads"):
        prepare(query, key, key, enable_gqa=True)
    with pytest.raises(ValueError, match="heads|agree"):
        prepare(query[:, :2], key, key[:, :1])


def test_r11_broadcast_only_from_one(backend: Backend):
    shape = Case(q_len=33, kv_len=40, batch=3, kv_heads=2, wants=ALL)
    for batch, heads in ((False, False), (True, False), (False, True), (True, True)):
        check_case(backend, shape.but(mask="True", blocks=Blocks((16, 16), batch, heads, by_hand=True)))
    check_case(backend, shape.but(kv_batch=1))
    two = build(Case(q_len=32, kv_len=32, batch=2, mask=CAUSAL, blocks=Blocks(batch=True))).arguments[
        "block_mask"
    ]
    x = torch.ones(4, 1, 32, 8)
    with pytest.raises(ValueError, match="block_mask"):
        prepare(x, x, x, block_mask=two)
    with pytest.raises(ValueError, match="batch"):
        prepare(x, x[:2], x[:2])


def test_r12_captured_gradients(backend: Backend):
    shape = Case(q_len=20, kv_len=35, batch=2, kv_heads=2, wants=("captured",))
    for score in (
        "score * gain",
        "score + bias[h][q_idx][kv_idx]",
        "score + grid[b, h, q_idx, kv_idx]",
        "slope[h] * (kv_idx - q_idx)",
        "score + rel[q_idx - kv_idx] * rel[kv_idx]",
        "score + col[b, pick[kv_idx]] + row[q_idx] * gain",
        "torch.where(flag[kv_idx], score, col[b, kv_idx])",
    ):
        check_case(backend, shape.but(score=score))
    check_case(
        backend,
        shape.but(dtype="bfloat16", captured_dtype="bfloat16", score="score + bias[h, q_idx, kv_idx]"),
    )


def test_r13_index_out_of_range(backend: Backend):
    shape = Case(q_len=17, kv_len=17, batch=2)
    for score, name in (
        ("score + col[b, kv_idx + 1]", "col"),
        ("score + row[q_idx - 18]", "row"),
        ("score + slope[h + 1]", "slope"),
    ):
        with pytest.raises(IndexError, match=rf"\b{name}\b"):
            _call(backend, build(shape.but(score=score), device_of(backend)))
        LEDGER.compare()
    built = build(shape.but(score="score + col[b, pick[kv_idx]]"), device_of(backend))
    built.captured["pick"][3] = 17
    with pytest.raises(IndexError, match=r"\bcol\b"):
        _call(backend, built)
    # negative indices wrap, and what is masked is never read
    check_case(backend, shape.but(score="score + row[q_idx - 17] + col[b, wrap[kv_idx]]", wants=ALL))
    check_case(backend, shape.but(score="score + col[b, kv_idx + 1]", mask="kv_idx < 16", wants=ALL))


def test_r14_any_strides_inputs_unwritten(backend: Backend):
    for layout in LAYOUTS:
        case = Case(
            q_len=18,
            kv_len=21,
            kv_heads=2,
            group=2,
            head_dim=9,
            value_dim=7,
            layouts=(layout,) * 3,
            wants=ALL,
        )
        check_case(backend, case)


def test_r15_same_call_same_bits(backend: Backend):
    shape = Case(q_len=65, kv_len=97, batch=2, kv_heads=2, group=2, wants=ALL, deterministic=True)
    check_same_bits(
        backend, shape.but(score="score * gain + slope[h] * (kv_idx - q_idx) + rel[q_idx - kv_idx]")
    )
    check_same_bits(backend, shape.but(dtype="bfloat16", mask=CAUSAL, blocks=Blocks((16, 16))))


def test_r16_a_sink_takes_weight_and_gives_no_value(backend: Backend):
    shape = Case(q_len=20, kv_len=33, batch=2, kv_heads=2, group=2, max_scores=True, wants=ALL)
    # an emulated engine is slow, and sinks are above it
    dtypes = ("bfloat16", "float32") if hasattr(backend, "how") else ("float16", "bfloat16", "float32", "float64")
    for dtype in dtypes:
        check_case(backend, shape.but(sinks=1, dtype=dtype, score="score + slope[h]"))
    # rows with no allowed key, lse alone, scores that dwarf the sink, and a sink that dwarfs them
    check_case(backend, shape.but(sinks=3, mask="kv_idx < q_idx - 3", score="score * gain"))
    check_case(backend, shape.but(sinks=2, mask="kv_idx < q_idx - 3", loss="lse"))
    for score in ("score + 300.0", "score - 300.0"):
        check_case(backend, shape.but(sinks=1, score=score))
    check_case(backend, shape.but(sinks=4, blocks=Blocks((16, 16), heads=True, by_hand=True), mask="(q_idx + kv_idx) % 3 != 0"))
