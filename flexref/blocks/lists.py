"""The lists of blocks that a BlockMask holds, and what can be done with them without knowing any mask_mod.

A row of blocks lists the columns of its blocks that are not empty, ascending: those to be asked (`indices`) apart from
those that are full. The lists of all rows lie one behind the other, so that memory grows with what is listed. Rows are
flat: row r of batch b and head h is (b * H + h) * rows + r. The kind of a block is 0 empty, 1 partial, 2 full.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

EMPTY, PARTIAL, FULL = 0, 1, 2
# blocks looked at together: bounds the memory of what goes through kinds
_STRIP = 1 << 18
# runs of columns written out together
_RUNS = 64


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
    """offsets, full_offsets: int64 (flat rows + 1,); indices, full_indices: int32, row after row, ascending in each."""

    offsets: Tensor
    indices: Tensor
    full_offsets: Tensor
    full_indices: Tensor


def collect(kinds: Iterable[Tensor], device: torch.device) -> Lists:
    """Lists from int8 strips (n, columns), which together are all rows in order."""
    found: dict[int, tuple[list[Tensor], list[Tensor]]] = {PARTIAL: ([], []), FULL: ([], [])}
    for strip in kinds:
        for kind, (counts, indices) in found.items():
            match = strip == kind
            counts.append(match.sum(1))
            indices.append(match.nonzero()[:, 1].to(torch.int32))
    none = [torch.zeros(0, dtype=torch.int64, device=device)]
    parts = [torch.cat(part or none) for pair in found.values() for part in pair]
    return Lists(_offsets(parts[0]), parts[1].to(torch.int32), _offsets(parts[2]), parts[3].to(torch.int32))


def expand(lists: Lists, first: int, last: int, columns: int) -> Tensor:
    """The kinds of flat rows first..last: int8 (last - first, columns)."""
    kinds = torch.zeros(last - first, columns, dtype=torch.int8, device=lists.offsets.device)
    for kind, offsets, indices in ((PARTIAL, *lists[:2]), (FULL, *lists[2:])):
        bounds = offsets[first : last + 1]
        start, stop = int(bounds[0]), int(bounds[-1])
        kinds[row_of_entry(bounds), indices[start:stop].long()] = kind
    return kinds


def take_rows(lists: Lists, rows: Tensor) -> Lists:
    """The lists of the given flat rows, in that order; rows may repeat."""
    return Lists(*_take(*lists[:2], rows), *_take(*lists[2:], rows))


def one_row(lists: Lists, grid: Grid, row: int) -> Lists:
    """The lists of one row of blocks, of each batch and head."""
    parts: list[Tensor] = []
    for offsets, indices in (lists[:2], lists[2:]):
        starts, stops = offsets[row : -1 : grid.rows].tolist(), offsets[row + 1 :: grid.rows].tolist()
        counts = [stop - start for start, stop in zip(starts, stops, strict=True)]
        pieces = [indices[start:stop] for start, stop in zip(starts, stops, strict=True)]
        parts.append(torch.tensor([0, *accumulate(counts)], device=offsets.device))
        parts.append(pieces[0] if len(pieces) == 1 else torch.cat(pieces))
    return Lists(*parts)


def _take(offsets: Tensor, indices: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    new = _offsets(offsets.diff()[rows])
    shift = torch.repeat_interleave(offsets[:-1][rows] - new[:-1], new.diff())
    return new, indices[shift + torch.arange(len(shift), device=shift.device)]


def broadcast(lists: Lists, grid: Grid, wanted: Grid) -> Lists:
    """The lists of a grid for one with more batches or heads, of which it has as many, or 1."""
    if (grid.B, grid.H) == (wanted.B, wanted.H):
        return lists
    rows = torch.arange(grid.flat_rows, device=lists.offsets.device).reshape(grid.B, grid.H, grid.rows)
    return take_rows(lists, rows.expand(wanted.B, wanted.H, grid.rows).reshape(-1))


def transpose(offsets: Tensor, indices: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The same blocks listed by column: flat rows are now (b * H + h) * columns + column, indices are rows."""
    row = row_of_entry(offsets)
    flat_column = row // max(grid.rows, 1) * grid.columns + indices
    order = torch.sort(flat_column, stable=True).indices
    counts = torch.bincount(flat_column, minlength=grid.B * grid.H * grid.columns)
    return _offsets(counts), (row % max(grid.rows, 1))[order].to(torch.int32)


def by_work(lists: Lists) -> Tensor:
    """int32: the flat rows, those with the most listed blocks first; rows with as many stay in order."""
    counts = lists.offsets.diff() + lists.full_offsets.diff()
    return torch.sort(counts, descending=True, stable=True).indices.to(torch.int32)


