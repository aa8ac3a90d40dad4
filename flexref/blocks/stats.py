"""What a block mask means for the work of attention: how much there is to compute and to move, and how evenly it lies."""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flexref.blocks.algebra import check_serves
from flexref.blocks.counts import allowed_in, block_numbers, separated
from flexref.blocks.inputs import checked_size
from flexref.blocks.lists import Grid, Lists
from flexref.blocks.runs import Runs, offsets_of
from flexref.blocks.state import BlockState

_DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64


@dataclass(frozen=True)
class MaskStats:
    """What BlockMask.stats() tells; print it. All counts are of whole calls, of all batches and heads in `shape`.

    shape              (batch, query heads, q_len, kv_len)
    block_size         (q_block, kv_block)
    head_dim, value_dim, dtype   what FLOPs and bytes are calculated for
    full, partial, empty         blocks listed full, blocks listed in which mask_mod is asked, blocks not listed
    computed           positions in listed blocks: what a block-sparse kernel computes
    allowed            positions that are attended to; None if they were not counted
    forward_flops, backward_flops   floating point operations of the matrix products. A product of (m, n) by (n, k) has
        2 m n k: m n k products, each added. Forward has two, q k^T and p v; backward has five, q k^T again,
        grad_out v^T, p^T grad_out, ds k and ds^T q. For each computed position that is 2 E + 2 Ev, and 6 E + 4 Ev: 4 D and
        10 D where head_dim E and value_dim Ev are one D. Softmax and mods are not counted.
    forward_bytes, backward_bytes   bytes that go between memory and a block-sparse kernel that keeps nothing from block to
        block but what it adds up. Forward: query read, out and lse written once, and for each listed block its keys and
        values read. Backward: key and value read and their gradients written once, out and grad_out read once for
        D = sum of grad_out * out, which is written, query's gradient rounded once; and for each listed block query,
        grad_out, lse and D of its queries read, and query's gradient read and written to add to it. A cache saves some.
        lse, D and what is added up are of the accumulation type. Lists and captured tensors are not counted.
    row_imbalance, column_imbalance, head_imbalance   the most computed positions of a row of blocks, of a column of
        blocks, of a (batch, head), over their mean: 1 is even; 1 also where nothing is computed
    """

    shape: tuple[int, int, int, int]
    block_size: tuple[int, int]
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    full: int
    partial: int
    empty: int
    computed: int
    allowed: int | None
    forward_flops: int
    backward_flops: int
    forward_bytes: int
    backward_bytes: int
    row_imbalance: float
    column_imbalance: float
    head_imbalance: float

    @property
    def blocks(self) -> int:
        """All blocks, listed or not."""
        return self.full + self.partial + self.empty

    @property
    def positions(self) -> int:
        """All positions, allowed or not."""
        batch, heads, q_len, kv_len = self.shape
        return batch * heads * q_len * kv_len

    def __str__(self) -> str:
        q_block, kv_block = self.block_size
        allowed = "allowed not counted"
        if self.allowed is not None:
            allowed = f"{self.allowed:,} allowed ({_share(self.allowed, self.positions)})"
        dims = f"head_dim {self.head_dim}" + (f", value_dim {self.value_dim}" if self.value_dim != self.head_dim else "")
        imbalance = f"rows {self.row_imbalance:.2f}, columns {self.column_imbalance:.2f}, heads {self.head_imbalance:.2f}"
        lines = [
            f"BlockMask {self.shape} in blocks of {q_block} x {kv_block}",
            f"blocks     {self.blocks:,}: {self.full:,} full, {self.partial:,} partial, {self.empty:,} empty",
            f"positions  {self.positions:,}: {allowed}, {self.computed:,} computed ({_share(self.computed, self.positions)})",
            f"forward    {_scaled(self.forward_flops, 'FLOP')}, {_scaled(self.forward_bytes, 'B')} moved",
            f"backward   {_scaled(self.backward_flops, 'FLOP')}, {_scaled(self.backward_bytes, 'B')} moved",
            f"           for {dims}, {str(self.dtype).removeprefix('torch.')}",
            f"imbalance  {imbalance} (most over mean; 1 is even)",
        ]
        return "\n".join(lines)


class _Work(NamedTuple):
    """Of listed blocks: positions by flat row (B * H * rows,), by flat column, and the sums of their heights and widths."""

    by_row: Tensor
    by_column: Tensor
    heights: int
    widths: int


