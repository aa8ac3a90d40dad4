"""BlockMask: which blocks of a (query, key) grid have positions to attend to, and the mask_mod that decides inside them.

Names and calls are those of torch.nn.attention.flex_attention. A position is allowed iff its block is listed and (the
block is listed full, or mask_mod says so). Lists are stored compressed; torch's padded tensors are made when asked for.
"""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flexref import block_algebra as algebra
from flexref import block_print
from flexref.block_arguments import (
    check_mask_mod,
    checked_block_size,
    checked_device,
    checked_index,
    checked_size,
    checked_sizes,
)
from flexref.block_build import build, create_mask
from flexref.block_lists import FULL, Grid, Lists, expand, first_problem, row_of_entry, take_rows
from flexref.block_state import Walk, loaded
from flexref.block_torch import TorchForm
from flexref.mask_mods import Offset, View, and_masks, noop_mask, not_mask, or_masks, shift_mask, xor_masks
from flexref.mod_objects import moved, same_mod
from flexref.program.compiled import original
from flexref.uncompiled import uncompiled

__all__ = ["BlockMask", "Lists", "and_masks", "create_block_mask", "create_mask", "noop_mask", "not_mask", "or_masks"]
__all__ += ["Walk", "shift_mask", "xor_masks"]


class BlockMask(TorchForm):
    """Immutable. B and H are 1 or those of the query.

    seq_lengths (q_len, kv_len); BLOCK_SIZE (q_block, kv_block); walk: what engines read; csr, csc: the lists by row and by
    column, and torch's padded tensors (see TorchForm): copies of them.
    """

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, q_len, kv_len)."""
        return self.B, self.H, *self.seq_lengths

    def numel(self) -> int:
        """How many positions there are, allowed or not."""
        return math.prod(self.shape)

    @uncompiled
    def sparsity(self) -> float:
        """Percent of the positions that lie in blocks not listed; 0 if there are no positions."""
        grid, listed = self.grid, 0
        for offsets, indices in (self._lists[:2], self._lists[2:]):
            row = row_of_entry(offsets) % max(grid.rows, 1)
            height = (grid.q_len - row * grid.q_block).clamp(max=grid.q_block)
            width = (grid.kv_len - indices.long() * grid.kv_block).clamp(max=grid.kv_block)
            listed += int((height * width).sum())
        return 100.0 * (self.numel() - listed) / self.numel() if self.numel() else 0.0

    @uncompiled
    def to_dense(self) -> Tensor:
        """Which blocks are listed: int32 (B, H, rows, columns)."""
        return (self._kinds() > 0).to(torch.int32)

    @uncompiled
    def listed(self) -> tuple[Tensor, Tensor]:
        """Which positions lie in listed blocks, and which in blocks listed full: two bool (B, H, q_len, kv_len)."""
        q, kv = (torch.arange(n, device=self.device) for n in self.seq_lengths)
        kinds = self._kinds()[:, :, (q // self.BLOCK_SIZE[0])[:, None], kv // self.BLOCK_SIZE[1]]
        return kinds > 0, kinds == FULL

    def _kinds(self) -> Tensor:
        kinds = expand(self._lists, 0, self.grid.flat_rows, self.grid.columns)
        return kinds.reshape(self.B, self.H, self.grid.rows, self.grid.columns)

    @uncompiled
    def to_string(self, grid_size: int | tuple[int, int] = (20, 20), limit: int = 4) -> str:
        """A picture: full blocks dark, partial ones light; at most grid_size cells (-1: one a block), `limit` heads."""
        return block_print.picture(self, grid_size, limit)

    def __str__(self) -> str:
        if self._leaves is not None:
            return repr(self)
        return f"BlockMask(shape={self.shape}, sparsity={self.sparsity():.2f}%,\n{self.to_string()}\n)"

    def __repr__(self) -> str:
        return block_print.description(self)

    @uncompiled
    def __eq__(self, other: object) -> bool:
        """The same lists, lengths and block sizes, and the same mask_mod."""
        if not isinstance(other, BlockMask):
            return NotImplemented
        if self is other:
            return True
        # same_mod knows tensors, and what else may stand in the leaves of a tree
        held = (x._leaves if x._leaves is not None else tuple(x._lists) for x in (self, other))
        return self.grid == other.grid and same_mod(*held) and same_mod(self.mask_mod, other.mask_mod)

    def __hash__(self) -> int:
        return hash(self.grid)

    @uncompiled
    def validate(self, level: str = "structure") -> None:
        """Raise ValueError if the lists are not sound: in range, ascending, each once, not both full and partial.

        level "semantic": also if they say anything else than mask_mod, which is asked about every position.
        """
        if level not in ("structure", "semantic"):
            raise ValueError(f'level must be "structure" or "semantic", got {level!r}')
        self.check_lists()
        found = first_problem(self._lists, self.grid)
        if not found and level == "semantic":
            found = algebra.disagreement(self._lists, self.mask_mod, self.grid, self.device)
        if found:
            raise ValueError(f"BlockMask of shape {self.shape}: {found}")

    @uncompiled
    def __getitem__(self, index) -> BlockMask:
        """By batch, head and row of query blocks; each an int (which keeps its dimension), a slice, or ints.

        mask_mod and seq_lengths follow: index 0 of the slice stands for the original that was asked for.
        """
        index = index if isinstance(index, tuple) else (index,)
        if len(index) > 3:
            raise IndexError(f"a BlockMask has 3 indices (batch, head, row of query blocks), got {len(index)}")
        grid, device = self.grid, self.device
        sizes = (("batches", grid.B), ("heads", grid.H), ("rows of query blocks", grid.rows))
        index += (slice(None),) * (3 - len(index))
        b, h, row = (algebra.picked(i, n, name) for i, (name, n) in zip(index, sizes, strict=True))
        q_view, q_len = algebra.row_selection(row, grid, device)
        views = algebra.selection(b, grid.B, device), algebra.selection(h, grid.H, device), q_view
        mod = self.mask_mod if views == (None, None, None) else View(self.mask_mod, *views)
        new = grid._replace(B=len(b), H=len(h), q_len=q_len)
        b, h, row = (torch.tensor(x, dtype=torch.int64, device=device) for x in (b, h, row))
        flat = ((b[:, None] * grid.H + h)[:, :, None] * grid.rows + row).reshape(-1)
        return self._make(new, take_rows(self._lists, flat), mod, self.separate_full_blocks, self._agrees)

    @uncompiled
    def rows(self, start: int, stop: int) -> BlockMask:
        """For the queries start..stop alone, wherever blocks begin: index 0 stands for `start`, as in decoding."""
        start, stop = checked_index("start", start), checked_index("stop", stop)
        if not 0 <= start <= stop <= self.grid.q_len:
            raise IndexError(f"rows {start} to {stop} are not within the {self.grid.q_len} queries")
        mod = View(self._agreeing().mask_mod, q_idx=Offset(start))
        return _built(type(self), mod, self.grid._replace(q_len=stop - start), self.device, self.separate_full_blocks)

    @uncompiled
    def resize(self, q_len: int, kv_len: int) -> BlockMask:
        """For other lengths, asking mask_mod anew. Lists that say less than mask_mod can be cropped, but not grown."""
        grid = self.grid._replace(q_len=checked_size("q_len", q_len), kv_len=checked_size("kv_len", kv_len))
        if self._agreeing() is self:
            return _built(type(self), self.mask_mod, grid, self.device, self.separate_full_blocks)
        if grid.q_len > self.grid.q_len or grid.kv_len > self.grid.kv_len:
            raise ValueError(
                "this BlockMask lists other blocks than its mask_mod allows, so nothing is known of positions beyond "
                f"{self.seq_lengths}; make one with create_block_mask(mask_mod, ..., {grid.q_len}, {grid.kv_len})"
            )
        lists = algebra.crop(self._lists, self.grid, grid, self.device)
        return self._make(grid, lists, self.mask_mod, self.separate_full_blocks, False)

    _adjust = resize

    def _agreeing(self) -> BlockMask:
        """Self if lists and mask_mod allow the same, else a mask that has its lists in its mask_mod."""
        if not self._agrees:
            if algebra.disagreement(self._lists, self.mask_mod, self.grid, self.device):
                mod = algebra.listed_mod(self._lists, self.mask_mod, self.grid)
                return self._make(self.grid, self._lists, mod, self.separate_full_blocks, True)
            vars(self)["_agrees"] = True
        return self

    @uncompiled
    def __and__(self, other: BlockMask) -> BlockMask:
        """Positions that both allow."""
        return self._combined("and", and_masks, other) if isinstance(other, BlockMask) else NotImplemented

    @uncompiled
    def __or__(self, other: BlockMask) -> BlockMask:
        """Positions that one of them allows."""
        return self._combined("or", or_masks, other) if isinstance(other, BlockMask) else NotImplemented

    @uncompiled
    def __invert__(self) -> BlockMask:
        """Positions that are not allowed."""
        mod = not_mask(self._agreeing().mask_mod)
        if not self.separate_full_blocks:
            return _built(type(self), mod, self.grid, self.device, False)
        return self._make(self.grid, algebra.invert(self._lists, self.grid, self.device), mod, True, True)

    def _combined(self, op: str, combinator: Callable, other: BlockMask) -> BlockMask:
        grid = algebra.common_grid(self.grid, other.grid)
        if self.device != other.device:
            raise ValueError(f"cannot combine BlockMasks on {self.device} and {other.device}; move one with .to()")
        masks = self._agreeing(), other._agreeing()
        mod = combinator(*(mask.mask_mod for mask in masks))
        if not (self.separate_full_blocks and other.separate_full_blocks):
            return _built(type(self), mod, grid, self.device, False)
        lists = algebra.combine(op, [(mask._lists, mask.grid) for mask in masks], mod, grid, self.device)
        return self._make(grid, lists, mod, True, True)

    @uncompiled
    def to(self, device: torch.device | str) -> BlockMask:
        """On `device`: the lists, and the tensors that mask_mod holds or captures in its closure."""
        lists = Lists(*(x.to(device) for x in self._lists))
        return self._make(self.grid, lists, moved(self.mask_mod, device), self.separate_full_blocks, self._agrees)


@uncompiled
def create_block_mask(
    mask_mod: Callable,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: torch.device | str | None = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,
    _compile: bool = False,
    separate_full_blocks: bool = True,
    compute_dq_write_order: bool = False,
    dq_kv_order: bool = True,
) -> BlockMask:
    """The BlockMask of mask_mod(b, h, q_idx, kv_idx) -> bool for Q_LEN queries and KV_LEN keys; B or H None, or 1, stand for any.

    BLOCK_SIZE: an int, or (q_block, kv_block). separate_full_blocks: list full blocks apart. device None: the accelerator, or
    else the CPU. A block is full if mask_mod allows every position of it that there is.
    _compile and the two last are torch's and change nothing. Raises TypeError or ValueError for wrong arguments and for a
    mask_mod of another arity or result, IndexError for one that reads a captured tensor out of range.
    """
    mask_mod = original(mask_mod)
    check_mask_mod(mask_mod)
    grid = Grid(*checked_sizes(B, H, Q_LEN, KV_LEN), *checked_block_size(BLOCK_SIZE))
    return _built(BlockMask, mask_mod, grid, checked_device(device), separate_full_blocks)


def _built(kind: type[BlockMask], mask_mod: Callable, grid: Grid, device: torch.device, separate: bool) -> BlockMask:
    lists = build(mask_mod, grid, device)
    if not separate:
        lists = algebra.unseparated(lists, grid, device)
    return kind._make(grid, lists, mask_mod, bool(separate), True)


# torch.load(weights_only=True) may make these; the classes of mods say it of themselves
torch.serialization.add_safe_globals([BlockMask, loaded, noop_mask])
