"""Between a BlockMask and torch's: its padded tensors, and torch.nn.attention.flex_attention.BlockMask itself."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor

from flexref.blocks.inputs import check_list, check_mask_mod, checked_block_size, checked_lengths
from flexref.blocks.lists import Grid, Lists, from_padded, to_padded
from flexref.blocks.mask_mods import noop_mask
from flexref.blocks.runs import runs_of, written_out
from flexref.blocks.sound import check_fits, first_problem
from flexref.blocks.state import BlockState
from flexref.blocks.walk import Walk
from flexref.program.compiled import original
from flexref.program.mod_objects import attribute

Columns = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


class TorchForm(BlockState):
    """The third of BlockMask that speaks torch: made from padded tensors, and read as such.

    kv_num_blocks (B, H, rows), kv_indices (B, H, rows, columns), q_num_blocks (B, H, columns), q_indices (B, H, columns,
    rows), and the same of full blocks, which are None if full blocks are not listed apart: int32 copies, made when asked for.
    """

    def __init__(
        self,
        seq_lengths: tuple[int, int],
        kv_num_blocks: Tensor,
        kv_indices: Tensor,
        full_kv_num_blocks: Tensor | None = None,
        full_kv_indices: Tensor | None = None,
        q_num_blocks: Tensor | None = None,
        q_indices: Tensor | None = None,
        full_q_num_blocks: Tensor | None = None,
        full_q_indices: Tensor | None = None,
        BLOCK_SIZE: int | tuple[int, int] = 128,
        mask_mod: Callable | None = None,
        *,
        dq_write_order: Tensor | None = None,
        dq_write_order_full: Tensor | None = None,
        dq_kv_order: Tensor | bool | None = None,
        dq_kv_order_spt: bool | None = None,
    ):
        """From torch's padded tensors, as `from_kv_blocks`. Not read: the q_ lists, which are made from the kv_ lists,
        and torch's dq_ arguments, which order the work of its kernels."""
        mask_mod = noop_mask if mask_mod is None else mask_mod
        mask_mod = original(mask_mod)
        check_mask_mod(mask_mod)
        lengths = checked_lengths(seq_lengths)
        tensors = kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices
        grid, lists = lists_from_tensors(tensors, lengths, checked_block_size(BLOCK_SIZE))
        found = None if lists.offsets.is_meta else first_problem(lists, grid)
        if found:
            raise ValueError(f"BlockMask of shape {(grid.B, grid.H, *lengths)}: {found}")
        self._set(grid, Walk(grid, lists), None, mask_mod, full_kv_num_blocks is not None, False)

    @classmethod
    def from_kv_blocks(
        cls,
        kv_num_blocks: Tensor,
        kv_indices: Tensor,
        full_kv_num_blocks: Tensor | None = None,
        full_kv_indices: Tensor | None = None,
        BLOCK_SIZE: int | tuple[int, int] = 128,
        mask_mod: Callable | None = None,
        seq_lengths: tuple[int, int] | None = None,
        compute_q_blocks: bool = True,
        *,
        dq_write_order: Tensor | None = None,
        dq_write_order_full: Tensor | None = None,
        dq_kv_order: Tensor | bool | None = None,
    ) -> Self:
        """From counts (B, H, rows) and indices (B, H, rows, width) of integers; width may be less than the columns.

        What stands behind a row's count is not read. seq_lengths None: whole blocks, as many columns as the indices are
        wide. Raises ValueError for lists that do not fit, repeat, or name a block both full and partial.
        """
        if seq_lengths is None:
            sizes = checked_block_size(BLOCK_SIZE)
            seq_lengths = default_lengths(kv_num_blocks, kv_indices, full_kv_indices, sizes)
        lists = kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices
        return cls(seq_lengths, *lists, BLOCK_SIZE=BLOCK_SIZE, mask_mod=mask_mod)

    @classmethod
    def from_torch(cls, block_mask: Any) -> Self:
        """The same mask from a torch.nn.attention.flex_attention.BlockMask."""
        return cls.from_kv_blocks(**from_torch_arguments(block_mask))

    @property
    def _by_row(self) -> Columns:
        grid = self.grid
        return self._copied("by_row", lambda: self._padded(self._lists, grid.rows, grid.columns))  # type: ignore[return-value]

    @property
    def _by_column(self) -> Columns:
        grid = self.grid
        return self._copied("by_column", lambda: self._padded(self.walk.column_runs, grid.columns, grid.rows))  # type: ignore[return-value]

    def _padded(self, lists: Lists, rows: int, columns: int) -> tuple[Any, ...]:
        shape = self.grid.B, self.grid.H, rows
        full = to_padded(*written_out(*lists.full), shape, columns) if self.separate_full_blocks else (None, None)
        return *to_padded(*lists[:2], shape, columns), *full

    @property
    def kv_num_blocks(self) -> Tensor:
        return self._by_row[0]

    @property
    def kv_indices(self) -> Tensor:
        return self._by_row[1]

    @property
    def full_kv_num_blocks(self) -> Tensor | None:
        return self._by_row[2]

    @property
    def full_kv_indices(self) -> Tensor | None:
        return self._by_row[3]

    @property
    def q_num_blocks(self) -> Tensor:
        return self._by_column[0]

    @property
    def q_indices(self) -> Tensor:
        return self._by_column[1]

    @property
    def full_q_num_blocks(self) -> Tensor | None:
        return self._by_column[2]

    @property
    def full_q_indices(self) -> Tensor | None:
        return self._by_column[3]

    @overload
    def as_tuple(
        self, flatten: Literal[True] = ...
    ) -> tuple[int, int, *Columns, *Columns, None, None, None, None, int, int, Callable]: ...

    @overload
    def as_tuple(
        self, flatten: Literal[False]
    ) -> tuple[tuple[int, int], *Columns, *Columns, None, None, None, None, tuple[int, int], Callable]: ...

    def as_tuple(self, flatten: bool = True) -> tuple[Any, ...]:
        """The attributes in torch's order, None for its four dq_ ones; `flatten` spreads lengths and block sizes."""
        lengths, sizes = (self.seq_lengths, self.BLOCK_SIZE) if flatten else ((self.seq_lengths,), (self.BLOCK_SIZE,))
        return *lengths, *self._by_row, *self._by_column, *(None,) * 4, *sizes, self.mask_mod

    def to_torch(self) -> Any:
        """The same mask as a torch.nn.attention.flex_attention.BlockMask."""
        from torch.nn.attention import flex_attention as theirs

        mask_mod = theirs.noop_mask if self.mask_mod is noop_mask else self.mask_mod
        lists = self._padded(self._lists, self.grid.rows, self.grid.columns)
        return theirs.BlockMask.from_kv_blocks(
            *lists, BLOCK_SIZE=self.BLOCK_SIZE, mask_mod=mask_mod, seq_lengths=self.seq_lengths
        )


