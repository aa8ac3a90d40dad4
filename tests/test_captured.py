"""Which captured tensors a mod may read: every engine the same, refused before any of them is asked."""
from __future__ import annotations

import pytest
import torch

from flexref.errors import TraceError
from flexref.program.trace import trace

REFUSED = ["uint64", "float8_e4m3fn", "float8_e5m2", "complex64"]
READ = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_dtype_that_not_every_engine_reads_is_refused_with_a_remedy(name):
    table = torch.zeros(8, dtype=getattr(torch, name))
    with pytest.raises(TraceError, match=rf"table of torch.{name}, .*test_captured.py:.*\.to\(\)"):
        trace(lambda s, b, h, i, j: s + table[j], "score")


@pytest.mark.parametrize(("name", "wide"), [("uint16", torch.int32), ("uint32", torch.int64)])
def test_unsigned_integers_are_read_as_wider_ones(name, wide):
    table = torch.tensor([1, 2, 60000, 3]).to(getattr(torch, name))
    traced = trace(lambda s, b, h, i, j: s + table[j] * table[0], "score")
    (read,) = traced.captured
    assert read.dtype == wide and read.tolist() == table.tolist() and traced.roots == (table,)


@pytest.mark.parametrize("name", READ)
def test_every_other_dtype_is_read(name):
    table = torch.zeros(8, dtype=getattr(torch, name))
    assert trace(lambda s, b, h, i, j: s + table[j], "score").captured == (table,)


def test_item_of_a_captured_tensor_is_told_to_be_read_before_the_call():
    scale = torch.tensor(2.0)
    with pytest.raises(TraceError, match=r"item\(\) on a captured tensor, at .*before the call and capture it"):
        trace(lambda s, b, h, i, j: s * scale.item(), "score")
