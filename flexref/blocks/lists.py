"""The lists of blocks that a BlockMask holds, and what can be done with them without knowing any mask_mod.

A row of blocks lists the columns of its blocks that are not empty, ascending: each of those to be asked (`indices`), and
the full ones as runs, since most masks have a few long ones. The lists of all rows lie one behind the other. Rows are flat:
row r of batch b and head h is (b * H + h) * rows + r. The kind of a block is 0 empty, 1 partial, 2 full.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flexref.blocks.runs import (
    Runs,
    merged,
    offsets_of,
    row_of_entry,
    runs_in,
    transposed,
    transposed_blocks,
    written_out,
)

EMPTY, PARTIAL, FULL = 0, 1, 2
# blocks looked at together: bounds the memory of what goes through kinds
_STRIP = 1 << 18


class Grid(NamedTuple):
    """How positions fall into blocks."""

    B: int
    H: int
    q_len: int
    kv_len: int
    q_block: int
    kv_block: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, q_len, kv_len)."""
        return self.B, self.H, self.q_len, self.kv_len

    @property
    def rows(self) -> int:
        """Blocks of queries."""
        return -(-self.q_len // self.q_block)

    @property
    def columns(self) -> int:
        """Blocks of keys."""
        return -(-self.kv_len // self.kv_block)

    @property
    def flat_rows(self) -> int:
        """Rows of all batches and heads."""
        return self.B * self.H * self.rows

    def strips(self) -> Iterator[tuple[int, int]]:
        """Ranges of flat rows, in order, of about as many blocks as may be held at once."""
        step = max(1, _STRIP // max(1, self.columns))
        return ((first, min(first + step, self.flat_rows)) for first in range(0, self.flat_rows, step))


class Lists(NamedTuple):
    """Offsets int64 (flat rows + 1,), the others int32, row after row: each partial block, and runs of full ones (runs.py)."""

    offsets: Tensor
    indices: Tensor
    full_offsets: Tensor
    full_starts: Tensor
    full_counts: Tensor

    @property
    def full(self) -> Runs:
        """The runs of full blocks."""
        return self[2:]


class Blocks(NamedTuple):
    """Lists that name full blocks one by one too: offsets int64 (flat rows + 1,), indices int32, ascending in each row."""

    offsets: Tensor
    indices: Tensor
    full_offsets: Tensor
    full_indices: Tensor


def one_by_one(lists: Lists) -> Blocks:
    """Each full block by itself, as kernels without runs want it."""
    return Blocks(lists.offsets, lists.indices, *written_out(*lists.full))


def collect(kinds: Iterable[Tensor], device: torch.device) -> Lists:
    """Lists from int8 strips (n, columns), which together are all rows in order."""
    # of no rows, so that there is something to put together where there are none
    counts, indices = [torch.zeros(0, dtype=torch.int64, device=device)], [torch.zeros(0, dtype=torch.int32, device=device)]
    full = [(counts[0], indices[0], indices[0])]
    for strip in kinds:
        partial = strip == PARTIAL
        counts.append(partial.sum(1))
        indices.append(partial.nonzero()[:, 1].to(torch.int32))
        full.append(runs_in(strip == FULL))
    runs, starts, lengths = map(torch.cat, zip(*full, strict=True))
    return Lists(offsets_of(torch.cat(counts)), torch.cat(indices), offsets_of(runs), starts, lengths)


def expand(lists: Lists, first: int, last: int, columns: int) -> Tensor:
    """The kinds of flat rows first..last: int8 (last - first, columns)."""
    edges = torch.zeros(last - first, columns + 1, dtype=torch.int8, device=lists.offsets.device)
    bounds = lists.full_offsets[first : last + 1]
    begin, end = int(bounds[0]), int(bounds[-1])
    row, start = row_of_entry(bounds), lists.full_starts[begin:end].long()
    # runs do not touch, so no place is both an end and a start
    edges[row, start], edges[row, start + lists.full_counts[begin:end]] = FULL, -FULL
    kinds = edges[:, :-1].cumsum(1, dtype=torch.int8)
    bounds = lists.offsets[first : last + 1]
    kinds[row_of_entry(bounds), lists.indices[int(bounds[0]) : int(bounds[-1])].long()] = PARTIAL
    return kinds


def stretches(held: Sequence[Lists], grid: Grid) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Stretches of blocks in a row, in order, of one kind in each of some lists of a grid.

    Number of the first block (flat row * columns + column), how many, and an int8 tensor of kinds for each of the lists.
    Ends of rows and of what is listed are the only places where a stretch can end, so nothing is written out.
    """
    device = held[0].offsets.device
    places = [torch.arange(grid.flat_rows, device=device) * grid.columns]
    for x in held:
        partial = row_of_entry(x.offsets) * grid.columns + x.indices
        start = row_of_entry(x.full_offsets) * grid.columns + x.full_starts
        places += [partial, partial + 1, start, start + x.full_counts]
    first, where = torch.cat(places).unique(return_inverse=True)
    count = first.diff(append=first.new_tensor([grid.flat_rows * grid.columns]))
    parts, there = where.split([len(x) for x in places])[1:], count > 0
    kinds = []
    for i in range(len(held)):
        change = torch.zeros(len(first), dtype=torch.int8, device=device)
        for part, by in zip(parts[4 * i : 4 * i + 4], (PARTIAL, -PARTIAL, FULL, -FULL), strict=True):
            change.index_add_(0, part, torch.full_like(part, by, dtype=torch.int8))
        kinds.append(change.cumsum(0, dtype=torch.int8)[there])
    return first[there], count[there], kinds


def of_stretches(first: Tensor, count: Tensor, kind: Tensor, grid: Grid) -> Lists:
    """Lists from stretches of one kind each, in order."""
    parts = []
    for each in (PARTIAL, FULL):
        at = first[kind == each]
        row, column = at // max(grid.columns, 1), at % max(grid.columns, 1)
        parts.append(merged(row, column, count[kind == each], grid.flat_rows))
    return Lists(*written_out(*parts[0]), *parts[1])


def take_rows(lists: Lists, rows: Tensor) -> Lists:
    """The lists of the given flat rows, in that order; rows may repeat."""
    return Lists(*_take(rows, lists.offsets, lists.indices), *_take(rows, *lists.full))


def _take(rows: Tensor, offsets: Tensor, *entries: Tensor) -> tuple[Tensor, ...]:
    new = offsets_of(offsets.diff()[rows])
    shift = torch.repeat_interleave(offsets[:-1][rows] - new[:-1], new.diff())
    at = shift + torch.arange(len(shift), device=shift.device)
    return new, *(x[at] for x in entries)


def take_columns(lists: Lists, columns: int) -> Lists:
    """The lists without what lies behind so many columns."""
    parts = []
    for offsets, start, *counts in ((lists.offsets, lists.indices), lists.full):
        keep = start < columns
        row = row_of_entry(offsets)[keep]
        parts += [offsets_of(torch.bincount(row, minlength=len(offsets) - 1)), start[keep]]
        parts += [torch.minimum(x[keep], columns - start[keep]) for x in counts]
    return Lists(*parts)


def broadcast(lists: Lists, grid: Grid, wanted: Grid) -> Lists:
    """The lists of a grid for one with more batches or heads, of which it has as many, or 1."""
    if (grid.B, grid.H) == (wanted.B, wanted.H):
        return lists
    rows = torch.arange(grid.flat_rows, device=lists.offsets.device).reshape(grid.B, grid.H, grid.rows)
    return take_rows(lists, rows.expand(wanted.B, wanted.H, grid.rows).reshape(-1))


def transpose(lists: Lists, grid: Grid) -> Lists:
    """The same blocks listed by column: flat rows are now (b * H + h) * columns + column, indices and runs are of rows."""
    shape = grid.B * grid.H, grid.rows, grid.columns
    return Lists(*transposed_blocks(lists.offsets, lists.indices, shape), *transposed(*lists.full, shape))


def sparsity(lists: Lists, grid: Grid) -> float:
    """Percent of the positions that lie in blocks not listed; 0 if there are no positions."""
    positions, listed = math.prod(grid.shape), 0
    for offsets, start, count in ((lists.offsets, lists.indices, torch.ones_like(lists.indices)), lists.full):
        row = row_of_entry(offsets) % max(grid.rows, 1)
        height = (grid.q_len - row * grid.q_block).clamp(max=grid.q_block)
        first, last = start.long() * grid.kv_block, (start.long() + count) * grid.kv_block
        listed += int((height * (last.clamp(max=grid.kv_len) - first)).sum())
    return 100.0 * (positions - listed) / positions if positions else 0.0


def to_padded(offsets: Tensor, indices: Tensor, shape: tuple[int, int, int], columns: int) -> tuple[Tensor, Tensor]:
    """torch's form: int32 counts (B, H, rows) and int32 indices (B, H, rows, columns), columns not listed behind."""
    listed = torch.zeros(len(offsets) - 1, columns, dtype=torch.int8, device=offsets.device)
    listed[row_of_entry(offsets), indices.long()] = 1
    order = torch.argsort(listed, dim=1, descending=True, stable=True)
    return offsets.diff().to(torch.int32).reshape(shape), order.to(torch.int32).reshape(*shape, columns)


def from_padded(counts: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Lists from torch's form, (B, H, rows) and (B, H, rows, width); sorts each row and does not look behind counts."""
    flat = indices.reshape(counts.numel(), indices.shape[-1]).long()
    counts = counts.reshape(-1).long()
    used = torch.arange(flat.shape[1], device=flat.device) < counts[:, None]
    largest = torch.iinfo(torch.int32).max
    flat = flat.clamp(-1, largest).masked_fill(~used, largest).sort(1).values
    return offsets_of(counts), flat[used].to(torch.int32)
