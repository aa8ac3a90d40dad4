"""Blocks found by splitting are those of brute force, for whatever program, table, grid and order of splitting."""
from __future__ import annotations

import random
import re
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexref import create_block_mask, create_mask
from flexref.blocks import build, estimate, split
from flexref.blocks.runs import merged, runs_of, written_out
from flexref.program import range_tables
from flexref.program.interval import interval
from flexref.variants import masks

LENGTH = 60
generator = torch.Generator().manual_seed(0)
ids = torch.randint(0, 5, (LENGTH,), generator=generator).sort().values
shuffled = torch.randperm(LENGTH, generator=generator)
per_batch = torch.randint(0, 4, (2, LENGTH), generator=generator).sort(1).values
window = torch.tensor([3, 11, 0])
weights = torch.randn(LENGTH, generator=generator)
holes = weights.masked_fill(weights > 1.5, float("nan"))
flags = torch.rand(LENGTH, generator=generator) < 0.8
dense = torch.rand(3, LENGTH, LENGTH, generator=generator) < 0.9
huge = torch.tensor([1 << 53, (1 << 53) + 1, (1 << 62), -(1 << 62)]).repeat(LENGTH // 4).sort().values
small = torch.randint(0, 9, (LENGTH,), generator=generator).to(torch.uint8)


def whole(draw: random.Random, depth: int) -> str:
    """A formula of whole numbers."""
    if depth == 0:
        return draw.choice(["q", "k", "q", "k", "b", "h", "3", "-2", "17"])
    a, c = whole(draw, depth - 1), draw.choice(["1", "2", "5", "7", "16"])
    other = whole(draw, draw.randrange(depth))
    return draw.choice([
        "ids[q]", "ids[k]", "shuffled[k]", "per_batch[b, q]", "per_batch[b][k]", "window[h]", "huge[k]", "huge[q]", "ids[k // 2]",
        f"({a} + {c})", f"({a} - {other})", f"({a} // {c})", f"({a} % {c})", f"({a} * {c})", f"abs({a})", f"-({a})",
        f"ids[({a}) % {LENGTH}]", f"torch.minimum({a} + 0 * q, {other} + 0 * q)",
        f"torch.where({draw.choice(['q > k', 'flags[k]', 'ids[q] == ids[k]'])}, {a} + 0 * q, {other} + 0 * q)",
        f"({a} + {other}) * {c}", f"({a} & 7)", "holes[k].nan_to_num(5.0).to(torch.int64)",
    ])  # fmt: skip


def truth(draw: random.Random, depth: int) -> str:
    """A formula that is true or false."""
    if depth == 0:
        relation, a, c = draw.choice(["<", "<=", ">", ">=", "==", "!="]), whole(draw, 2), whole(draw, 1)
        return draw.choice([
            "(q >= k)", "(q - k < 9)", "(ids[q] == ids[k])", "flags[k]", "dense[h, q, k]", "(weights[k] > 0.1)", "(small[k] > 3)",
            "(weights[q] * 0.5 < weights[k])", "(holes[q] <= holes[k])", "(huge[q] == huge[k])", f"({a} {relation} {c} + 0 * q)",
            f"({a} + 0 * k {relation} {c})",
        ])  # fmt: skip
    a, c = truth(draw, depth - 1), truth(draw, draw.randrange(depth))
    return draw.choice([f"({a} & {c})", f"({a} | {c})", f"({a} ^ {c})", f"~{a}", f"torch.where({a}, {c}, q > 5)"])


def kinds_of(mod, B, H, q_len, kv_len, size) -> torch.Tensor:
    """0, 1, 2 of each block, from the dense mask: (B, H, rows, columns)."""
    allowed = create_mask(mod, B, H, q_len, kv_len, device="cpu").double()
    pad = (0, -kv_len % size[1], 0, -q_len % size[0])
    low = torch.nn.functional.pad(allowed, pad, value=1.0).unflatten(3, (-1, size[1])).unflatten(2, (-1, size[0]))
    high = torch.nn.functional.pad(allowed, pad, value=0.0).unflatten(3, (-1, size[1])).unflatten(2, (-1, size[0]))
    return (low.amin((3, 5)) + high.amax((3, 5))).to(torch.int8)


def by_splitting(mod, *shape, size, first=16, each=4, at_once=1 << 15, fine=1 << 14):
    patches = (
        (build, "_WORTH_TRACING", -1), (split, "_FIRST", first), (split, "_SPLIT", each),
        (split, "_TILES", at_once), (range_tables, "_FINE", fine), (range_tables, "_CHUNK", 3),
    )  # fmt: skip
    with ExitStack() as stack:
        for place, name, value in patches:
            stack.enter_context(mock.patch.object(place, name, value))
        return create_block_mask(mod, *shape, device="cpu", BLOCK_SIZE=size)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    depth=st.integers(0, 3),
    lengths=st.tuples(st.integers(0, LENGTH), st.integers(0, LENGTH)),
    size=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    how=st.sampled_from([dict(), dict(first=1, each=2), dict(first=2, each=3, at_once=5), dict(first=1, each=4, fine=2)]),
)
def test_any_program(seed, depth, lengths, size, how):
    text = truth(random.Random(seed), depth)
    scope = globals() | {"torch": torch}
    mod = eval(f"lambda b, h, q, k: {text}", scope)
    mask = by_splitting(mod, 2, 3, *lengths, size=size, **how)
    assert torch.equal(mask._kinds(), kinds_of(mod, 2, 3, *lengths, size)), text
    mask.validate()


