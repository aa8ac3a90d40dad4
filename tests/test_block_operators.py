"""op(build(m)) == build(op(m)) for everything that makes a BlockMask of others."""
from __future__ import annotations

import statistics
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexref import BlockMask, concat_masks, create_block_mask, create_mask, flex_attention
from flexref.blocks.mask_mods import Concatenated, Transposed, and_masks, not_mask, shift_mask, xor_masks
from flexref.variants import masks

ids = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3] * 9).sort().values
flags = torch.rand(90, generator=torch.Generator().manual_seed(0)) < 0.7


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def heads_differ(b, h, q_idx, kv_idx):
    return q_idx - kv_idx < 3 + 4 * h + b


def untraceable(b, h, q_idx, kv_idx):
    return bool(flags[int(kv_idx)]) or int(q_idx) % 3 == 0


MODS = [causal, heads_differ, untraceable, masks.document(ids), masks.sliding_window(5), lambda b, h, q, k: flags[k]]
mods = st.sampled_from(MODS)
sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))
FEW = settings(max_examples=15, deadline=None)


def made(mod, B, H, q_len, kv_len, size, separate=True) -> BlockMask:
    return create_block_mask(mod, B, H, q_len, kv_len, "cpu", size, separate_full_blocks=separate)


def same_blocks(mask: BlockMask, other: BlockMask) -> None:
    assert mask.grid == other.grid and mask.separate_full_blocks == other.separate_full_blocks
    assert all(torch.equal(a, b) for a, b in zip(mask.csr, other.csr, strict=True))
    mask.validate("semantic")


@FEW
@given(mods, mods, st.integers(0, 15), st.integers(0, 15), sizes, st.booleans())
def test_of_two_masks(a, b, q_len, kv_len, size, separate):
    shape = 2, 3, q_len, kv_len, size, separate
    left, right = made(a, *shape), made(b, *shape)
    same_blocks(left ^ right, made(xor_masks(a, b), *shape))
    same_blocks(left - right, made(and_masks(a, not_mask(b)), *shape))
    one = made(causal, 1, 1, *shape[2:])
    same_blocks(left - one, made(and_masks(a, not_mask(causal)), *shape))


@FEW
@given(mods, st.integers(0, 15), st.integers(0, 15), sizes)
def test_transposed_and_shifted(mod, q_len, kv_len, size):
    mask = made(mod, 2, 3, q_len, kv_len, size)
    turned = mask.transpose()
    same_blocks(turned, made(Transposed(mod), 2, 3, kv_len, q_len, size[::-1]))
    assert all(torch.equal(x, y) for x, y in zip(turned.transpose().csr, mask.csr, strict=True))
    same_blocks(mask.shift(7, 3), made(shift_mask(mod, 7, 3), 2, 3, q_len, kv_len, size))


@FEW
@given(st.lists(st.tuples(mods, st.integers(0, 12)), min_size=1, max_size=3), st.integers(0, 3), st.integers(1, 12), sizes)
def test_one_behind_another(parts, dim, other, size):
    name = ("batches", "heads", "queries", "keys")[dim]
    grids = []
    for _, length in parts:
        grid = [2, 2, other, 11]
        grid[dim] = 1 + length % 3 if dim < 2 else length
        grids.append(grid)
    mask = concat_masks([made(mod, *grid, size) for (mod, _), grid in zip(parts, grids, strict=True)], name)
    lengths = [grid[dim] for grid in grids]
    whole = [*grids[0][:dim], sum(lengths), *grids[0][dim + 1 :]]
    same_blocks(mask, made(Concatenated([mod for mod, _ in parts], lengths, dim), *whole, size))
    start = 0
    for (mod, _), grid in zip(parts, grids, strict=True):
        # what is asked of a part is the part's own
        for at in (0, grid[dim] - 1) if 0 not in grid else ():
            where = [0, 0, 0, 0]
            where[dim] = at
            inside = mod(*where)
            where[dim] = start + at
            assert bool(mask.mask_mod(*map(torch.tensor, where))) == bool(inside)
        start += grid[dim]


