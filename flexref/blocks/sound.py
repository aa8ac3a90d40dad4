"""What is wrong with lists that come from outside, in words: kernels compute addresses from them."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flexref.blocks.lists import Grid, Lists
from flexref.blocks.runs import row_of_entry

_MOST = torch.iinfo(torch.int32).max


def check_fits(grid: Grid) -> None:
    """Raise ValueError for more rows or columns of blocks than an int32 can number."""
    for name, count in (("queries", grid.rows), ("keys", grid.columns)):
        if count > _MOST:
            raise ValueError(f"{count} blocks of {name} are more than {_MOST}, the most that lists can name; take larger blocks")


def first_problem(lists: Lists, grid: Grid) -> str | None:
    """What is structurally wrong with the lists, in words; None if they are sound."""
    partial = lists.offsets, lists.indices, None
    for name, offsets, starts, counts in (("partial", *partial), ("full", *lists.full)):
        for problem in _problems(name, offsets, starts, counts, grid):
            return problem
    # an int32 column cannot reach beyond its own row's numbers, however many columns there are
    width = min(grid.columns, _MOST + 1)
    at = row_of_entry(lists.offsets) * width + lists.indices
    begin = row_of_entry(lists.full_offsets) * width + lists.full_starts
    run = torch.searchsorted(begin, at, right=True) - 1
    both = at[(run >= 0) & (at < (begin + lists.full_counts)[run])] if len(begin) else begin
    if len(both):
        row, column = divmod(int(both[0]), width)
        return f"block {_place(row, grid)}, column {column} is listed both partial and full; list it once"
    return None


def _problems(name: str, offsets: Tensor, starts: Tensor, counts: Tensor | None, grid: Grid) -> Iterator[str]:
    entries = [starts] if counts is None else [starts, counts]
    if offsets.dtype != torch.int64 or any(x.dtype != torch.int32 for x in entries):
        held = "indices" if counts is None else "starts and counts"
        found = ", ".join(str(x.dtype) for x in (offsets, *entries))
        yield f"{name} lists are {found}; they must be int64 offsets and int32 {held}"
    what = "blocks" if counts is None else "runs"
    fits = offsets.shape == (grid.flat_rows + 1,) and all(x.shape == (starts.numel(),) for x in entries)
    if not fits or int(offsets[0]) != 0 or int(offsets[-1]) != len(starts):
        yield f"{name} offsets do not fit {grid.flat_rows} rows and {' and '.join(str(x.numel()) for x in entries)} listed {what}"
        return
    # compared, not subtracted: a difference of huge offsets wraps around
    if bool((offsets[1:] < offsets[:-1]).any()):
        yield f"{name} offsets descend; they must be running sums of counts"
        return
    row, first = row_of_entry(offsets), starts.long()
    last = first if counts is None else first + counts - 1
    for at in (last < first).nonzero()[:, 0].tolist()[:1]:
        yield f"{name} list of {_place(int(row[at]), grid)} has a run of {int(last[at] - first[at] + 1)} columns"
    for at in ((first < 0) | (last >= grid.columns)).nonzero()[:, 0].tolist()[:1]:
        wrong = int(first[at]) if int(first[at]) < 0 else int(last[at])
        yield f"{name} list of {_place(int(row[at]), grid)} names column {wrong}; columns are 0 to {grid.columns - 1}"
    for at in ((row[1:] == row[:-1]) & (first[1:] <= last[:-1])).nonzero()[:, 0].tolist()[:1]:
        yield (
            f"{name} list of {_place(int(row[at]), grid)} has column {int(first[at + 1])} after {int(last[at])}; "
            "columns must ascend, each listed once"
        )
    if counts is not None:
        for at in ((row[1:] == row[:-1]) & (first[1:] == last[:-1] + 1)).nonzero()[:, 0].tolist()[:1]:
            yield f"{name} list of {_place(int(row[at]), grid)} has two runs that touch in column {int(last[at])}; make them one"


def _place(flat_row: int, grid: Grid) -> str:
    bh, row = divmod(flat_row, grid.rows)
    return f"(b={bh // grid.H}, h={bh % grid.H}) row {row}"
