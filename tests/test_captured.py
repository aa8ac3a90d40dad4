"""Which captured tensors a mod may read: every engine the same, refused before any of them is asked."""
from __future__ import annotations

import pytest
import torch

from flexref import create_block_mask, create_mask
from flexref.arguments import prepare
from flexref.autograd import attend
from flexref.errors import TraceError
from flexref.program.trace import trace
from flexref.reference import einsum, loops
from tests.engines import runnable

REFUSED = ["uint64", "float8_e4m3fn", "float8_e5m2", "complex64"]
READ = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_dtype_that_not_every_engine_reads_is_refused_with_a_remedy(name):
    table = torch.zeros(8, dtype=getattr(torch, name))
    with pytest.raises(TraceError, match=rf"table of torch.{name}, .*test_captured.py:.*\.to\(\)"):
        trace(lambda s, b, h, i, j: s + table[j], "score")


@pytest.mark.parametrize("name", ["uint16", "uint32"])
def test_unsigned_integers_are_read_as_wider_ones(name):
    table = torch.tensor([1, 2, 60000, 3]).to(getattr(torch, name))
    traced = trace(lambda s, b, h, i, j: s + table[j] * table[0], "score")
    (read,) = traced.captured
    assert read.dtype == torch.int64 and read.tolist() == table.tolist() and traced.roots == (table,)


@pytest.mark.parametrize("name", READ)
def test_every_other_dtype_is_read(name):
    table = torch.zeros(8, dtype=getattr(torch, name))
    assert trace(lambda s, b, h, i, j: s + table[j], "score").captured == (table,)


def test_item_of_a_captured_tensor_is_told_to_be_read_before_the_call():
    scale = torch.tensor(2.0)
    with pytest.raises(TraceError, match=r"item\(\) on a captured tensor, at .*before the call and capture it"):
        trace(lambda s, b, h, i, j: s * scale.item(), "score")


WHOLE = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64"]


@pytest.mark.parametrize("name", WHOLE)
def test_an_index_of_any_whole_type_is_that_number(name):
    """PyTorch takes uint8 for a mask and refuses int8 and int16; a mod has one integer (R1), and the number is what is meant."""
    torch.manual_seed(0)
    wide = torch.tensor([0, 3, 7, 1] * 5) if name[0] == "u" else torch.tensor([0, -3, 7, -8] * 5)
    narrow = wide.to(getattr(torch, name))
    table = torch.randn(8, requires_grad=True)
    inside = torch.tensor([True, False] * 4)
    x = torch.randn(1, 1, 20, 4)

    def mods(index):
        return (
            lambda s, b, h, i, j: s + table[index[j]] * (index[i] > 2),
            lambda b, h, i, j: inside[index[i]] | (index[i] == index[j]),
        )

    score_mod, mask_mod = mods(wide)
    want = einsum(x, x, x, score_mod, mask_mod)
    wanted = (want.out, *torch.autograd.grad(want.out.square().sum(), table))
    dense = create_mask(mask_mod, 1, 1, 20, 20, device="cpu")
    score_mod, mask_mod = mods(narrow)
    assert torch.equal(create_mask(mask_mod, 1, 1, 20, 20, device="cpu"), dense)
    block_mask = create_block_mask(mask_mod, 1, 1, 20, 20, "cpu", BLOCK_SIZE=(16, 8))
    assert torch.equal(loops(x, x, x, score_mod, mask_mod, index=torch.tensor).out, loops(x, x, x, *mods(wide)).out)
    for backend in runnable():
        out = attend(backend, *prepare(x, x, x, score_mod, block_mask)).out
        for got, expected in zip((out, *torch.autograd.grad(out.square().sum(), table)), wanted, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=lambda m, of=backend.name: f"{of}: {m}")


@pytest.mark.parametrize("name", WHOLE[:3])
def test_arithmetic_that_would_wrap_is_refused(name):
    index = torch.tensor([0, 1, 2, 3]).to(getattr(torch, name))
    for mod in (lambda b, h, i, j: (index[i] + 1) > 2, lambda b, h, i, j: index[i] * index[j] > 2):
        with pytest.raises(TraceError, match=rf"gives torch.{name}; use bool, int32, int64"):
            trace(mod, "mask")
    # with one of more bits it does not wrap
    assert trace(lambda b, h, i, j: (index[i] + i) > 2, "mask").captured == (index,)
