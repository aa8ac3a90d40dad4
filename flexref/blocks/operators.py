"""What makes other BlockMasks of a BlockMask: slices, other lengths, `& | ^ - ~`, transposed, shifted, one behind another.

Each is the mask that create_block_mask would make of the same operation on the mask_mods.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from flexref.blocks import algebra
from flexref.blocks.build import build
from flexref.blocks.inputs import check_offset, check_start, checked_index, checked_size
from flexref.blocks.lists import Grid, Lists, take_rows
from flexref.blocks.mask_mods import (
    Concatenated,
    Offset,
    Transposed,
    View,
    and_masks,
    not_mask,
    or_masks,
    shift_mask,
    xor_masks,
)
from flexref.blocks.steps import row_walk, step_walk
from flexref.blocks.torch_form import TorchForm
from flexref.blocks.walk import Walk
from flexref.program.mod_objects import moved
from flexref.uncompiled import uncompiled

_ALONG = {"batches": "B", "heads": "H", "queries": "q_len", "keys": "kv_len"}


class BlockOperators(TorchForm):
    """The third of BlockMask that makes others."""

    @uncompiled
    def __getitem__(self, index) -> Self:
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
    def rows(self, start: int | Tensor, stop: int | None = None, *, length: int | None = None) -> Self:
        """For the queries start..stop alone, or `length` of them, wherever blocks begin: index 0 stands for `start`.

        As in decoding: nothing waits for the device, but the first step of a length. Queries of one row of blocks take over its
        lists, which may then name a block that has nothing for them. `start` may be a 0-d integer tensor on the mask's device,
        and `length` a number: the mask is that of the value that `start` has now, whatever is written into it later. Where it
        is negative or beyond q_len - length, which nobody can see without a wait, nothing is allowed.
        """
        if isinstance(start, Tensor):
            return self._step(start, stop, length)
        if (stop is None) == (length is None):
            raise TypeError("rows(start, stop) or rows(start, length=n): give one of stop and length")
        grid, start = self.grid, checked_index("start", start)
        stop = checked_index("stop", stop) if length is None else start + checked_index("length", length)
        if not 0 <= start <= stop <= grid.q_len:
            raise IndexError(f"rows {start} to {stop} are not within the {grid.q_len} queries")
        row, new = start // grid.q_block, grid._replace(q_len=stop - start)
        if start < stop <= (row + 1) * grid.q_block and grid.B * grid.H:
            return self._of_walk(row_walk(self.walk, row, new), View(self.mask_mod, q_idx=Offset(start)), self._agrees)
        mod = View(self._agreeing().mask_mod, q_idx=Offset(start))
        return built(type(self), mod, new, self.device, self.separate_full_blocks)

    def _step(self, start: Tensor, stop: int | None, length: int | None) -> Self:
        check_start(start, self.device)
        if stop is not None or length is None:
            raise TypeError("rows(start, length=n) for a start that is a tensor: how many queries there are must be a number")
        if not 0 <= checked_index("length", length) <= self.grid.q_len:
            raise IndexError(f"{length} rows are not within the {self.grid.q_len} queries")
        if 0 in (length, self.B, self.H):
            return self.rows(0, length)
        # blocks that two rows of blocks say different things of are asked
        whole = self._agreeing()
        start = start.detach().to(torch.int64, copy=True)
        # the mask_mod says nothing of a start that is out of range
        return whole._of_walk(step_walk(whole.walk, start, length), View(whole.mask_mod, q_idx=Offset(start)), False)

    def _of_walk(self, walk: Walk, mod: Callable, agrees: bool) -> Self:
        mask = type(self).__new__(type(self))
        mask._set(walk.grid, walk, None, mod, self.separate_full_blocks, agrees)
        return mask

    @uncompiled
    def transpose(self) -> Self:
        """Queries and keys in each other's place."""
        grid = self.grid
        new = Grid(grid.B, grid.H, grid.kv_len, grid.q_len, grid.kv_block, grid.q_block)
        return self._make(new, self.walk.column_runs, Transposed(self.mask_mod), self.separate_full_blocks, self._agrees)

    @uncompiled
    def shift(self, q_offset: int | Tensor = 0, kv_offset: int | Tensor = 0) -> Self:
        """What mask_mod says at (q_idx + q_offset, kv_idx + kv_offset), on the same grid; nothing beside lists made by hand."""
        check_offset("q_offset", q_offset)
        check_offset("kv_offset", kv_offset)
        mod = shift_mask(self._agreeing().mask_mod, q_offset, kv_offset)
        return built(type(self), mod, self.grid, self.device, self.separate_full_blocks)

    @uncompiled
    def resize(self, q_len: int, kv_len: int) -> Self:
        """For other lengths, asking mask_mod anew. Lists that say less than mask_mod can be cropped, but not grown."""
        grid = self.grid._replace(q_len=checked_size("q_len", q_len), kv_len=checked_size("kv_len", kv_len))
        if self._agreeing() is self:
            return built(type(self), self.mask_mod, grid, self.device, self.separate_full_blocks)
        if grid.q_len > self.grid.q_len or grid.kv_len > self.grid.kv_len:
            raise ValueError(
                "this BlockMask lists other blocks than its mask_mod allows, so nothing is known of positions beyond "
                f"{self.seq_lengths}; make one with create_block_mask(mask_mod, ..., {grid.q_len}, {grid.kv_len})"
            )
        lists = algebra.crop(self._lists, self.grid, grid)
        return self._make(grid, lists, self.mask_mod, self.separate_full_blocks, False)

    _adjust = resize

    def _agreeing(self) -> Self:
        """Self if lists and mask_mod allow the same, else a mask that has its lists in its mask_mod."""
        # how a mask was made stays what it was, whatever turned out about it
        if not self._agrees and "_same" not in vars(self):
            in_mod: Self | None = self._in_mod
            if in_mod is None and algebra.disagreement(self._lists, self.mask_mod, self.grid, self.device):
                mod = algebra.listed_mod(self._lists, self.mask_mod, self.grid)
                in_mod = self._make(self.grid, self._lists, mod, self.separate_full_blocks, True)
            if in_mod is not None:
                vars(self)["_in_mod"] = in_mod
                return in_mod
            vars(self)["_same"] = True
        return self

    @uncompiled
    def __and__(self, other: BlockOperators) -> Self:
        """Positions that both allow."""
        return self._combined("and", and_masks, other) if isinstance(other, BlockOperators) else NotImplemented

    @uncompiled
    def __or__(self, other: BlockOperators) -> Self:
        """Positions that one of them allows."""
        return self._combined("or", or_masks, other) if isinstance(other, BlockOperators) else NotImplemented

    @uncompiled
    def __xor__(self, other: BlockOperators) -> Self:
        """Positions that one of them allows and the other does not."""
        return self._combined("xor", xor_masks, other) if isinstance(other, BlockOperators) else NotImplemented

    @uncompiled
    def __sub__(self, other: BlockOperators) -> Self:
        """Positions that it allows and the other does not."""
        return self & ~other if isinstance(other, BlockOperators) else NotImplemented

    @uncompiled
    def __invert__(self) -> Self:
        """Positions that are not allowed."""
        mod = not_mask(self._agreeing().mask_mod)
        if not self.separate_full_blocks:
            return built(type(self), mod, self.grid, self.device, False)
        return self._make(self.grid, algebra.invert(self._lists, self.grid), mod, True, True)

    def _combined(self, op: str, combinator: Callable, other: BlockOperators) -> Self:
        grid = algebra.common_grid(self.grid, other.grid)
        if self.device != other.device:
            raise ValueError(f"cannot combine BlockMasks on {self.device} and {other.device}; move one with .to()")
        masks = self._agreeing(), other._agreeing()
        for mask in masks:
            algebra.check_serves(mask.mask_mod, mask.grid, grid)
        mod = combinator(*(mask.mask_mod for mask in masks))
        if not (self.separate_full_blocks and other.separate_full_blocks):
            return built(type(self), mod, grid, self.device, False)
        lists = algebra.combine(op, [(mask._lists, mask.grid) for mask in masks], mod, grid, self.device)
        return self._make(grid, lists, mod, True, True)

    @uncompiled
    def to(self, device: torch.device | str) -> Self:
        """On `device`: the lists, and the tensors that mask_mod holds or captures in its closure."""
        lists = Lists(*(x.to(device) for x in self._lists))
        return self._make(self.grid, lists, moved(self.mask_mod, device), self.separate_full_blocks, self._agrees)


