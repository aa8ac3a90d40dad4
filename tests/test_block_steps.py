"""rows(): steps of decoding, by a number or by a tensor that nobody waits for."""
from __future__ import annotations

from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flexref import BlockMask, create_block_mask, create_mask, flex_attention
from flexref.arguments import prepare
from flexref.autograd import attend
from flexref.blocks.lists import one_by_one
from flexref.blocks.steps import _KEPT
from flexref.variants import masks
from tests.engines import runnable

LONGEST = 30
ids = torch.arange(LONGEST) // 7
table = torch.rand(2, 3, LONGEST, LONGEST, generator=torch.Generator().manual_seed(0)) < 0.8


def heads_differ(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & (q_idx - kv_idx < 3 + 5 * h + b)


MODS = [masks.causal, heads_differ, masks.document(ids), masks.sliding_window(9), masks.from_table(table)]
grids = st.tuples(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, LONGEST), st.integers(0, LONGEST), st.integers(1, 9), st.integers(1, 9)
)
SETTINGS = settings(max_examples=60, deadline=None)


def made(mod, grid) -> BlockMask:
    return create_block_mask(mod, *grid[:4], device="cpu", BLOCK_SIZE=grid[4:])


def allowed(mask: BlockMask) -> Tensor:
    """What lists and mask_mod say together: bool (B, H, q_len, kv_len)."""
    mask.validate("structure")
    listed, full = mask.listed()
    return listed & (full | create_mask(mask.mask_mod, *mask.shape, device="cpu"))


@SETTINGS
@given(st.sampled_from(MODS), grids, st.data())
def test_a_tensor_is_the_number_that_it_holds(mod, grid, data):
    mask = made(mod, grid)
    whole, q_len = allowed(mask), grid[2]
    length = data.draw(st.integers(1, q_len))
    for start in range(q_len - length + 1):
        step = mask.rows(torch.tensor(start, dtype=data.draw(st.sampled_from([torch.int64, torch.int32]))), length=length)
        number = mask.rows(start, length=length)
        assert step.shape == number.shape == (*grid[:2], length, grid[3])
        assert torch.equal(allowed(step), whole[:, :, start : start + length])
        assert torch.equal(allowed(number), whole[:, :, start : start + length])
        # full blocks say what every one of their positions does
        assert bool((step.listed()[1] <= whole[:, :, start : start + length]).all())
        if start // grid[4] == (start + length - 1) // grid[4]:
            assert all(torch.equal(a, b) for a, b in zip(step.runs, number.runs, strict=True))
        # engines of plain lists are given those of the same rows, whatever stands behind them
        for walk in (step.walk, number.walk):
            for i in (0, 2):
                got, wanted = walk.csr[i : i + 2], one_by_one(walk.lists)[i : i + 2]
                rows = zip(got[0][:-1].tolist(), got[0][1:].tolist(), strict=True)
                pieces = [got[1][:0], *(got[1][first:last] for first, last in rows)]
                assert torch.equal(got[0].diff(), wanted[0].diff()) and torch.equal(torch.cat(pieces), wanted[1])


@SETTINGS
@given(st.sampled_from(MODS), grids, st.data())
def test_lists_that_say_less_than_the_mask_mod(mod, grid, data):
    """As from_kv_blocks makes them: what the lists leave out stays out, in whatever step."""
    mask = made(masks.sliding_window(4), grid)
    lists = mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices
    mask = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=grid[4:], mask_mod=mod, seq_lengths=mask.seq_lengths)
    whole, length = allowed(mask), data.draw(st.integers(1, grid[2]))
    start = data.draw(st.integers(0, grid[2] - length))
    for step in (mask.rows(torch.tensor(start), length=length), mask.rows(start, start + length)):
        assert torch.equal(allowed(step), whole[:, :, start : start + length])


@pytest.mark.parametrize("length", (1, 3, 11))
def test_out_of_range_nothing_is_allowed(length):
    mask = create_block_mask(heads_differ, 1, 3, LONGEST, LONGEST, "cpu", 4)
    query, key = torch.randn(1, 3, length, 8), torch.randn(1, 3, LONGEST, 8)
    for start in (-1, LONGEST - length + 1, LONGEST, 10**12, -(10**12)):
        step = mask.rows(torch.tensor(start), length=length)
        assert not step.listed()[0].any()
        for engine in ("numba_cpu", "reference"):
            assert not flex_attention(query, key, key, block_mask=step, backend=engine).any()
    with pytest.raises(IndexError, match=f"rows {LONGEST} to {LONGEST + length} are not within the {LONGEST} queries"):
        mask.rows(LONGEST, length=length)


