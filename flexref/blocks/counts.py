"""How many positions a mask allows, block by block and exactly, without a dense mask: what MaskStats and pictures count."""
from __future__ import annotations

import torch
from torch import Tensor

from flexref.blocks.build import Asker, build, program_of
from flexref.blocks.lists import Grid, Lists, row_of_entry
from flexref.blocks.mask_mods import noop_mask
from flexref.blocks.state import BlockState
from flexref.errors import TraceError

# positions asked together, and the sides of a tile of a block that has more
_POSITIONS, _TILE = 1 << 18, 512


def block_numbers(offsets: Tensor, indices: Tensor, grid: Grid) -> Tensor:
    """The listed blocks as int64 (N,): flat row * columns + column, ascending."""
    return row_of_entry(offsets) * grid.columns + indices


def block_positions(blocks: Tensor, grid: Grid) -> Tensor:
    """How many positions there are in each of `blocks` (N,): int64 (N,), less in those at the ends."""
    row, column = blocks // grid.columns % grid.rows, blocks % grid.columns
    return _extent(row, grid.q_block, grid.q_len) * _extent(column, grid.kv_block, grid.kv_len)


def allowed_in(mask: BlockState, blocks: Tensor) -> Tensor:
    """How many positions mask_mod allows in each of `blocks` (N,), on the mask's device: int64 (N,)."""
    if mask.mask_mod is noop_mask or not len(blocks):
        return block_positions(blocks, mask.grid)
    with torch.no_grad():
        asked, place = torch.unique(_first_alike(mask, blocks), return_inverse=True)
        ask, grid = Asker(mask.mask_mod, mask.device), mask.grid
        size = min(grid.q_block, grid.q_len, _TILE) * min(grid.kv_block, grid.kv_len, _TILE)
        counts = [_asked(ask, part, grid, mask.device) for part in asked.split(max(1, _POSITIONS // size))]
        return torch.cat(counts)[place]


def separated(mask: BlockState) -> Lists:
    """The mask's lists; where it lists full blocks as partial ones and is known to say what mask_mod says, those apart."""
    if mask.separate_full_blocks or not mask._agrees:
        return mask.walk.lists
    return build(mask.mask_mod, mask.grid, mask.device)


def _extent(index: Tensor, size: int, length: int) -> Tensor:
    return (length - index * size).clamp(max=size)


def _first_alike(mask: BlockState, blocks: Tensor) -> Tensor:
    """The same block of batch or head 0, if mask_mod does not read which batch or head it is."""
    grid = mask.grid
    try:
        program = program_of(mask.mask_mod, mask.device, torch.float32)
    except TraceError:
        program = None
    if program is None:
        return blocks
    size = grid.rows * grid.columns
    b, h = blocks // size // grid.H, blocks // size % grid.H
    b, h = (index if program.graph.uses(name) else 0 * index for name, index in (("b", b), ("h", h)))
    return (b * grid.H + h) * size + blocks % size


def _asked(ask: Asker, blocks: Tensor, grid: Grid, device: torch.device) -> Tensor:
    row, column = blocks // grid.columns, blocks % grid.columns
    b, h = row // grid.rows // grid.H, row // grid.rows % grid.H
    counts = torch.zeros_like(blocks)
    for q_idx in _tiles(row % grid.rows, grid.q_block, grid.q_len, device):
        for kv_idx in _tiles(column, grid.kv_block, grid.kv_len, device):
            # the block may reach behind the end, where the last position is asked again and not counted
            allowed = ask(b, h, q_idx.clamp(max=grid.q_len - 1), kv_idx.clamp(max=grid.kv_len - 1))
            there = (q_idx < grid.q_len)[:, :, None] & (kv_idx < grid.kv_len)[:, None, :]
            counts += (allowed & there).flatten(1).sum(1)
    return counts


def _tiles(index: Tensor, size: int, length: int, device: torch.device):
    """The positions (N, up to _TILE) of each block along one side, some at a time."""
    for some in torch.arange(min(size, length), device=device).split(_TILE):
        yield index[:, None] * size + some