def built(kind: type, mask_mod: Callable, grid: Grid, device: torch.device, separate: bool, acc: torch.dtype = torch.float32):
    """The BlockMask of a mask_mod, asked anew; `acc`: the one float within it."""
    lists = build(mask_mod, grid, device, acc)
    if not separate:
        lists = algebra.unseparated(lists, grid)
    return kind._make(grid, lists, mask_mod, bool(separate), True)


@uncompiled
def concat_masks(masks: Sequence[BlockOperators], along: str):
    """BlockMasks one behind another, along "batches", "heads", "queries" or "keys"; they are alike in all else.

    Along the heads it gives each head a mask of its own: concat_masks([create_block_mask(mod, ...) for mod in mods], "heads").
    Raises TypeError for what is no BlockMask, ValueError for masks that do not fit, or none.
    """
    if along not in _ALONG:
        raise ValueError(f"along must be one of {', '.join(_ALONG)}, got {along!r}")
    masks = list(masks)
    wrong = [type(mask).__name__ for mask in masks if not isinstance(mask, BlockOperators)]
    if wrong or not masks:
        raise TypeError(f"masks must be BlockMasks, at least one, got {wrong[0] if wrong else 'none'}")
    part, first = _ALONG[along], masks[0]
    for i, mask in enumerate(masks):
        for name, value in _described(mask).items():
            wanted = _described(first)[name]
            if name != part and value != wanted:
                raise ValueError(
                    f"masks one behind another along {along} must be alike in all else; {name} of number {i} is {value} and of "
                    f"number 0 {wanted}"
                )
    sizes = [getattr(mask.grid, part) for mask in masks]
    mod = Concatenated([mask._agreeing().mask_mod for mask in masks], sizes, list(_ALONG).index(along))
    grid = first.grid._replace(**{part: sum(sizes)})
    return built(type(first), mod, grid, first.device, first.separate_full_blocks)


def _described(mask: BlockOperators) -> dict[str, object]:
    return mask.grid._asdict() | {"device": mask.device, "separate_full_blocks": mask.separate_full_blocks}
