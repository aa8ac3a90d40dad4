"""Emitters by a table: one program, the exact lines of each language."""

from __future__ import annotations

import math

import pytest
import torch

from flexref.backends.numba_cpu.emitter import NumbaEmitter
from flexref.problem import Capture
from flexref.program.builder import Builder, Ref
from flexref.program.ops import OPS
from flexref.program.trace import trace

bias = torch.zeros(4, 6)
CAPTURES = (Capture("bias", torch.float32, (4, 6)),)
INPUTS = {name: name for name in ("score", "b", "h", "q_idx", "kv_idx", "grad")}


def numba_lines(mod, kind="score", small=frozenset(), safe=frozenset(), captures=CAPTURES) -> list[str]:
    return NumbaEmitter(captures, small, safe).emit(trace(mod, kind).graph, "v", INPUTS)[0]


def test_one_operation_a_line():
    assert numba_lines(lambda s, b, h, q, k: 5.0 * torch.tanh(s / 5.0)) == [
        "v1 = real(real(5.0))",
        "v2 = real(score / v1)",
        "v3 = real(maths.tanh(v2))",
        "v4 = real(v3 * v1)",
    ]


def test_ints_are_narrow_only_where_that_is_proved():
    assert numba_lines(lambda b, h, q, k: q - k < 3, "mask", small=frozenset({2})) == [
        "v2 = int32(q_idx - kv_idx)",
        "v3 = int64(3)",
        "v4 = v2 < v3",
    ]


def test_a_read_is_checked_unless_it_is_proved_to_be_in_range():
    checked = numba_lines(lambda s, b, h, q, k: s + bias[h, q])
    assert "wrong |= int32(v3_1_bad & concerned)" in checked
    assert checked[-2] == "v3 = real(pointer(c0, float32)[v3_0 * c0_s0 + v3_1 * c0_s1])"
    proved = numba_lines(lambda s, b, h, q, k: s + bias[h, q], safe=frozenset({(3, 0), (3, 1)}))
    assert proved[:2] == ["v3_0 = int64(h)", "v3_1 = int64(q_at)"] and not any("wrong" in x for x in proved)


@pytest.mark.parametrize(
    ("value", "type", "text"),
    [
        (0.0, "float", "real(0.0)"),
        (-0.0, "float", "real(-0.0)"),
        (-2.5, "float", "real(-2.5)"),
        (math.inf, "float", "INF"),
        (-math.inf, "float", "-INF"),
        (math.nan, "float", "NAN"),
        (-(2**63), "int", str(-(2**63))),
        (True, "bool", "True"),
    ],
)
def test_literals(value, type, text):
    assert NumbaEmitter((), frozenset(), frozenset()).literal(value, type) == text


@pytest.mark.parametrize("op", OPS)
def test_every_operation_of_every_type_is_spelled(op):
    for number in ("int", "float") if set(OPS[op].signature) & {"n", "t"} else ("float",):
        names = {"f": "float", "i": "int", "b": "bool", "n": number, "t": number}
        builder = Builder()
        *arguments, _ = (names[letter] for letter in OPS[op].signature)
        loads = [Ref(builder.node("load", (), type, i)) for i, type in enumerate(arguments)]
        graph = builder.graph({"out": builder.op(op, *loads).position})
        dtypes = {"float": torch.float32, "int": torch.int64, "bool": torch.bool}
        captures = tuple(Capture(f"x{i}", dtypes[type], ()) for i, type in enumerate(arguments))
        lines, _ = NumbaEmitter(captures, frozenset(), frozenset()).emit(graph, "v", {})
        assert lines[-1].startswith(f"v{len(arguments)} = ") and "{" not in lines[-1]