def row_of_entry(offsets: Tensor) -> Tensor:
    """The flat row of each listed block, counted from the first row of `offsets`."""
    counts = offsets.diff()
    return torch.repeat_interleave(torch.arange(len(counts), device=offsets.device), counts)


def sparsity(lists: Lists, grid: Grid) -> float:
    """Percent of the positions that lie in blocks not listed; 0 if there are no positions."""
    positions, listed = math.prod(grid.shape), 0
    for offsets, indices in (lists[:2], lists[2:]):
        row = row_of_entry(offsets) % max(grid.rows, 1)
        height = (grid.q_len - row * grid.q_block).clamp(max=grid.q_block)
        width = (grid.kv_len - indices.long() * grid.kv_block).clamp(max=grid.kv_block)
        listed += int((height * width).sum())
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
    return _offsets(counts), flat[used].to(torch.int32)


def from_runs(row: Tensor, start: Tensor, length: Tensor, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lists from runs of columns, int64 (N,) each on the CPU, in order: by row, and by column in a row."""
    counts = torch.zeros(rows, dtype=torch.int64, device="cpu").index_add_(0, row, length)
    after = torch.ones(len(row), dtype=torch.bool, device="cpu")
    after[1:] = (row[1:] != row[:-1]) | (start[1:] != start[:-1] + length[:-1])
    ends = length.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    # runs that follow one another are one
    start, first = start[after], (ends - length)[after]
    length = torch.cat([first[1:], first.new_tensor([total])[: len(first)]]) - first
    indices = torch.empty(total, dtype=torch.int32, device="cpu")
    at = 0
    for columns, lengths in zip(start.split(_RUNS), length.split(_RUNS), strict=True):
        written = int(lengths.sum())
        # the column of an entry is its run's first, and how far it is behind the run's first entry
        shift = (columns - lengths.cumsum(0) + lengths).to(torch.int32).repeat_interleave(lengths)
        torch.add(shift, torch.arange(written, dtype=torch.int32, device="cpu"), out=indices[at : at + written])
        at += written
    return _offsets(counts).to(device), indices.to(device)


def first_problem(lists: Lists, grid: Grid) -> str | None:
    """What is structurally wrong with the lists, in words; None if they are sound."""
    for name, offsets, indices in (("partial", *lists[:2]), ("full", *lists[2:])):
        for problem in _problems(name, offsets, indices, grid):
            return problem
    partial, full = (row_of_entry(lists[i]) * grid.columns + lists[i + 1] for i in (0, 2))
    both = partial[torch.isin(partial, full)]
    if len(both):
        row, column = divmod(int(both[0]), grid.columns)
        return f"block {_place(row, grid)}, column {column} is listed both partial and full; list it once"
    return None


def _problems(name: str, offsets: Tensor, indices: Tensor, grid: Grid) -> Iterator[str]:
    if offsets.dtype != torch.int64 or indices.dtype != torch.int32:
        yield f"{name} lists are {offsets.dtype} and {indices.dtype}; they must be int64 offsets and int32 indices"
    fits = offsets.shape == (grid.flat_rows + 1,) and indices.dim() == 1
    if not fits or int(offsets[0]) != 0 or int(offsets[-1]) != len(indices):
        yield f"{name} offsets do not fit {grid.flat_rows} rows and {indices.numel()} listed blocks"
        return
    # compared, not subtracted: a difference of huge offsets wraps around
    if bool((offsets[1:] < offsets[:-1]).any()):
        yield f"{name} offsets descend; they must be running sums of counts"
        return
    row = row_of_entry(offsets)
    outside = ((indices < 0) | (indices >= grid.columns)).nonzero()[:, 0].tolist()
    if outside:
        at, n = outside[0], grid.columns
        yield f"{name} list of {_place(int(row[at]), grid)} names column {int(indices[at])}; columns are 0 to {n - 1}"
    repeated = ((row[1:] == row[:-1]) & (indices[1:] <= indices[:-1])).nonzero()[:, 0].tolist()
    if repeated:
        at = repeated[0]
        yield (
            f"{name} list of {_place(int(row[at]), grid)} has column {int(indices[at + 1])} after {int(indices[at])}; "
            "columns must ascend, each listed once"
        )


def _place(flat_row: int, grid: Grid) -> str:
    bh, row = divmod(flat_row, grid.rows)
    return f"(b={bh // grid.H}, h={bh % grid.H}) row {row}"


def _offsets(counts: Tensor) -> Tensor:
    """int64 (n + 1,): 0 and the running sums."""
    return torch.cat([counts.new_zeros(1, dtype=torch.int64), counts.long().cumsum(0)])