def stats_of(
    mask: BlockState,
    head_dim: int,
    value_dim: int | None,
    dtype: torch.dtype,
    batch: int | None,
    heads: int | None,
    kv_heads: int | None,
    count_allowed: bool,
) -> MaskStats:
    """See BlockMask.stats."""
    grid, lists = mask.grid, mask.walk.lists
    E = checked_size("head_dim", head_dim, 1)
    Ev = E if value_dim is None else checked_size("value_dim", value_dim, 1)
    if dtype not in _DTYPES:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    B, H = _of_call("batch", batch, grid.B), _of_call("heads", heads, grid.H)
    Hkv = H if kv_heads is None else checked_size("kv_heads", kv_heads, 1)
    if mask._agrees:
        check_serves(mask.mask_mod, grid, grid._replace(B=B, H=H))
    if H % max(Hkv, 1):
        raise ValueError(f"kv_heads must divide the {H} heads of the query, got {Hkv}")
    # a mask of one batch or head serves each of the call's
    times = B // grid.B * (H // grid.H) if grid.B and grid.H else 0
    some, whole = _work(_single(lists), grid), _work(lists.full, grid)
    by_row, by_column = some.by_row + whole.by_row, some.by_column + whole.by_column
    heights, widths = (some.heights + whole.heights) * times, (some.widths + whole.widths) * times
    computed = int(by_row.sum()) * times
    partial, full = len(lists.indices) * times, int(lists.full_counts.sum()) * times
    moved = _bytes(E, Ev, dtype, B * H * grid.q_len, B * Hkv * grid.kv_len, heights, widths)
    return MaskStats(
        (B, H, grid.q_len, grid.kv_len), mask.BLOCK_SIZE, E, Ev, dtype,
        full, partial, B * H * grid.rows * grid.columns - full - partial,
        computed, _allowed(mask) * times if count_allowed else None,
        (2 * E + 2 * Ev) * computed, (6 * E + 4 * Ev) * computed, *moved,
        *(_imbalance(x) for x in (by_row, by_column, by_row.reshape(grid.B * grid.H, grid.rows).sum(1))),
    )  # fmt: skip


def _of_call(name: str, given: int | None, own: int) -> int:
    """How many batches or heads the call has."""
    size = own if given is None else checked_size(name, given)
    if own not in (1, size):
        raise ValueError(f"{name} is {size}, but the mask is for {own}; only a mask for 1 serves any number")
    return size


def _single(lists: Lists) -> Runs:
    """Partial blocks as runs of one."""
    return lists.offsets, lists.indices, torch.ones_like(lists.indices)


def _work(runs: Runs, grid: Grid) -> _Work:
    """Without an entry of its own for each listed block: of a million tokens there may be tens of millions."""
    offsets, starts, lengths = runs
    counts, ends = offsets_of(lengths)[offsets].diff(), starts.long() + lengths
    # only the last row is lower, only the last column narrower, and a list that has it ends with it
    height = torch.full_like(counts, grid.q_block).reshape(-1, max(grid.rows, 1))
    missing = grid.rows * grid.q_block - grid.q_len
    height[:, -1:] -= missing
    height = height.reshape(-1)
    last = ends[(offsets[1:] - 1).clamp(min=0)] == grid.columns if len(ends) else counts > 0
    width = counts * grid.kv_block - ((counts > 0) & last) * (grid.columns * grid.kv_block - grid.kv_len)
    by_column = [torch.zeros(0, dtype=torch.int64, device=offsets.device)]
    for plane in range(grid.B * grid.H if grid.rows else 0):
        first, end, stop = (int(offsets[plane * grid.rows + row]) for row in (0, grid.rows - 1, grid.rows))
        change = torch.zeros(grid.columns + 1, dtype=torch.int64, device=offsets.device)
        for part, by in ((slice(first, stop), grid.q_block), (slice(end, stop), -missing)):
            step = torch.full_like(ends[part], by)
            change.index_add_(0, starts[part].long(), step).index_add_(0, ends[part], -step)
        listed = change.cumsum(0)[:-1]
        listed[-1:] *= grid.kv_len - (grid.columns - 1) * grid.kv_block
        listed[:-1] *= grid.kv_block
        by_column.append(listed)
    return _Work(height * width, torch.cat(by_column), int((height * counts).sum()), int(width.sum()))


def _bytes(E: int, Ev: int, dtype: torch.dtype, queries: int, keys: int, heights: int, widths: int) -> tuple[int, int]:
    """Forward and backward; queries and keys of all batches and heads, heights and widths of all listed blocks."""
    size, acc = dtype.itemsize, max(4, dtype.itemsize)
    forward = queries * ((E + Ev) * size + acc) + widths * (E + Ev) * size
    backward = keys * 2 * (E + Ev) * size + queries * (2 * Ev * size + acc + E * (acc + size))
    return forward, backward + heights * ((E + Ev) * size + 2 * acc + 2 * E * acc)


def _allowed(mask: BlockState) -> int:
    lists = separated(mask)
    in_full = int(_work(lists.full, mask.grid).by_row.sum())
    return in_full + int(allowed_in(mask, block_numbers(*lists[:2], mask.grid)).sum())


def _imbalance(work: Tensor) -> float:
    total = int(work.sum()) if len(work) else 0
    return int(work.max()) * len(work) / total if total else 1.0


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole if whole else 0:.2f} %"


def _scaled(number: int, unit: str) -> str:
    """With three digits and a prefix for a power of 1000."""
    value, prefixes = float(number), iter(("", "k", "M", "G", "T", "P", "E"))
    prefix = next(prefixes)
    while value >= 999.5 and prefix != "E":
        value, prefix = value / 1000, next(prefixes)
    return f"{value:.3g} {prefix}{unit}"
