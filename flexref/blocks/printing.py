"""A BlockMask as text: one cell a block, or a group of blocks where there are too many."""
from __future__ import annotations

import torch
from torch import Tensor

from flexref.blocks.lists import EMPTY, FULL, expand, sparsity
from flexref.blocks.state import BlockState
from flexref.program.mod_objects import name_of

_CELL = {"empty": "  ", "partial": "░░", "full": "██"}


def picture(mask: BlockState, grid_size: int | tuple[int, int], limit: int) -> str:
    """One grid for each of the first `limit` pairs (b, h); at most grid_size cells, -1 for one cell a block."""
    sizes = (grid_size, grid_size) if isinstance(grid_size, int) else tuple(grid_size)
    if len(sizes) != 2 or any(not isinstance(n, int) or n == 0 or n < -1 for n in sizes):
        raise ValueError(f"grid_size must be a positive int, -1, or a pair of them, got {grid_size!r}")
    grid, parts = mask.grid, []
    for bh in range(min(limit, grid.B * grid.H)):
        kinds = expand(mask._lists, bh * grid.rows, (bh + 1) * grid.rows, grid.columns)
        parts.append("\n".join([f"({bh // grid.H}, {bh % grid.H})", *_lines(kinds.cpu(), *sizes)]))
    if limit < grid.B * grid.H:
        parts.append(f"... and {grid.B * grid.H - limit} more")
    return "\n\n".join(parts)


def description(mask: BlockState) -> str:
    """What a BlockMask is, a line for each thing."""
    try:
        lists = mask._lists
    except (TypeError, ValueError) as error:
        return f"BlockMask(shape={mask.grid.shape}, of leaves that are no lists: {error})"
    full, every = int(lists.full_counts.sum()), mask.grid.flat_rows * mask.grid.columns
    lines = [
        f"shape={mask.grid.shape}",
        f"BLOCK_SIZE={mask.BLOCK_SIZE}",
        f"blocks=(partial={len(lists.indices)}, full={full}, of={every})",
        f"sparsity={sparsity(lists, mask.grid):.2f}%",
        f"device={mask.device}",
        f"mask_mod={name_of(mask.mask_mod)}",
    ]
    return "BlockMask(\n    " + ",\n    ".join(lines) + "\n)"


def _lines(kinds: Tensor, max_rows: int, max_columns: int) -> list[str]:
    for dim, most in ((0, max_rows), (1, max_columns)):
        kinds = _grouped(kinds, dim, most)
    names = {EMPTY: "empty", FULL: "full"}
    return ["".join(_CELL[names.get(kind, "partial")] for kind in row) for row in kinds.tolist()]


def _grouped(kinds: Tensor, dim: int, most: int) -> Tensor:
    """At most `most` groups of neighbours along `dim`: a group of one kind has it, any other is partial."""
    n = kinds.shape[dim]
    size = 1 if most == -1 or n <= most else -(-n // most)
    if size == 1:
        return kinds
    groups = -(-n // size)
    # the last group is filled up with its last member, which changes nothing
    at = torch.arange(groups * size, device="cpu").clamp(max=n - 1)
    parts = kinds.index_select(dim, at).unflatten(dim, (groups, size))
    least, most_kind = parts.amin(dim + 1), parts.amax(dim + 1)
    return torch.where(least == most_kind, least, 1)
