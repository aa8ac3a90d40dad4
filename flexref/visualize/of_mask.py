"""A mask as pictures: single positions if they fit, else one cell a block, else the allowed share of many blocks a cell."""
from __future__ import annotations

import torch
from torch import Tensor

from flexref.blocks.build import Asker
from flexref.blocks.counts import allowed_in, block_positions, separated
from flexref.blocks.lists import FULL, PARTIAL, Lists, expand, take_rows
from flexref.blocks.mask import BlockMask
from flexref.visualize.picture import BLOCKS, ELEMENTS, SHARE, Picture
from flexref.visualize.window import Side, Window, side_of

# blocks looked at together
_STRIP = 1 << 18


def mask_pictures(mask: BlockMask, window: Window) -> list[Picture]:
    """One of each head. Raises ValueError for a step, and what mask_mod raises."""
    for name, positions in (("queries", window.queries), ("keys", window.keys)):
        if positions.step != 1:
            raise ValueError(f"{name} of a mask must have a step of 1, got {positions!r}.")
    sides, blocks = (window.queries, window.keys), tuple(map(_blocks, (window.queries, window.keys), mask.BLOCK_SIZE))
    draw = _shares
    if max(map(len, sides)) <= window.max_cells:
        draw = _elements
    elif max(map(len, blocks)) <= window.max_cells:
        draw = _kinds
    with torch.no_grad():
        return [draw(mask, window, head, *blocks) for head in window.heads]


def block_rows(mask: BlockMask, b: int, h: int, q_idx: Tensor) -> tuple[Tensor, Tensor]:
    """The kinds of the rows of blocks that q_idx (R,) lies in, int8 (rows, columns), and which of them each query has (R,)."""
    grid = mask.grid
    row, place = torch.unique(q_idx // grid.q_block, return_inverse=True)
    return expand(take_rows(mask.walk.lists, _first_row(mask, b, h) + row), 0, len(row), grid.columns), place


def _blocks(positions: range, size: int) -> range:
    """The blocks that the positions lie in."""
    return range(positions.start // size, (positions.stop - 1) // size + 1)


def _whole_blocks(blocks: range, size: int, positions: range, max_cells: int) -> Side:
    side = side_of(blocks, max_cells)
    return Side(side.first * size, side.cell * size, side.cells, positions.start, positions.stop)


def _title(mask: BlockMask, window: Window, head: int) -> str:
    batch = f"batch {window.batch}, " if mask.B > 1 else ""
    return f"{batch}head {head}" if mask.H > 1 else f"{batch}all heads"


def _elements(mask: BlockMask, window: Window, head: int, rows: range, columns: range) -> Picture:
    """Values: the kind of the position's block, and 3 for a position that mask_mod allows in a partial one."""
    b, q_idx, kv_idx = window.batch, *(torch.arange(x.start, x.stop, device=mask.device) for x in (window.queries, window.keys))
    kinds, place = block_rows(mask, b, head, q_idx)
    kinds = kinds[place][:, kv_idx // mask.BLOCK_SIZE[1]].long()
    q, kv = (kinds == PARTIAL).nonzero(as_tuple=True)
    if len(q):
        at = torch.full_like(q, b), torch.full_like(q, head), q_idx[q, None], kv_idx[kv, None]
        kinds[q, kv] = torch.where(Asker(mask.mask_mod, mask.device)(*at)[:, 0, 0], 3, PARTIAL)
    sides = side_of(window.queries, window.max_cells), side_of(window.keys, window.max_cells)
    kinds = kinds.cpu()
    return Picture(ELEMENTS, kinds.double(), kinds < FULL, *sides, _title(mask, window, head), mask.BLOCK_SIZE)


def _kinds(mask: BlockMask, window: Window, head: int, rows: range, columns: range) -> Picture:
    """Values: the kind of each block."""
    first = _first_row(mask, window.batch, head)
    kinds = _strip(mask.walk.lists, mask, first, rows, columns).cpu()
    sides = _cells_of_blocks(mask, window, rows, columns)
    return Picture(BLOCKS, kinds.double(), kinds == 0, *sides, _title(mask, window, head), mask.BLOCK_SIZE)


def _shares(mask: BlockMask, window: Window, head: int, rows: range, columns: range) -> Picture:
    """Values: the share of a cell's positions that is allowed."""
    sides, lists = _cells_of_blocks(mask, window, rows, columns), separated(mask)
    per_row, per_column = (side.cell // size for side, size in zip(sides, mask.BLOCK_SIZE, strict=True))
    allowed = torch.zeros(sides[0].cells, sides[1].cells, dtype=torch.int64, device=mask.device)
    everything = torch.zeros_like(allowed)
    first, step = _first_row(mask, window.batch, head), max(1, _STRIP // len(columns))
    column = torch.arange(columns.start, columns.stop, device=mask.device)
    for start in range(rows.start, rows.stop, step):
        some = range(start, min(start + step, rows.stop))
        row = torch.arange(some.start, some.stop, device=mask.device)
        number = (first + row[:, None]) * mask.grid.columns + column
        kinds, size = _strip(lists, mask, first, some, columns), block_positions(number, mask.grid)
        count = torch.where(kinds == FULL, size, 0)
        count[kinds == PARTIAL] = allowed_in(mask, number[kinds == PARTIAL])
        for total, part in ((allowed, count), (everything, size)):
            by_column = torch.zeros(len(row), sides[1].cells, dtype=torch.int64, device=mask.device)
            by_column.index_add_(1, (column - columns.start) // per_column, part)
            total.index_add_(0, (row - rows.start) // per_row, by_column)
    share = (allowed.double() / everything).cpu()
    return Picture(SHARE, share, share == 0, *sides, _title(mask, window, head))


def _first_row(mask: BlockMask, b: int, h: int) -> int:
    """The flat row that a batch and head begin with; a mask for 1 is that of any."""
    return ((b if mask.B > 1 else 0) * mask.H + (h if mask.H > 1 else 0)) * mask.grid.rows


def _strip(lists: Lists, mask: BlockMask, first: int, rows: range, columns: range) -> Tensor:
    """The kinds of some blocks: int8 (rows, columns)."""
    return expand(lists, first + rows.start, first + rows.stop, mask.grid.columns)[:, columns.start : columns.stop]


def _cells_of_blocks(mask: BlockMask, window: Window, rows: range, columns: range) -> tuple[Side, Side]:
    q_block, kv_block = mask.BLOCK_SIZE
    return (
        _whole_blocks(rows, q_block, window.queries, window.max_cells),
        _whole_blocks(columns, kv_block, window.keys, window.max_cells),
    )
