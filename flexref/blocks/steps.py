"""A step of decoding: the lists of some queries of a mask, found on the device, so that the host waits for nothing.

The lists of a mask are laid out in places once (`Places`). The lists of a step are a place: its offsets are cut out, and its
columns stay where they are. Which place it is, the host knows of a number, and the device finds of a tensor (`Steps`).
"""
from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from flexref.blocks.lists import PARTIAL, Blocks, Grid, Lists, of_stretches, stretches, take_rows
from flexref.blocks.runs import offsets_of
from flexref.blocks.walk import Walk

# layouts that a mask keeps
_KEPT = 8


class Places:
    """Lists in which place p is the flat rows p * size to (p + 1) * size."""

    def __init__(self, lists: Lists, size: int):
        self.lists, self.size, self.ends = lists, size, offsets_of(lists.full_counts)

    @cached_property
    def most(self) -> int:
        """How many full blocks a place has at most."""
        before = self.ends[self.lists.full_offsets[:: self.size]]
        return int(before.diff().max()) if len(before) > 1 else 0

    def at(self, place: int) -> tuple[Tensor, Tensor]:
        """Offsets and full offsets of a place, in memory of their own: kernels are compiled for how pointers are aligned."""
        first = place * self.size
        offsets, _, full_offsets, _, _ = self.lists
        return offsets[first : first + self.size + 1].clone(), full_offsets[first : first + self.size + 1].clone()

    @cached_property
    def tables(self) -> list[Tensor]:
        """The same of every place: (places, size + 1) each, which share their memory."""
        shape = (len(self.lists.offsets) - 1) // self.size, self.size + 1
        return [x.as_strided(shape, (self.size, 1)) for x in (self.lists.offsets, self.lists.full_offsets)]


class StepWalk(Walk):
    """What engines read of a place. Offsets do not begin at 0, and what they point into is the lists of all places."""

    def __init__(self, grid: Grid, places: Places, offsets: Tensor, full_offsets: Tensor):
        _, indices, _, starts, counts = places.lists
        super().__init__(grid, Lists(offsets, indices, full_offsets, starts, counts))
        self.places = places

    @cached_property
    def lists(self) -> Lists:
        """The lists of the place alone; this waits for the device."""
        return take_rows(self.runs, torch.arange(self.grid.flat_rows, device=self.runs.offsets.device))

    @property
    def ends(self) -> Tensor:
        return self.places.ends

    @cached_property
    def csr(self) -> Blocks:
        """Each block by row: as many places for full ones as the largest place needs, since the host does not know this one's."""
        offsets, indices, full_offsets, starts, _ = self.runs
        before = self.ends[full_offsets]
        block = before[:1] + torch.arange(self.places.most, device=offsets.device)
        run = (torch.searchsorted(self.ends, block, right=True) - 1).clamp(max=len(starts) - 1)
        return Blocks(offsets, indices, before - before[:1], (starts[run] + block - self.ends[run]).to(torch.int32))


def row_walk(walk: Walk, row: int, new: Grid) -> StepWalk:
    """One row of blocks, of each batch and head, for the queries of `new`."""
    places = walk.kept.get(0)
    if places is None:
        grid, lists = walk.grid, walk.lists
        if grid.B * grid.H > 1:
            rows = torch.arange(grid.flat_rows, device=lists.offsets.device)
            lists = take_rows(lists, rows.reshape(-1, grid.rows).mT.reshape(-1))
        places = walk.kept[0] = Places(lists, grid.B * grid.H)
    return StepWalk(new, places, *places.at(row))


class Steps:
    """The places of all steps of a length.

    A step that begins where a row of blocks does, or lies within one, has the lists of these rows. Any other has in each of
    its rows some queries of one and some of the next: what is full in both is full, what is empty in both is empty, and the
    mask_mod is asked about the rest. A start that is out of range has a place with nothing in it.
    """

    def __init__(self, walk: Walk, length: int):
        grid, lists, device = walk.grid, walk.lists, walk.runs.offsets.device
        planes, self.grid = grid.B * grid.H, grid._replace(q_len=length)
        row = torch.arange(grid.flat_rows, device=device).reshape(planes, grid.rows)
        following = row[:, torch.arange(1, grid.rows + 1, device=device).clamp(max=grid.rows - 1)]
        first, count, (kind, below) = stretches((lists, take_rows(lists, following.reshape(-1))), grid)
        pairs = of_stretches(first, count, torch.where(kind == below, kind, PARTIAL), grid)
        # rows alone, then rows with the next one, then one that is empty
        every = _behind(_behind(lists, pairs), of_stretches(first[:0], count[:0], kind[:0], grid._replace(B=1, H=1, q_len=1)))
        # place 2 r + 1 begins with row r alone, place 2 r + 2 with it and the next; the first place and the last are empty
        number = torch.arange(grid.rows, device=device)[:, None]
        at = (number + torch.arange(self.grid.rows, device=device)).clamp(max=grid.rows - 1)
        alone = row[:, at].transpose(0, 1).flatten(1)
        nothing = torch.full_like(alone[:1], 2 * grid.flat_rows)
        rows = torch.cat([nothing, torch.stack([alone, alone + grid.flat_rows], 1).flatten(0, 1), nothing])
        self.places = Places(take_rows(every, rows.reshape(-1)), planes * self.grid.rows)
        # the starts at which each place but the first begins
        within = grid.q_block - length if self.grid.rows == 1 else 0
        begins = number * grid.q_block + torch.tensor([0, within + 1], device=device)
        behind = grid.q_len - length + 1
        self.begins = torch.cat([begins.flatten(), begins.new_tensor([behind])]).clamp(max=behind)

    def walk(self, start: Tensor) -> StepWalk:
        """Of a 0-d int64 tensor."""
        place = torch.bucketize(start.reshape(1), self.begins, right=True)
        return StepWalk(self.grid, self.places, *(x.index_select(0, place).view(-1) for x in self.places.tables))


def _behind(a: Lists, b: Lists) -> Lists:
    """The rows of `a` and then those of `b`."""
    parts = [torch.cat([a[i], b[i] if i not in (0, 2) else a[i][-1] + b[i][1:]]) for i in range(5)]
    return Lists(*parts)


def step_walk(walk: Walk, start: Tensor, length: int) -> StepWalk:
    """The queries from `start` on, int64, on the device."""
    steps = walk.kept.get(length)
    if steps is None:
        if len(walk.kept) >= _KEPT:
            walk.kept.clear()
        steps = walk.kept[length] = Steps(walk, length)
    return steps.walk(start)
