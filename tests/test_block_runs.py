"""Runs of full blocks mean what their blocks mean one by one, and cost what the runs cost."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexref import BlockMask, create_block_mask, explain, flex_attention
from flexref.backend import find_backends
from flexref.blocks import runs as runs_module
from flexref.blocks.lists import (
    FULL,
    PARTIAL,
    Grid,
    Lists,
    collect,
    expand,
    of_stretches,
    one_by_one,
    sparsity,
    stretches,
    take_columns,
    take_rows,
    transpose,
)
from flexref.blocks.runs import runs_of
from flexref.blocks.sound import first_problem
from flexref.blocks.walk import Walk
from flexref.variants import masks

CPU = torch.device("cpu")
grids = st.builds(
    lambda B, H, rows, columns, q_cut, kv_cut: Grid(B, H, max(0, rows * 3 - q_cut), max(0, columns * 2 - kv_cut), 3, 2),
    st.integers(0, 2), st.integers(1, 3), st.integers(0, 6), st.integers(0, 9), st.integers(0, 2), st.integers(0, 1),
)  # fmt: skip


def transpose_either(lists: Lists, grid: Grid) -> Lists:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs_module, "_SHORT", 0)
        return transpose(lists, grid)


def kinds_of(grid: Grid, seed: int) -> Tensor:
    """int8 (flat rows, columns): stretches of every length, also of one block."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, 3, (grid.flat_rows, grid.columns), generator=generator, dtype=torch.int8)
    keep = torch.rand(kinds.shape, generator=generator) < float(torch.rand((), generator=generator))
    for column in range(1, grid.columns):
        kinds[:, column] = torch.where(keep[:, column], kinds[:, column - 1], kinds[:, column])
    return kinds


def lists_of(grid: Grid, seed: int) -> tuple[Lists, Tensor]:
    kinds = kinds_of(grid, seed)
    return collect((kinds[first:last] for first, last in grid.strips()), CPU), kinds


def listed(lists: Lists, grid: Grid) -> Tensor:
    """The kinds of sound lists, which are as short as they can be."""
    assert first_problem(lists, grid) is None
    blocks = one_by_one(lists)
    assert all(torch.equal(a, b) for a, b in zip(lists.full, runs_of(*blocks[2:]), strict=True))
    kinds = torch.zeros(grid.flat_rows, grid.columns, dtype=torch.int8)
    for kind, offsets, indices in ((PARTIAL, *blocks[:2]), (FULL, *blocks[2:])):
        assert offsets.dtype == torch.int64 and indices.dtype == torch.int32
        for row, (first, last) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
            kinds[row, indices[first:last].long()] = kind
    return kinds


seeds = st.integers(0, 10**9)
MANY = settings(max_examples=120, deadline=None)