def test_a_mask_for_each_head_in_attention():
    x = torch.randn(1, 3, 40, 8)
    each = [causal, masks.sliding_window(4), lambda b, h, q, k: flags[k]]
    mask = concat_masks([made(mod, 1, 1, 40, 40, 8) for mod in each], "heads")
    assert mask.shape == (1, 3, 40, 40)
    out = flex_attention(x, x, x, block_mask=mask)
    for head, mod in enumerate(each):
        alone = x[:, head : head + 1]
        torch.testing.assert_close(out[:, head : head + 1], flex_attention(alone, alone, alone, mask_mod=mod))
    with pytest.raises(ValueError, match="H=3"):
        flex_attention(x[:, :2], x[:, :2], x[:, :2], block_mask=mask)


@FEW
@given(mods, st.integers(1, 30), st.integers(0, 30), sizes, st.data())
def test_rows_of_one_row_of_blocks(mod, q_len, kv_len, size, data):
    """As in decoding: nothing is asked, and every allowed position stays."""
    mask = made(mod, 1, 1, q_len, kv_len, size)
    start = data.draw(st.integers(0, q_len - 1))
    stop = data.draw(st.integers(start + 1, min(q_len, (start // size[0] + 1) * size[0])))
    part = mask.rows(start, stop)
    part.validate("structure")
    listed, full = part.listed()
    rows = [[bool(mod(0, 0, q, k)) for k in range(kv_len)] for q in range(start, stop)]
    wanted = torch.tensor(rows).reshape(stop - start, kv_len)
    assert bool((listed[0, 0] >= wanted).all()) and bool((full[0, 0] <= wanted).all())
    if mod is untraceable:
        return
    x, y = torch.randn(1, 1, stop - start, 4), torch.randn(1, 1, kv_len, 4)
    out = flex_attention(x, y, y, block_mask=part)
    torch.testing.assert_close(out, flex_attention(x, y, y, block_mask=part, backend="reference"))


def test_a_step_of_decoding_costs_microseconds():
    mask = made(masks.sliding_window(4096), 1, 1, 32768, 32768, 128)
    samples = []
    for at in range(2000):
        start = time.perf_counter()
        mask.rows(20000 + at, 20001 + at)
        samples.append(time.perf_counter() - start)
    # 50 us are asked; the bound is for a busy machine
    assert statistics.quantiles(samples, n=4)[0] < 200e-6


def test_what_does_not_fit_is_refused():
    mask, other = made(causal, 1, 1, 16, 16, 8), made(causal, 1, 2, 16, 24, 8)
    with pytest.raises(ValueError, match="along must be one of batches, heads, queries, keys, got 'rows'"):
        concat_masks([mask], "rows")
    with pytest.raises(TypeError, match="masks must be BlockMasks, at least one, got none"):
        concat_masks([], "heads")
    with pytest.raises(TypeError, match="at least one, got function"):
        concat_masks([mask, causal], "heads")  # type: ignore[list-item]
    with pytest.raises(ValueError, match="along heads must be alike in all else; kv_len of number 1 is 24 and of number 0 16"):
        concat_masks([mask, other], "heads")
    with pytest.raises(ValueError, match="separate_full_blocks of number 1 is False and of number 0 True"):
        concat_masks([mask, made(causal, 1, 1, 16, 16, 8, separate=False)], "queries")
    with pytest.raises(TypeError):
        _ = mask - causal  # type: ignore[operator]


def allowed(mask):
    """Every position, bool (B, H, q_len, kv_len): lists, and mask_mod within partial blocks."""
    listed, full = mask.listed()
    return listed & (full | create_mask(mask.mask_mod, *mask.shape, "cpu"))


def test_a_mask_for_one_head_whose_mod_reads_it_serves_no_several():
    one = create_block_mask(lambda b, h, q, k: (q >= k) & (k >= 8 * h), 1, 1, 16, 16, "cpu", 4)
    two = create_block_mask(lambda b, h, q, k: q >= 0 * h, 1, 2, 16, 16, "cpu", 4)
    for combine in (lambda: one & two, lambda: two | one, lambda: one ^ two, lambda: two - one):
        with pytest.raises(ValueError, match=r"was made with H=1, .*<lambda>.* reads h and .* for H=2: make it with"):
            combine()
    x = torch.randn(1, 2, 16, 4)
    with pytest.raises(ValueError, match="block_mask was made with H=1, but its mask_mod reads h and query has 2"):
        flex_attention(x, x, x, block_mask=one)
    with pytest.raises(ValueError, match="block_mask was made with H=1, but its mask_mod reads h and query has 2"):
        flex_attention(x[:, :, :1], x, x, block_mask=one.rows(torch.tensor(5), length=1))
    with pytest.raises(ValueError, match="was made with H=1"):
        one.stats(heads=2)
    flex_attention(x[:, :1], x[:, :1], x[:, :1], block_mask=one)
    # a slice means its own head, for whoever asks
    head = create_block_mask(lambda b, h, q, k: (q >= k) & (k >= 8 * h), 1, 2, 16, 16, "cpu", 4)[:, 1]
    both = head & two
    both.validate("semantic")
    assert torch.equal(allowed(both)[0, 0], allowed(both)[0, 1])
    flex_attention(x, x, x, block_mask=head)


def test_beside_lists_that_were_made_by_hand_there_is_nothing():
    n, at = torch.tensor([[[0, 0, 1]]], dtype=torch.int32), torch.zeros(1, 1, 3, 1, dtype=torch.int32)
    never = lambda b, h, q, k: q < k - 100  # noqa: E731
    by_hand = BlockMask.from_kv_blocks(0 * n, at, n, at, BLOCK_SIZE=(4, 4), mask_mod=never, seq_lengths=(12, 4))
    turned = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 16, 16, "cpu", 4)[:, :, [3, 1]]
    for mask in (by_hand, turned):
        here = allowed(mask)[0, 0]
        for by in (-13, -4, -1, 0, 1, 3, 4, 9):
            moved = torch.zeros_like(here)
            rows = torch.arange(len(here)) + by
            inside = (rows >= 0) & (rows < len(here))
            moved[inside] = here[rows[inside]]
            assert torch.equal(allowed(mask.shift(by))[0, 0], moved), by


@pytest.mark.parametrize(
    ("offset", "error", "says"),
    [
        (0.5, TypeError, "q_offset must be an int, got float"),
        (float("nan"), TypeError, "q_offset must be an int, got float"),
        (True, TypeError, "q_offset must be an int, got bool"),
        ("a", TypeError, "q_offset must be an int, got str"),
        (10**30, ValueError, "q_offset must fit into 62 bits"),
        (torch.tensor(1.5), TypeError, "q_offset must be an integer, or a 0-d integer tensor, got torch.float32"),
        (torch.tensor([1]), TypeError, "0-d integer tensor, got torch.int64 of shape"),
    ],
)
def test_what_is_no_offset(offset, error, says):
    mask = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 16, 16, "cpu", 4)
    with pytest.raises(error, match=says):
        mask.shift(offset)
    with pytest.raises(error, match=says.replace("q_offset", "kv_offset")):
        mask.shift(0, offset)


def test_what_is_asked_of_a_mask_changes_nothing_about_it():
    mod = lambda b, h, q, k: (q >= k) & (k < 16 * (4 - h))  # noqa: E731
    made = create_block_mask(mod, 1, 1, 64, 64, "cpu", 16)
    columns = made.kv_num_blocks, made.kv_indices, made.full_kv_num_blocks, made.full_kv_indices
    by_hand = BlockMask.from_kv_blocks(*columns, BLOCK_SIZE=16, mask_mod=mod, seq_lengths=(64, 64))
    x = torch.randn(1, 2, 64, 4)
    first = flex_attention(x, x, x, block_mask=by_hand)
    by_hand.shift(1, 0)
    assert by_hand == ~~by_hand and torch.equal(flex_attention(x, x, x, block_mask=by_hand), first)
