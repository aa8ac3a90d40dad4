"""What a BlockMask holds and nobody can change: grid, lists and mask_mod; and how it is copied, pickled and flattened.

Engines read memory where the lists say, so the lists that they read (`Walk`) are handed out to nobody: what a user can lay
hands on, such as runs, csr or kv_indices, is a copy, and lists from outside are copied first and checked then.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from flexref.blocks.inputs import check_list, check_mask_mod, checked_block_size, checked_sizes
from flexref.blocks.lists import Blocks, Grid, Lists, one_by_one
from flexref.blocks.sound import check_fits, first_problem
from flexref.blocks.walk import Walk
from flexref.program.mod_objects import moved, name_of, same_mod

_LISTS = "BlockMask.from_kv_blocks(...) makes one of other lists"
_GRID = "create_block_mask(mask_mod, B, H, Q_LEN, KV_LEN, device, BLOCK_SIZE) makes another"
INSTEAD = {
    "seq_lengths": "mask.resize(q_len, kv_len) is the mask for other lengths, mask.rows(start, stop) for some of its queries, "
    "as in a step of decoding",
    "mask_mod": "create_block_mask(mask_mod, ...) lists what another mask_mod allows; BlockMask.from_kv_blocks(..., "
    "mask_mod=...) keeps the lists that it is given",
    "device": "mask.to(device) is the mask on another device",
    **dict.fromkeys(("B", "H"), f"{_GRID}; B or H of 1 serves any batch or head"),
    **dict.fromkeys(("BLOCK_SIZE", "grid", "shape"), _GRID),
}
# what a group of copies is made of, for the message that says which was written
_NAMES = {
    "runs": tuple(f"runs.{name}" for name in Lists._fields),
    "csr": tuple(f"csr.{name}" for name in Blocks._fields),
    "csc": tuple(f"csc.{name}" for name in Blocks._fields),
    "by_row": ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"),
    "by_column": ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"),
}


class BlockState:
    """The third of BlockMask that holds, and lets nothing be changed."""

    _grid: Grid
    _walk: Walk | None
    _leaves: tuple | None
    _mask_mod: Callable
    _separate: bool
    _agrees: bool
    _in_mod: Any
    _copies: dict[str, tuple[tuple, list]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        pytree.register_pytree_node(cls, _flatten, _unflatten, flatten_with_keys_fn=_flatten_with_keys)

    @classmethod
    def _make(cls, grid: Grid, lists: Lists, mask_mod: Callable, separate: bool, agrees: bool) -> Self:
        """From lists that were just made here, which are sound and nobody else's."""
        mask = cls.__new__(cls)
        mask._set(grid, Walk(grid, lists), None, mask_mod, separate, agrees)
        return mask

    def _set(self, grid: Grid, walk: Walk | None, leaves: tuple | None, mask_mod, separate: bool, agrees: bool) -> None:
        # _agrees: whether the lists are known to allow exactly what mask_mod does
        vars(self).update(_grid=grid, _walk=walk, _leaves=leaves, _mask_mod=mask_mod, _separate=separate, _agrees=agrees)
        # _in_mod: the same mask with its lists in its mask_mod, where these say other things
        vars(self).update(_copies={}, _in_mod=None)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        instead = INSTEAD.get(name, _LISTS if hasattr(type(self), name) else "keep what belongs to it beside it")
        raise AttributeError(f"cannot set {name!r} of a BlockMask, which is immutable; {instead}.", name=name, obj=self)

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"cannot delete {name!r} of a BlockMask, which is immutable.", name=name, obj=self)

    @property
    def grid(self) -> Grid:
        """How positions fall into blocks."""
        return self._grid

    @property
    def mask_mod(self) -> Callable:
        """mask_mod(b, h, q_idx, kv_idx) -> bool."""
        return self._mask_mod

    @property
    def separate_full_blocks(self) -> bool:
        """Whether full blocks are listed apart."""
        return self._separate

    @property
    def B(self) -> int:
        """1, or query's batch."""
        return self._grid.B

    @property
    def H(self) -> int:
        """1, or query's heads."""
        return self._grid.H

    @property
    def seq_lengths(self) -> tuple[int, int]:
        """(q_len, kv_len)."""
        return self._grid[2:4]

    @property
    def BLOCK_SIZE(self) -> tuple[int, int]:
        """(q_block, kv_block)."""
        return self._grid[4:6]

    @property
    def device(self) -> torch.device:
        """Where the lists are."""
        return self.walk.runs.offsets.device

    @property
    def walk(self) -> Walk:
        """What engines read; must not be written. Raises TypeError or ValueError for leaves that are no lists of this mask."""
        walk = self._walk
        if walk is None:
            walk = Walk(self._grid, _adopted(self._leaves, self._grid))
            vars(self).update(_walk=walk, _leaves=None)
        return walk

    @property
    def _lists(self) -> Lists:
        return self.walk.lists

    @property
    def runs(self) -> Lists:
        """A copy of the lists by row as they are held: full blocks as runs. Engines read `walk`."""
        return Lists(*self._copied("runs", lambda: [x.clone() for x in self._lists]))

    @property
    def csr(self) -> Blocks:
        """A copy of the lists by row of query blocks, each block by itself."""
        return Blocks(*self._copied("csr", lambda: _copy_of_each(self._lists)))

    @property
    def csc(self) -> Blocks:
        """A copy of the lists by column, each block by itself."""
        return Blocks(*self._copied("csc", lambda: _copy_of_each(self.walk.column_runs)))

    def _copied(self, group: str, make: Callable[[], Iterable]) -> tuple:
        if group not in self._copies:
            tensors = tuple(make())
            self._copies[group] = tensors, _versions(tensors)
        return self._copies[group][0]

    def check_lists(self) -> None:
        """Raise ValueError if lists from outside are not sound, or if a copy was written in the belief that it counts."""
        _ = self.walk
        for group, (tensors, versions) in self._copies.items():
            now = _versions(tensors)
            if now != versions:
                which = next(i for i, version in enumerate(versions) if version != now[i])
                raise ValueError(
                    f"BlockMask.{_NAMES[group][which]} was written in place, but it is a copy, and a BlockMask is immutable; "
                    f"{_LISTS}."
                )

    def __reduce__(self):
        lists = tuple(x.clone() for x in self._lists)
        return loaded, (type(self), tuple(self._grid), lists, self._mask_mod, self._separate, self._agrees)