@MANY
@given(grids, seeds)
def test_of_one_mask(grid, seed):
    lists, kinds = lists_of(grid, seed)
    assert torch.equal(listed(lists, grid), kinds) and torch.equal(expand(lists, 0, grid.flat_rows, grid.columns), kinds)
    if grid.flat_rows:
        assert torch.equal(expand(lists, 1, grid.flat_rows, grid.columns), kinds[1:])
    planes = kinds.reshape(grid.B * grid.H, grid.rows, grid.columns)
    # both ways to transpose, whichever is the quicker one
    assert all(torch.equal(a, b) for a, b in zip(transpose(lists, grid), transpose_either(lists, grid), strict=True))
    turned = grid._replace(q_len=grid.kv_len, kv_len=grid.q_len, q_block=grid.kv_block, kv_block=grid.q_block)
    by_column = transpose(lists, grid)
    assert torch.equal(listed(by_column, turned), planes.mT.reshape(turned.flat_rows, turned.columns))
    assert all(torch.equal(a, b) for a, b in zip(transpose(by_column, turned), lists, strict=True))
    rows = torch.randint(0, max(1, grid.flat_rows), (5 if grid.flat_rows else 0,), generator=torch.Generator().manual_seed(seed))
    part = grid._replace(B=1, H=1, q_len=3 * len(rows))
    assert torch.equal(listed(take_rows(lists, rows), part), kinds[rows])
    fewer = grid._replace(kv_len=grid.kv_len // 2)
    assert torch.equal(listed(take_columns(lists, fewer.columns), fewer), kinds[:, : fewer.columns])
    positions = planes.repeat_interleave(3, 1)[:, : grid.q_len].repeat_interleave(2, 2)[:, :, : grid.kv_len]
    share = 100 * float((positions == 0).double().mean()) if positions.numel() else 0.0
    assert sparsity(lists, grid) == pytest.approx(share)
    work, walk = (kinds > 0).sum(1), Walk(grid, lists)
    assert torch.equal(walk.row_order.long(), work.sort(descending=True, stable=True).indices)


@MANY
@given(grids, seeds, seeds)
def test_of_two_masks(grid, seed, other):
    (a, ka), (b, kb) = lists_of(grid, seed), lists_of(grid, other)
    first, count, (of_a, of_b) = stretches((a, b), grid)
    for found, kinds in ((of_a, ka), (of_b, kb)):
        assert torch.equal(found.repeat_interleave(count), kinds.reshape(-1))
    assert torch.equal(first, torch.cat([count.new_zeros(1), count.cumsum(0)])[: len(first)])
    for kind, wanted in ((torch.minimum(of_a, of_b), torch.minimum(ka, kb)), (FULL - of_a, FULL - ka)):
        assert torch.equal(listed(of_stretches(first, count, kind, grid), grid), wanted)


@MANY
@given(grids, seeds)
def test_through_torch_s_tensors_and_slices(grid, seed):
    lists, kinds = lists_of(grid, seed)
    made = BlockMask._make(grid, lists, masks.causal, True, False)
    tensors = made.kv_num_blocks, made.kv_indices, made.full_kv_num_blocks, made.full_kv_indices
    again = BlockMask.from_kv_blocks(*tensors, BLOCK_SIZE=(3, 2), mask_mod=masks.causal, seq_lengths=made.seq_lengths)
    assert again == made
    assert torch.equal(made.full_q_num_blocks.sum(), (kinds == FULL).sum())  # type: ignore[union-attr]
    planes = kinds.reshape(grid.B, grid.H, grid.rows, grid.columns)
    last = made[:, grid.H - 1]
    assert torch.equal(listed(last._lists, last.grid), planes[:, -1].flatten(0, 1))
    for q_len, kv_len in ((grid.q_len // 2, grid.kv_len), (grid.q_len, grid.kv_len // 2)):
        smaller = made.resize(q_len, kv_len)
        # lists that say just what the mask_mod says are made anew
        if not smaller._agrees:
            cut = planes[:, :, : smaller.grid.rows, : smaller.grid.columns]
            assert torch.equal(listed(smaller._lists, smaller.grid), cut.flatten(0, 2))


@given(grids, seeds)
@settings(max_examples=20, deadline=None)
def test_written_out_in_pieces(grid, seed):
    lists, kinds = lists_of(grid, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs_module, "_TOGETHER", 3)
        assert torch.equal(listed(lists, grid), kinds)


BOUNDED = """
import torch
from bench.fresh import peak, watermark
from flexref import create_block_mask
from flexref.variants import masks
create_block_mask(masks.causal, None, None, 4096, 4096, "cpu").walk.column_runs
before = watermark()
for mod in (masks.causal, masks.sliding_window(4096)):
    mask = create_block_mask(mod, None, None, 1 << 20, 1 << 20, "cpu")
    assert (~~mask[0, 0]).transpose().transpose().runs.full_counts.equal(mask.runs.full_counts)
    assert sum(x.nbytes for x in (*mask.walk.runs, *mask.walk.column_runs)) < 1 << 20
assert not {"csr", "csc"} & set(vars(mask.walk))
print(peak() - before)
"""


def test_a_million_tokens_cost_what_their_rows_cost():
    """Written out, causal is 134 MB, and the sort of its columns several times that."""
    root = Path(__file__).resolve().parent.parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    done = subprocess.run([sys.executable, "-c", BOUNDED], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 20e6


def test_more_blocks_than_an_int32_can_number_are_refused():
    for lengths in ((1, 1 << 40), (1 << 40, 1)):
        with pytest.raises(ValueError, match=r"1099511627776 blocks of (queries|keys) are more than 2147483647"):
            create_block_mask(masks.causal, None, None, *lengths, "cpu", 1)


def test_explain_says_which_engine_reads_runs():
    x = torch.randn(1, 1, 64, 8)
    told = "the block mask lists 4 partial blocks, and 6 full ones as 3 runs; "
    for name, says in (("numba_cpu", "numba_cpu reads runs"), ("reference", "reference makes a dense mask of them")):
        mask = create_block_mask(masks.causal, None, None, 64, 64, "cpu", 16)
        assert f"{told}{says}" in str(explain(x, x, x, block_mask=mask, backend=name))
        flex_attention(x.requires_grad_(), x, x, block_mask=mask, backend=name).sum().backward()
        # what is said of an engine is what it did
        assert not {"csr", "csc"} & set(vars(mask.walk))
    for name in ("triton", "cupy", "numba_cuda"):
        assert getattr(find_backends()[name], "lists", "blocks") == "blocks"
    assert "block mask" not in str(explain(x, x, x))
