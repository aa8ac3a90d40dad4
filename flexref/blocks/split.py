"""Finds out the kinds of blocks by splitting: the program of a mask is asked about large tiles, and only those that stay
open are split, down to blocks; of a block that stays open some positions are asked, and two different ones settle it.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flexref.blocks.lists import EMPTY, FULL, PARTIAL, Grid, Lists
from flexref.blocks.runs import Runs, merged, written_out
from flexref.program.interval import Interval, interval

# a side has at most so many tiles to begin with, and an open tile is split into so many a side
_FIRST, _SPLIT = 16, 4
# tiles looked at together
_TILES = 1 << 15


class Tiles(NamedTuple):
    """Rectangles of blocks, ends excluded; int64 (N,) each. `plane` is b * H + h."""

    plane: Tensor
    row: Tensor
    row_end: Tensor
    column: Tensor
    column_end: Tensor

    def pick(self, which: Tensor | slice) -> Tiles:
        return Tiles(*(x[which] for x in self))


Kinds = Callable[[Interval, Interval, Interval, Interval], Tensor]


def split(classify: Kinds, grid: Grid, decide: Callable[[Tensor], Tensor] | None = None) -> dict[int, list[Tiles]]:
    """The tiles that are PARTIAL, each a block, and those that are FULL, of any size.

    `classify`: b, h, q_idx, kv_idx of some tiles -> their kinds, PARTIAL where it does not know. `decide`: numbers of blocks
    (N,), flat row * columns + column, -> their kinds, exactly; without it a block that stays open is PARTIAL.
    """
    found: dict[int, list[Tiles]] = {PARTIAL: [], FULL: []}
    size = 1
    while max(grid.rows, grid.columns) > size * _FIRST:
        size *= _SPLIT
    todo = [(size, _tiled(_whole(grid), size))] if grid.flat_rows and grid.columns else []
    while todo:
        size, tiles = todo.pop()
        if len(tiles.plane) > _TILES:
            todo.append((size, tiles.pick(slice(_TILES, None))))
            tiles = tiles.pick(slice(_TILES))
        kind = _kinds(classify, tiles, grid)
        found[FULL].append(tiles.pick(kind == FULL))
        tiles = tiles.pick(kind == PARTIAL)
        if size > 1:
            todo.append((size // _SPLIT, _tiled(tiles, size // _SPLIT)))
        elif len(tiles.plane):
            kind = _settled(classify, tiles, grid, decide) if decide else torch.full_like(tiles.plane, PARTIAL)
            for each, parts in found.items():
                parts.append(tiles.pick(kind == each))
    return found


def _whole(grid: Grid) -> Tiles:
    plane = torch.arange(grid.B * grid.H, device="cpu")
    none = torch.zeros_like(plane)
    return Tiles(plane, none, none + grid.rows, none, none + grid.columns)


def _tiled(tiles: Tiles, size: int) -> Tiles:
    """Each cut into squares of `size` blocks, those at its ends smaller."""
    heights, widths = tiles.row_end - tiles.row, tiles.column_end - tiles.column
    down, across = (int(-(-x.max() // size)) if len(x) else 1 for x in (heights, widths))
    row = tiles.row[:, None] + torch.arange(down, device="cpu") * size
    column = tiles.column[:, None] + torch.arange(across, device="cpu") * size
    there = (row < tiles.row_end[:, None])[:, :, None] & (column < tiles.column_end[:, None])[:, None, :]
    which, i, j = there.nonzero(as_tuple=True)
    row, column = row[which, i], column[which, j]
    ends = torch.minimum(row + size, tiles.row_end[which]), torch.minimum(column + size, tiles.column_end[which])
    return Tiles(tiles.plane[which], row, ends[0], column, ends[1])


def _positions(tiles: Tiles, grid: Grid) -> tuple[Tensor, ...]:
    """b, h, and the first and the last query and key of each tile."""
    q_last = (tiles.row_end * grid.q_block).clamp(max=grid.q_len) - 1
    kv_last = (tiles.column_end * grid.kv_block).clamp(max=grid.kv_len) - 1
    return (
        tiles.plane // max(grid.H, 1), tiles.plane % max(grid.H, 1),
        tiles.row * grid.q_block, q_last, tiles.column * grid.kv_block, kv_last,
    )  # fmt: skip


def _kinds(classify: Kinds, tiles: Tiles, grid: Grid) -> Tensor:
    b, h, q_first, q_last, kv_first, kv_last = _positions(tiles, grid)
    return classify(_point(b, grid.B), _point(h, grid.H), interval(q_first, q_last), interval(kv_first, kv_last))


def _point(index: Tensor, extent: int) -> Interval:
    return interval(0.0) if extent == 1 else interval(index)


def _settled(classify: Kinds, tiles: Tiles, grid: Grid, decide: Callable[[Tensor], Tensor]) -> Tensor:
    """The kinds (N,) of single blocks that intervals leave open."""
    b, h, q_first, q_last, kv_first, kv_last = _positions(tiles, grid)
    beside = torch.minimum(kv_first + 1, kv_last)
    samples = ((q_first, kv_first), (q_last, kv_first), (q_first, kv_last), (q_last, kv_last), (q_first, beside))
    at = _point(b, grid.B), _point(h, grid.H)
    seen = torch.stack([classify(*at, interval(q), interval(kv)) for q, kv in samples])
    mixed = (seen == EMPTY).any(0) & (seen == FULL).any(0)
    kind = torch.full_like(seen[0], PARTIAL)
    number = (tiles.plane * grid.rows + tiles.row) * grid.columns + tiles.column
    open_ = (~mixed).nonzero()[:, 0]
    if len(open_):
        kind[open_] = decide(number[open_])
    return kind


def lists_of(found: dict[int, list[Tiles]], grid: Grid, device: torch.device) -> Lists:
    """The lists of what `split` found."""
    lists = Lists(*written_out(*_listed(found[PARTIAL], grid)), *_listed(found[FULL], grid))
    return Lists(*(x.to(device) for x in lists))


def _listed(parts: list[Tiles], grid: Grid) -> Runs:
    """The runs of what the tiles cover, which do not overlap."""
    tiles = Tiles(*(torch.cat(columns) for columns in zip(_whole(grid).pick(slice(0)), *parts, strict=True)))
    heights = tiles.row_end - tiles.row
    which = torch.repeat_interleave(torch.arange(len(heights), device="cpu"), heights)
    below = torch.arange(len(which), device="cpu") - torch.repeat_interleave(heights.cumsum(0) - heights, heights)
    row = tiles.plane[which] * grid.rows + tiles.row[which] + below
    order = (row * max(grid.columns, 1) + tiles.column[which]).argsort()
    which = which[order]
    return merged(row[order], tiles.column[which], tiles.column_end[which] - tiles.column[which], grid.flat_rows)