VARIANTS = {
    "causal": masks.causal,
    "window": masks.sliding_window(9),
    "document": masks.document(ids),
    "prefix": masks.prefix_lm(torch.tensor([5, 20])),
    "chunked": masks.chunked(7),
    "dilated": masks.dilated_window(12, 3),
    "table": masks.from_table(dense.expand(2, 3, LENGTH, LENGTH)),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("size", [(8, 8), (5, 16), (1, 7)])
def test_masks_to_import(name, size):
    mod = VARIANTS[name]
    mask = by_splitting(mod, 2, 3, LENGTH, LENGTH, size=size, first=2, each=2)
    assert torch.equal(mask._kinds(), kinds_of(mod, 2, 3, LENGTH, LENGTH, size))


def test_nothing_is_asked_where_a_program_says_it_all():
    """Asking costs 16,384 positions a block; of these masks two positions settle each block on an edge."""
    documents = torch.arange(1 << 16) // 3000

    def mod(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (q_idx - kv_idx < 4096) & (documents[q_idx] == documents[kv_idx])

    for mask in (masks.causal, masks.sliding_window(4096), mod):
        with mock.patch.object(build.Decider, "decide", side_effect=AssertionError("a block was asked")):
            made = create_block_mask(mask, 1, 1, 1 << 16, 1 << 16, device="cpu")
        whole = create_block_mask(mask, 2, 3, 1 << 16, 1 << 16, device="cpu")
        assert all(torch.equal(a, b) for a, b in zip(made.csr, whole[1, 2].csr, strict=True))
    made.validate()


def test_what_float64_cannot_hold_is_not_known():
    reader = range_tables.Reader(torch.tensor([(1 << 53) + 1, 1 << 53]))
    assert reader.read([interval(0.0)], interval(-1.0, 1.0)).low == float(1 << 53)

    def mod(b, h, q_idx, kv_idx):
        return huge[q_idx] == huge[kv_idx]

    mask = by_splitting(mod, 1, 1, LENGTH, LENGTH, size=(4, 4))
    assert torch.equal(mask._kinds(), kinds_of(mod, 1, 1, LENGTH, LENGTH, (4, 4)))
    # and what 64 bits wrap
    wraps = lambda b, h, q, k: (q + 1) * (1 << 62) * 2 > k  # noqa: E731
    mask = by_splitting(wraps, 1, 1, 8, 8, size=(2, 2))
    assert torch.equal(mask._kinds(), kinds_of(wraps, 1, 1, 8, 8, (2, 2)))


def test_an_index_out_of_range_is_an_error_however_it_is_split():
    def mod(b, h, q_idx, kv_idx):
        return flags[kv_idx + 1]

    with pytest.raises(IndexError, match="reads a captured tensor out of range"):
        by_splitting(mod, 1, 1, LENGTH, LENGTH, size=(8, 8))
    # negative ones count from the end, as in PyTorch
    wraps = lambda b, h, q, k: flags[k - 1] & (ids[q - k] > 1)  # noqa: E731
    mask = by_splitting(wraps, 1, 1, LENGTH, LENGTH, size=(8, 8))
    assert torch.equal(mask._kinds(), kinds_of(wraps, 1, 1, LENGTH, LENGTH, (8, 8)))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30), st.integers(1, 9)), max_size=12))
def test_runs_are_written_out(runs):
    covered = torch.zeros(5, 40, dtype=torch.bool)
    kept = []
    for row, start, length in sorted(runs):
        if not covered[row, start : start + length].any():
            covered[row, start : start + length] = True
            kept.append((row, start, length))
    columns = [torch.tensor([x[i] for x in sorted(kept)], dtype=torch.int64) for i in range(3)]
    runs = merged(*columns, 5)
    offsets, indices = written_out(*runs)
    where = covered.nonzero()
    assert all(torch.equal(a, b) for a, b in zip(runs, runs_of(offsets, indices), strict=True))
    assert torch.equal(indices, where[:, 1].to(torch.int32)) and torch.equal(offsets.diff(), covered.sum(1))


def counted(b, h, q_idx, kv_idx):
    return int(q_idx) >= int(kv_idx)


def test_a_mask_that_cannot_be_traced_says_what_asking_it_costs():
    small = mock.patch.multiple(build, _WORTH_TRACING=-1, _POSITIONS=64)
    with small, mock.patch.object(estimate, "_LONG", 0.0):
        with pytest.warns(UserWarning) as caught:
            made = create_block_mask(counted, 1, 1, 40, 40, "cpu", 8)
        create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 40, 40, "cpu", 8)
    assert made.to_dense().sum() == 15 and len(caught) == 1
    line = counted.__code__.co_firstlineno
    assert re.search(
        rf"mask_mod counted \(.*test_block_split.py:{line}\) cannot be traced, so it is asked about all 1,600 positions, "
        r"which takes about \d+ s more\. Written in torch operations it is traced, and few positions are asked\. .*calls int\(\)",
        str(caught[0].message),
    )
    with small:
        create_block_mask(counted, 1, 1, 40, 40, "cpu", 8)