def loaded(kind: type[BlockState], grid: tuple, lists: tuple, mask_mod: Callable, separate: bool, agrees: bool) -> BlockState:
    """A pickled BlockMask again. Raises TypeError or ValueError if it was damaged."""
    if not (isinstance(kind, type) and issubclass(kind, BlockState)) or len(grid) != len(Grid._fields):
        raise TypeError(f"this is no pickled BlockMask: {kind} of {grid}")
    check_mask_mod(mask_mod)
    sizes = Grid(*checked_sizes(*grid[:4]), *checked_block_size(grid[4:]))
    check_fits(sizes)
    mask = kind.__new__(kind)
    mask._set(sizes, Walk(sizes, _adopted(lists, sizes)), None, mask_mod, bool(separate), bool(agrees))
    return mask


def _adopted(leaves: tuple | None, grid: Grid) -> Lists:
    """Lists from outside as our own: first copied, so that nobody can write them after they were checked."""
    if leaves is None or len(leaves) != len(Lists._fields):
        raise ValueError(f"a BlockMask has the leaves {Lists._fields}, got {0 if leaves is None else len(leaves)}")
    for name, x in zip(Lists._fields, leaves, strict=True):
        check_list(name, x)
    devices = {x.device for x in leaves}
    if len(devices) > 1:
        raise ValueError(f"the lists of a BlockMask are on {', '.join(sorted(map(str, devices)))}; move them together")
    with torch.no_grad():
        lists = Lists(*(x.detach().clone(memory_format=torch.contiguous_format) for x in leaves))
        found = None if lists.offsets.is_meta else first_problem(lists, grid)
    if found:
        raise ValueError(f"BlockMask of shape {grid[:4]}: {found}")
    return lists


def _copy_of_each(lists: Lists) -> Iterable[Tensor]:
    # only what is written out is new already
    offsets, indices, *full = one_by_one(lists)
    return [offsets.clone(), indices.clone(), *full]


def _versions(tensors: Iterable) -> list:
    return [None if x is None or x.is_inference() else x._version for x in tensors]


class _Context:
    """What of a BlockMask is not in its leaves; compared by value, as pytrees compare their contexts."""

    def __init__(self, mask: BlockState):
        self.mask = mask

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Context):
            return NotImplemented
        a, b = self.mask, other.mask
        return (a.grid, a.separate_full_blocks) == (b.grid, b.separate_full_blocks) and same_mod(a.mask_mod, b.mask_mod)

    def __hash__(self) -> int:
        return hash(self.mask.grid)

    def __repr__(self) -> str:
        return f"{tuple(self.mask.grid)}, {name_of(self.mask.mask_mod)}"


def _flatten(mask: BlockState) -> tuple[list, _Context]:
    if mask._leaves is None:
        mask.check_lists()
    return list(mask.runs if mask._leaves is None else mask._leaves), _Context(mask)


def _flatten_with_keys(mask: BlockState) -> tuple[list, _Context]:
    leaves, context = _flatten(mask)
    return [(pytree.GetAttrKey(name), x) for name, x in zip(Lists._fields, leaves, strict=True)], context


def _unflatten(leaves: Iterable, context: _Context) -> BlockState:
    """Any leaves are taken, as PyTorch puts None and other objects into trees; they are looked at when the mask is used."""
    mask, given = context.mask, tuple(leaves)
    before = _flatten(mask)[0]
    if len(given) == len(before) and all(x is y for x, y in zip(given, before, strict=True)):
        return mask
    mod, place = mask.mask_mod, {x.device for x in given if isinstance(x, Tensor)}
    if len(place) == 1 and place != {x.device for x in before if isinstance(x, Tensor)}:
        # as .to() does
        mod = moved(mod, place.pop())
    new = type(mask).__new__(type(mask))
    new._set(mask.grid, None, given, mod, mask.separate_full_blocks, mask._agrees)
    return new
