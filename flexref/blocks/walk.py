"""What engines read of a BlockMask: the lists by row and by column, as runs or one by one, and in which order to launch."""
from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flexref.blocks.lists import Blocks, Grid, Lists, one_by_one, transpose
from flexref.blocks.runs import offsets_of


class Walk:
    """The lists that engines read: sound, on the mask's device, contiguous, and nobody else's. Never written.

    `runs` lists columns by flat row (b * H + h) * rows + row, full ones as runs; `column_runs` rows by flat column
    (b * H + h) * columns + column. `csr` and `csc` are the same with each full block by itself, for engines that do not read
    runs: this is the one place where runs are written out for a kernel, once a mask, when the first engine asks.
    """

    def __init__(self, grid: Grid, runs: Lists):
        self.grid, self.runs = grid, runs
        # what steps.py lays out once for all steps
        self.kept: dict[int, Any] = {}

    @property
    def lists(self) -> Lists:
        """The lists and nothing else: `runs` of a step of decoding points into those of other steps too."""
        return self.runs

    @cached_property
    def ends(self) -> Tensor:
        """int64 (runs + 1,): how many full blocks come before each run."""
        return offsets_of(self.runs.full_counts)

    @cached_property
    def csr(self) -> Blocks:
        """Each block by row."""
        return one_by_one(self.runs)

    @cached_property
    def column_runs(self) -> Lists:
        """The same blocks by column."""
        return transpose(self.lists, self.grid)

    @cached_property
    def csc(self) -> Blocks:
        """Each block by column."""
        return one_by_one(self.column_runs)

    @cached_property
    def row_order(self) -> Tensor:
        """int32 (B * H * rows,): the flat rows, those that list the most blocks first, for launching in that order."""
        return _by_work(self.runs, self.ends)

    @cached_property
    def column_order(self) -> Tensor:
        """int32 (B * H * columns,): the flat columns, those that list the most blocks first."""
        return _by_work(self.column_runs, offsets_of(self.column_runs.full_counts))


def _by_work(lists: Lists, ends: Tensor) -> Tensor:
    """Rows with as many blocks stay in order."""
    blocks = lists.offsets.diff() + ends[lists.full_offsets].diff()
    return torch.sort(blocks, descending=True, stable=True).indices.to(torch.int32)