@pytest.mark.parametrize("engine", runnable(), ids=lambda engine: engine.name)
@pytest.mark.parametrize("length", (1, 5))
def test_decoding_with_a_tensor_that_is_advanced(engine, length):
    """Each step attends as the rows of the whole do, and a mask stays what it was when its tensor is advanced."""
    draw = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, 3, 24, 8, generator=draw) for _ in range(3))
    mask = create_block_mask(heads_differ, 1, 3, 24, 24, "cpu", (6, 8))
    whole = flex_attention(query, key, value, block_mask=mask, backend="reference")
    start, before = torch.tensor(4), []
    for at in range(4, 4 + 2 * length, length):
        step = mask.rows(start, length=length)
        before.append((at, step))
        start += length
    start += 10**6
    for at, step in before:
        part = query[:, :, at : at + length].clone().requires_grad_()
        keys = key.clone().requires_grad_()
        out = attend(engine, *prepare(part, keys, value, None, step)).out
        torch.testing.assert_close(out, whole[:, :, at : at + length])
        weight = torch.randn(out.shape, generator=draw)
        got = torch.autograd.grad(out, (part, keys), weight)
        number = flex_attention(part, keys, value, block_mask=mask.rows(at, at + length), backend="reference")
        torch.testing.assert_close(got, torch.autograd.grad(number, (part, keys), weight))


class NoNumbers(TorchDispatchMode):
    """Raises where the host asks for what is on the device: a number, or a shape that depends on contents."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave", "equal", "is_nonzero", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert not name.startswith(self.WAITS) and not name.startswith("_unique"), f"{func} waits for the device"
        indices = args[1] if name in ("index", "index_put_") else ()
        assert not any(x is not None and x.dtype == torch.bool for x in indices), "a mask as an index waits for the device"
        return func(*args, **(kwargs or {}))


@contextmanager
def no_wait():
    def waits(*_, **__):
        raise AssertionError("the host reads what is on the device")

    names = "item tolist numpy cpu nonzero __int__ __bool__ __index__ __float__ __array__".split()
    with NoNumbers(), ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(Tensor, name, waits))
        yield


@pytest.mark.parametrize("mod", (masks.causal, heads_differ))
@pytest.mark.parametrize("length", (1, 3, 9))
def test_no_step_waits_for_the_device(mod, length):
    mask = create_block_mask(mod, 1, 3 if mod is heads_differ else 1, LONGEST, LONGEST, "cpu", 4)
    start = torch.tensor(8)
    starts = [start] if length > 4 else [start, 8]
    for first in starts:
        step = mask.rows(first, length=length)
        wanted = step.runs, step.walk.csr, step.walk.row_order
        with no_wait():
            start += 0
            step = mask.rows(first, length=length)
            # what engines ask for a forward
            got = step.walk.runs, step.walk.csr, step.walk.row_order
        assert all(torch.equal(a, b) for a, b in zip(step.runs, wanted[0], strict=True))
        assert all(torch.equal(a, b) for a, b in zip((*got[1], got[2]), (*wanted[1], wanted[2]), strict=True))
    with pytest.raises(AssertionError, match="the host reads"), no_wait():
        int(start)
    with pytest.raises(AssertionError, match="waits for the device"), no_wait():
        torch.ones(3).repeat_interleave(torch.tensor([1, 2, 0]))


def test_what_is_made_once_is_made_once_and_not_kept_for_ever():
    mask = create_block_mask(heads_differ, 1, 3, LONGEST, LONGEST, "cpu", 4)
    start = torch.tensor(3)
    a, b = mask.rows(start, length=2), mask.rows(start, length=2)
    assert a.walk.runs.indices is b.walk.runs.indices and a == b and a != mask.rows(start + 1, length=2)
    for length in range(1, LONGEST):
        mask.rows(start, length=length)
    assert len(mask.walk.kept) <= _KEPT
    # a step of a step, a slice of one, and one that is written out
    step = mask.rows(3, 6)
    assert torch.equal(allowed(step.rows(torch.tensor(1), length=2)), allowed(mask)[:, :, 4:6])
    assert torch.equal(allowed(step[:, 1:]), allowed(mask)[:, 1:, 3:6])
    assert torch.equal(allowed(~a), ~allowed(a)) and torch.equal(allowed(a.transpose()), allowed(a).mT)


def test_starts_that_are_refused():
    mask = create_block_mask(masks.causal, None, None, 16, 16, "cpu", 8)
    start = torch.tensor(3)
    for wrong in (torch.tensor([3]), torch.tensor(3.0), torch.tensor(True)):
        with pytest.raises(TypeError, match="start must be an int or a 0-d tensor of integers"):
            mask.rows(wrong, length=1)
    with pytest.raises(ValueError, match="start is on meta, but the mask on cpu"):
        mask.rows(start.to("meta"), length=1)
    for arguments in (dict(stop=4), dict(), dict(stop=4, length=1)):
        with pytest.raises(TypeError, match="how many queries there are must be a number"):
            mask.rows(start, **arguments)  # type: ignore[arg-type]
    for arguments in (dict(), dict(stop=4, length=1)):
        with pytest.raises(TypeError, match="give one of stop and length"):
            mask.rows(3, **arguments)  # type: ignore[arg-type]
    for length in (-1, 17):
        with pytest.raises(IndexError, match="rows are not within the 16 queries"):
            mask.rows(start, length=length)
    assert mask.rows(start, length=0).shape == (1, 1, 0, 16)
