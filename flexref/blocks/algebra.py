"""What can be done with whole block lists: combine, invert, crop, slice, compare with a mask_mod.

The mask_mod is asked only where the kinds of the blocks leave the answer open.
"""
from __future__ import annotations

import operator
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from flexref.blocks.build import Decider, build
from flexref.blocks.inputs import unserved
from flexref.blocks.lists import (
    FULL,
    PARTIAL,
    Grid,
    Lists,
    broadcast,
    expand,
    of_stretches,
    stretches,
    take_columns,
    take_rows,
)
from flexref.blocks.mask_mods import Constant, Listed, Offset, Table
from flexref.errors import TraceError
from flexref.program.mod_objects import CallableMod, name_of


def common_grid(a: Grid, b: Grid) -> Grid:
    """The grid of two masks together: alike, but B and H may be 1 in one of them. Raises ValueError."""
    for name in a._fields:
        x, y = getattr(a, name), getattr(b, name)
        either = name in ("B", "H")
        if x != y and not (either and 1 in (x, y)):
            rule = "equal, or 1 in one of them" if either else "equal"
            raise ValueError(f"cannot combine BlockMasks whose {name} is {x} and {y}: it must be {rule}")
    return a._replace(B=b.B if a.B == 1 else a.B, H=b.H if a.H == 1 else a.H)


def check_serves(mod: Callable, grid: Grid, wanted: Grid) -> None:
    """Raise ValueError where a mask for one batch or head, which mask_mod asks about, is to serve several."""
    wrong = unserved(lambda index: _reads(mod, index), grid, wanted)
    if wrong is not None:
        name, index, want = wrong
        raise ValueError(
            f"the BlockMask was made with {name}=1, but its mask_mod {name_of(mod)} reads {index} and would say something "
            f"else for {name}={want}: make it with {name}={want}"
        )


def _reads(mod: Callable, index: str) -> bool:
    """Whether a mask_mod looks at an index, as far as its program is known."""
    from flexref.program.mods import traced_mod

    try:
        return traced_mod(mod, "mask", torch.float32).graph.uses(index)
    except TraceError:
        return False


def combine(op: str, masks: Iterable[tuple[Lists, Grid]], mod: Callable, grid: Grid, device: torch.device) -> Lists:
    """The lists of `mod`, which is the "and", "or" or "xor" of two masks, on their common grid."""
    a, b = (broadcast(lists, own, grid) for lists, own in masks)
    kind_of = {"and": torch.minimum, "or": torch.maximum, "xor": lambda x, y: (x - y).abs()}[op]
    first, count, (ka, kb) = stretches((a, b), grid)
    kind = kind_of(ka, kb)
    # blocks to be asked are listed one by one, so a stretch of two of them is a block
    asked = ((ka == PARTIAL) & (kb == PARTIAL)).nonzero()[:, 0]
    if len(asked):
        with torch.no_grad():
            kind[asked] = Decider(mod, grid, device).decide(first[asked])
    return of_stretches(first, count, kind, grid)


def invert(lists: Lists, grid: Grid) -> Lists:
    """Empty becomes full, full becomes empty, partial stays."""
    first, count, (kind,) = stretches((lists,), grid)
    return of_stretches(first, count, FULL - kind, grid)


def unseparated(lists: Lists, grid: Grid) -> Lists:
    """Full blocks listed as partial ones, which changes no meaning."""
    first, count, (kind,) = stretches((lists,), grid)
    return of_stretches(first, count, kind.clamp(max=PARTIAL), grid)


def crop(lists: Lists, old: Grid, new: Grid) -> Lists:
    """The upper left part; a block that was listed stays listed."""
    rows = torch.arange(old.flat_rows, device=lists.offsets.device).reshape(old.B * old.H, old.rows)[:, : new.rows]
    return take_columns(take_rows(lists, rows.reshape(-1)), new.columns)


def disagreement(lists: Lists, mod: Callable, grid: Grid, device: torch.device) -> str | None:
    """Where the lists allow something else than `mod` does, in words; None if nowhere. A partial block may be anything."""
    first, _, (said, true) = stretches((lists, build(mod, grid, device)), grid)
    wrong = ((said != PARTIAL) & (said != true)).nonzero()[:, 0]
    if not len(wrong):
        return None
    row, column = divmod(int(first[wrong[0]]), grid.columns)
    bh, row = divmod(row, grid.rows)
    says, does = ("is listed full", "masks") if int(said[wrong[0]]) == FULL else ("is not listed", "allows")
    return (
        f"block (b={bh // grid.H}, h={bh % grid.H}) row {row}, column {column} {says}, "
        f"but mask_mod {name_of(mod)} {does} positions in it"
    )


def listed_mod(lists: Lists, mod: Callable, grid: Grid) -> Listed:
    """The lists and `mod` as one mask_mod."""
    kinds = expand(lists, 0, grid.flat_rows, grid.columns).reshape(grid.B, grid.H, grid.rows, grid.columns)
    return Listed(kinds, grid.q_block, grid.kv_block, mod)


def picked(index: object, size: int, name: str) -> list[int]:
    """What an index selects along a dimension: an int, a slice, or a sequence or 1-D tensor of ints.

    Raises TypeError for another index, IndexError for one out of range.
    """
    if isinstance(index, slice):
        return list(range(*index.indices(size)))
    if isinstance(index, Tensor):
        if index.dtype == torch.bool or index.is_floating_point() or index.is_complex() or index.dim() > 1:
            got = f"{index.dtype} of shape {tuple(index.shape)}"
            raise TypeError(f"the index of {name} must be an int, a slice or a 1-D tensor of ints, got {got}")
        index = index.tolist()
    found = []
    for i in index if isinstance(index, Iterable) else [index]:
        if isinstance(i, bool) or not hasattr(i, "__index__"):
            raise TypeError(f"the index of {name} must be an int, a slice or ints, got {type(i).__name__}")
        at = operator.index(i)  # type: ignore[arg-type]
        if not -size <= at < size:
            raise IndexError(f"index {at} of {name} is out of range: there are {size}")
        found.append(at % size)
    return found


def selection(chosen: list[int], size: int, device: torch.device) -> CallableMod | None:
    """Which batch, or head, each of a slice stands for; None for all as they are."""
    if not chosen or chosen == list(range(size)):
        return None
    if len(chosen) == 1:
        # a mask of one batch serves all batches of a query, so the index is fixed rather than shifted
        return Constant(chosen[0])
    if chosen == list(range(chosen[0], chosen[0] + len(chosen))):
        return Offset(chosen[0])
    return Table(torch.tensor(chosen, device=device))


def row_selection(chosen: list[int], grid: Grid, device: torch.device) -> tuple[CallableMod | None, int]:
    """Which query each of a slice's stands for, and how many queries the slice has."""
    short = grid.rows * grid.q_block - grid.q_len
    if short and grid.rows - 1 in chosen[:-1]:
        raise ValueError(
            f"row {grid.rows - 1} has {grid.q_block - short} queries instead of {grid.q_block}, so it can only be the "
            "last row of a slice; put it last"
        )
    q_len = len(chosen) * grid.q_block - (short if chosen and chosen[-1] == grid.rows - 1 else 0)
    if not chosen or chosen == list(range(len(chosen))):
        return None, q_len
    if chosen == list(range(chosen[0], chosen[0] + len(chosen))):
        return Offset(chosen[0] * grid.q_block), q_len
    return Table(torch.tensor(chosen, device=device), grid.q_block), q_len
