"""BlockMask: which blocks of a (query, key) grid have positions to attend to, and the mask_mod that decides inside them.

Names and calls are those of torch.nn.attention.flex_attention. A position is allowed iff its block is listed and (the
block is listed full, or mask_mod says so). Lists are stored compressed; torch's padded tensors are made when asked for.
"""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flexref.blocks import algebra, printing
from flexref.blocks.build import create_mask
from flexref.blocks.inputs import (
    check_mask_mod,
    checked_block_size,
    checked_device,
    checked_sizes,
)
from flexref.blocks.lists import FULL, Blocks, Grid, Lists, expand, sparsity
from flexref.blocks.mask_mods import and_masks, noop_mask, not_mask, or_masks, shift_mask, xor_masks
from flexref.blocks.operators import BlockOperators, built
from flexref.blocks.sound import first_problem
from flexref.blocks.state import loaded
from flexref.blocks.stats import MaskStats, stats_of
from flexref.blocks.walk import Walk
from flexref.program.compiled import original
from flexref.program.mod_objects import same_mod
from flexref.uncompiled import uncompiled

__all__ = ["BlockMask", "Blocks", "Lists", "and_masks", "create_block_mask", "create_mask", "noop_mask", "not_mask", "or_masks"]
__all__ += ["Walk", "shift_mask", "xor_masks"]


class BlockMask(BlockOperators):
    """Immutable. B and H are 1 or those of the query.

    seq_lengths (q_len, kv_len); BLOCK_SIZE (q_block, kv_block); walk: what engines read; runs: the lists as they are held;
    csr, csc: each block by row and by column, and torch's padded tensors (see TorchForm): copies. What makes other masks of it
    is in BlockOperators.
    """

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, q_len, kv_len)."""
        return self.grid.shape

    def numel(self) -> int:
        """How many positions there are, allowed or not."""
        return math.prod(self.shape)

    @uncompiled
    def sparsity(self) -> float:
        """Percent of the positions that lie in blocks not listed; 0 if there are no positions."""
        return sparsity(self._lists, self.grid)

    @uncompiled
    def stats(
        self,
        head_dim: int = 64,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        *,
        batch: int | None = None,
        heads: int | None = None,
        kv_heads: int | None = None,
        count_allowed: bool = True,
    ) -> MaskStats:
        """Blocks, positions, FLOPs, bytes moved, forward and backward, and imbalance; MaskStats says what each counts.

        head_dim, value_dim (by default the same), dtype: of query, key and value. batch, heads: of the query, where the mask
        is for 1, which serves any. kv_heads: of key and value, by default as many as heads. Positions allowed in partial
        blocks are counted by asking mask_mod, some at a time; count_allowed=False leaves that out. No memory grows with
        q_len * kv_len. Raises TypeError or ValueError for wrong arguments, and what mask_mod raises.
        """
        return stats_of(self, head_dim, value_dim, dtype, batch, heads, kv_heads, count_allowed)

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
        return printing.picture(self, grid_size, limit)

    def __str__(self) -> str:
        if self._leaves is not None:
            return repr(self)
        return f"BlockMask(shape={self.shape}, sparsity={self.sparsity():.2f}%,\n{self.to_string()}\n)"

    def __repr__(self) -> str:
        return printing.description(self)

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
    else the CPU. A block is full if mask_mod allows every position of it that there is. Floats within mask_mod are float32, as
    in a call of float32 or a narrower type: for a call of float64 whose mask reads floats, give that call mask_mod instead.
    _compile and the two last are torch's and change nothing. Raises TypeError or ValueError for wrong arguments and for a
    mask_mod of another arity or result, IndexError for one that reads a captured tensor out of range where it is asked
    mask_mod of another arity or result, IndexError for one that reads a captured tensor out of range
    """
    return mask_of_call(mask_mod, (B, H, Q_LEN, KV_LEN), device, torch.float32, BLOCK_SIZE, separate_full_blocks)


def mask_of_call(
    mask_mod: Callable,
    sizes: tuple[int | None, int | None, int, int],
    device: torch.device | str | None,
    acc: torch.dtype,
    block_size: int | tuple[int, int] = 128,
    separate: bool = True,
) -> BlockMask:
    """create_block_mask for a call whose accumulation type is known; sizes (B, H, q_len, kv_len)."""
    mask_mod = original(mask_mod)
    check_mask_mod(mask_mod)
    grid = Grid(*checked_sizes(*sizes), *checked_block_size(block_size))
    return built(BlockMask, mask_mod, grid, checked_device(device), separate, acc)


# torch.load(weights_only=True) may make these; the classes of mods say it of themselves
torch.serialization.add_safe_globals([BlockMask, loaded, noop_mask])
