"""Runs of consecutive columns, as full blocks are listed: what can be done with runs alone.

Runs of rows are three tensors: offsets, int64 (rows + 1,), which count runs; starts and counts, int32, row after row. In a
row they ascend and do not touch, so that the same columns are always the same runs.
"""
from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

Runs = tuple[Tensor, Tensor, Tensor]
# runs that are shorter on average are transposed block by block, which is quicker then
_SHORT = 8
# columns written out together: what is in the making stays in a cache
_TOGETHER = 1 << 16


def offsets_of(counts: Tensor) -> Tensor:
    """int64 (n + 1,): 0 and the running sums."""
    return torch.cat([counts.new_zeros(1, dtype=torch.int64), counts.long().cumsum(0)])


def row_of_entry(offsets: Tensor) -> Tensor:
    """The row of each listed thing, counted from the first row of `offsets`."""
    counts = offsets.diff()
    return torch.repeat_interleave(torch.arange(len(counts), device=offsets.device), counts)


def merged(row: Tensor, start: Tensor, count: Tensor, rows: int) -> Runs:
    """Runs from pieces, int64 (N,) each, in order: by row, and by column in a row. Pieces that touch are one run."""
    first = torch.ones(len(row), dtype=torch.bool, device=row.device)
    first[1:] = (row[1:] != row[:-1]) | (start[1:] != start[:-1] + count[:-1])
    at, before = first.nonzero()[:, 0], offsets_of(count)
    counts = before[at].diff(append=before[-1:])
    return offsets_of(torch.bincount(row[at], minlength=rows)), start[at].to(torch.int32), counts.to(torch.int32)


def runs_of(offsets: Tensor, indices: Tensor) -> Runs:
    """Runs from lists that name each column."""
    return merged(row_of_entry(offsets), indices.long(), torch.ones_like(indices, dtype=torch.int64), len(offsets) - 1)


def runs_in(match: Tensor) -> Runs:
    """Runs of the columns that are True: `match` is bool (rows, columns). Instead of offsets, how many runs each row has."""
    edge = torch.nn.functional.pad(match.to(torch.int8), (1, 1)).diff(dim=1)
    begins = edge == 1
    start, end = (x.nonzero()[:, 1] for x in (begins, edge == -1))
    return begins.sum(1), start.to(torch.int32), (end - start).to(torch.int32)


def written_out(offsets: Tensor, starts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets, and each column by itself, int32."""
    if offsets.is_meta:
        raise ValueError("the lists of a block mask on meta have no numbers, so its blocks cannot be named one by one")
    before = offsets_of(counts)
    total = int(before[-1])
    indices = torch.empty(total, dtype=torch.int32, device=offsets.device)
    cuts = torch.searchsorted(before, torch.arange(0, total, _TOGETHER, device=offsets.device)).unique()
    places = [*cuts.tolist(), len(starts)]
    for (first, last), (begin, end) in zip(pairwise(places), pairwise([*before[cuts].tolist(), total]), strict=True):
        many = counts[first:last]
        # the column of an entry is its run's first, and how far it is behind the run's first entry
        shift = (starts[first:last] - (before[first:last] - begin)).to(torch.int32)
        shift = torch.repeat_interleave(shift, many, output_size=end - begin)
        torch.add(shift, torch.arange(end - begin, dtype=torch.int32, device=offsets.device), out=indices[begin:end])
    return before[offsets], indices


def transposed_blocks(offsets: Tensor, indices: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The same blocks by column, each by itself; shape: how many planes, and the rows and columns of each."""
    planes, rows, columns = shape
    row = row_of_entry(offsets)
    flat_column = row // max(rows, 1) * columns + indices
    order = torch.sort(flat_column, stable=True).indices
    listed = torch.bincount(flat_column, minlength=planes * columns)
    return offsets_of(listed), (row % max(rows, 1))[order].to(torch.int32)


def transposed(offsets: Tensor, starts: Tensor, counts: Tensor, shape: tuple[int, int, int]) -> Runs:
    """The same blocks by column, as runs of rows; shape: how many planes, and the rows and columns of each.

    A run of a column begins in the row that has the column where the row above has not, and ends where it is the other way
    round. Which columns these are is the difference of two rows, so it is found from the ends of their runs alone.
    """
    if int(counts.sum()) < _SHORT * len(counts):
        return runs_of(*transposed_blocks(*written_out(offsets, starts, counts), shape))
    planes, rows, columns = shape
    row, height = row_of_entry(offsets), rows + 1
    # a place in a row is a number; a plane has a row more, in which what reaches the last row ends
    here = (row // max(rows, 1) * height + row % max(rows, 1)) * (columns + 1)
    start, end = here + starts, here + starts + counts
    place, order = torch.cat([start, end + columns + 1, end, start + columns + 1]).sort()
    level = torch.where(order < 2 * len(row), 1, -1).cumsum(0)[:-1]
    many = place.diff()
    ends = []
    for sign in (1, -1):
        which = (level == sign) & (many > 0)
        length, at = many[which], place[:-1][which]
        column = (at % (columns + 1) - offsets_of(length)[:-1]).repeat_interleave(length)
        column += torch.arange(len(column), device=row.device)
        line = (at // (columns + 1)).repeat_interleave(length)
        ends.append(((line // height * columns + column) * height + line % height).sort().values)
    begin, end = ends
    listed = torch.bincount(begin // height, minlength=planes * columns)
    return offsets_of(listed), (begin % height).to(torch.int32), (end - begin).to(torch.int32)