def from_torch_arguments(block_mask: Any) -> dict[str, Any]:
    """What BlockMask.from_kv_blocks needs to make the mask that torch's `block_mask` is."""
    mod = block_mask.mask_mod
    name = attribute(mod, "__name__", "") if attribute(mod, "__module__", "").startswith("torch.nn.attention") else ""
    if name == "_sliced_mask_mod_error":
        raise ValueError(
            "this torch BlockMask is a slice, which has lost its mask_mod; take BlockMask.from_torch of the whole mask "
            "and slice that"
        )
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "BLOCK_SIZE", "seq_lengths")
    return {n: getattr(block_mask, n) for n in names} | {"mask_mod": noop_mask if name == "noop_mask" else mod}


def default_lengths(counts: Any, indices: Any, full_indices: Any, block_size: tuple[int, int]) -> tuple[int, int]:
    """torch's lengths where none are given: whole blocks, as many columns as the indices are wide."""
    check_list("kv_num_blocks", counts)
    check_list("kv_indices", indices)
    widths = [x.shape[-1] for x in (indices, full_indices) if isinstance(x, Tensor) and x.dim()]
    if not counts.dim() or not widths:
        raise ValueError("kv_num_blocks and kv_indices must be (B, H, rows) and (B, H, rows, width), got a 0-d tensor")
    return counts.shape[-1] * block_size[0], max(widths) * block_size[1]


def lists_from_tensors(
    tensors: tuple[Any, Any, Any, Any], seq_lengths: tuple[int, int], block_size: tuple[int, int]
) -> tuple[Grid, Lists]:
    """The grid and the lists of torch's padded tensors, whose columns are not yet checked.

    Raises TypeError for what is no integer tensor, ValueError for shapes, counts and lengths that do not fit.
    """
    if (tensors[2] is None) != (tensors[3] is None):
        raise ValueError("full_kv_num_blocks and full_kv_indices go together: give both, or neither")
    counts, indices = _checked("kv", *tensors[:2])
    full = (torch.zeros_like(counts), indices[..., :0]) if tensors[2] is None else _checked("full_kv", *tensors[2:])
    if full[0].shape != counts.shape or full[0].device != counts.device:
        raise ValueError(
            f"full_kv_num_blocks is {tuple(full[0].shape)} on {full[0].device}, but kv_num_blocks is "
            f"{tuple(counts.shape)} on {counts.device}; they must be alike"
        )
    grid = Grid(counts.shape[0], counts.shape[1], *seq_lengths, *block_size)
    if grid.rows != counts.shape[2]:
        raise ValueError(
            f"kv_num_blocks has {counts.shape[2]} rows, but {grid.q_len} queries in blocks of {grid.q_block} make "
            f"{grid.rows}; mind seq_lengths and BLOCK_SIZE"
        )
    check_fits(grid)
    return grid, Lists(*from_padded(counts, indices), *runs_of(*from_padded(*full)))


def _checked(name: str, counts: Any, indices: Any) -> tuple[Tensor, Tensor]:
    """Counts as (B, H, rows), indices as (B, H, rows, width)."""
    check_list(f"{name}_num_blocks", counts)
    check_list(f"{name}_indices", indices)
    if not 1 <= counts.dim() <= 3 or indices.shape[:-1] != counts.shape or not indices.dim():
        raise ValueError(
            f"{name}_num_blocks must be (B, H, rows) and {name}_indices (B, H, rows, width), "
            f"got {tuple(counts.shape)} and {tuple(indices.shape)}"
        )
    if counts.device != indices.device:
        raise ValueError(f"{name}_num_blocks is on {counts.device} but {name}_indices on {indices.device}; move one")
    width = indices.shape[-1]
    wrong = counts[(counts < 0) | (counts > width)]
    if len(wrong):
        raise ValueError(f"{name}_num_blocks counts {int(wrong[0])} blocks in a row; {name}_indices holds 0 to {width}")
    missing = (1,) * (3 - counts.dim())
    return counts.reshape(*missing, *counts.shape), indices.reshape(*missing, *indices.shape)
