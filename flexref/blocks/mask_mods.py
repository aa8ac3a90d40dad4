"""Mask mods made of mask mods: and, or, xor, not, and views at other indices.

A mask_mod is called as mask_mod(b, h, q_idx, kv_idx) with integers, or integer tensors of one element each, and answers
with a bool or a bool tensor. What combines mods therefore uses `&`, `|` and `^`, which know both.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from flexref.program.mod_objects import CallableMod, name_of


class MaskMod(CallableMod):
    """A mask_mod that is an object; `&`, `|`, `^` with any other mask_mod, and `~`, make new ones."""

    def __call__(self, b, h, q_idx, kv_idx):
        raise NotImplementedError(f"{type(self).__name__} has no __call__(b, h, q_idx, kv_idx)")

    def __and__(self, other: Callable) -> Callable:
        return and_masks(self, other) if callable(other) else NotImplemented

    def __rand__(self, other: Callable) -> Callable:
        return and_masks(other, self) if callable(other) else NotImplemented

    def __or__(self, other: Callable) -> Callable:
        return or_masks(self, other) if callable(other) else NotImplemented

    def __ror__(self, other: Callable) -> Callable:
        return or_masks(other, self) if callable(other) else NotImplemented

    def __xor__(self, other: Callable) -> Callable:
        return xor_masks(self, other) if callable(other) else NotImplemented

    def __rxor__(self, other: Callable) -> Callable:
        return xor_masks(other, self) if callable(other) else NotImplemented

    def __invert__(self) -> Callable:
        return not_mask(self)


class _Combined(MaskMod):
    made_by = ""

    def __init__(self, mods: tuple[Callable, ...]):
        self.mods = mods

    def _text(self) -> str:
        return f"{self.made_by}({', '.join(map(name_of, self.mods))})"


class AndMasks(_Combined):
    """True where every one of `mods` is."""

    made_by = "and_masks"

    def __call__(self, b, h, q_idx, kv_idx):
        result = True
        for i, mod in enumerate(self.mods):
            answer = mod(b, h, q_idx, kv_idx)
            result = result & answer if i else answer
        return result


class OrMasks(_Combined):
    """True where one of `mods` is."""

    made_by = "or_masks"

    def __call__(self, b, h, q_idx, kv_idx):
        result = False
        for i, mod in enumerate(self.mods):
            answer = mod(b, h, q_idx, kv_idx)
            result = result | answer if i else answer
        return result


class XorMasks(_Combined):
    """True where an odd number of `mods` is."""

    made_by = "xor_masks"

    def __call__(self, b, h, q_idx, kv_idx):
        result = False
        for i, mod in enumerate(self.mods):
            answer = mod(b, h, q_idx, kv_idx)
            result = result ^ answer if i else answer
        return result


class NotMask(_Combined):
    """True where its one mod is not."""

    made_by = "not_mask"

    def __call__(self, b, h, q_idx, kv_idx):
        answer = self.mods[0](b, h, q_idx, kv_idx)
        if isinstance(answer, Tensor):
            return ~answer
        # ~True is -2; an answer that is no bool at all stays what it is, for whoever checks it
        return not answer if isinstance(answer, bool) else answer


class Offset(CallableMod):
    """index + value."""

    def __init__(self, value: int | Tensor):
        self.value = value

    def __call__(self, index):
        return index + self.value


class Constant(CallableMod):
    """The same index wherever it is asked: a slice of one batch or head serves them all."""

    def __init__(self, value: int):
        self.value = value

    def __call__(self, index):
        return index * 0 + self.value


class Table(CallableMod):
    """table[index], or the same for whole blocks of `size` indices."""

    def __init__(self, table: Tensor, size: int = 1):
        self.table, self.size = table, size

    def __call__(self, index):
        if self.size == 1:
            return self.table[index]
        return self.table[index // self.size] * self.size + index % self.size

    def within(self, index) -> tuple:
        """Whether there is such an index, and one that there is."""
        last = len(self.table) * self.size - 1
        return (index >= 0) & (index <= last), _clamped(index, last)


class View(MaskMod):
    """`mod` asked at other indices: each of b, h, q_idx, kv_idx is None (as it is) or says which original is meant.

    Where a Table of queries has no such index, as beside a mask that is shifted, nothing is allowed.
    """

    def __init__(self, mod: Callable, b=None, h=None, q_idx=None, kv_idx=None):
        self.mod, self.b, self.h, self.q_idx, self.kv_idx = mod, b, h, q_idx, kv_idx

    def __call__(self, b, h, q_idx, kv_idx):
        b = b if self.b is None else self.b(b)
        h = h if self.h is None else self.h(h)
        kv_idx = kv_idx if self.kv_idx is None else self.kv_idx(kv_idx)
        if isinstance(self.q_idx, Table):
            there, q_idx = self.q_idx.within(q_idx)
            return there & self.mod(b, h, self.q_idx(q_idx), kv_idx)
        return self.mod(b, h, q_idx if self.q_idx is None else self.q_idx(q_idx), kv_idx)


class Transposed(MaskMod):
    """`mod` with queries and keys in each other's place."""

    def __init__(self, mod: Callable):
        self.mod = mod

    def __call__(self, b, h, q_idx, kv_idx):
        return self.mod(b, h, kv_idx, q_idx)


class Concatenated(_Combined):
    """Mods one behind another along one of b, h, q_idx, kv_idx (0 to 3), each for as many indices as `sizes` says."""

    made_by = "concat_masks"

    def __init__(self, mods: Sequence[Callable], sizes: Sequence[int], dim: int):
        super().__init__(tuple(mods))
        self.sizes, self.dim = tuple(sizes), dim

    def __call__(self, b, h, q_idx, kv_idx):
        at = [b, h, q_idx, kv_idx]
        index, start, result = at[self.dim], 0, q_idx < 0
        for mod, size in zip(self.mods, self.sizes, strict=True):
            if size:
                # a mod is asked at none but its own indices, also where the answer does not count
                local = index - start
                at[self.dim] = _clamped(local, size - 1)
                result = result | ((index >= start) & (index < start + size) & mod(*at))
            start += size
        return result


class Listed(MaskMod):
    """Block lists read as a mask_mod: `kinds` (B, H, rows, columns) is 0 empty, 1 ask `mod`, 2 full; beside them is nothing."""

    def __init__(self, kinds: Tensor, q_block: int, kv_block: int, mod: Callable):
        self.kinds, self.q_block, self.kv_block, self.mod = kinds, q_block, kv_block, mod
        self.b, self.h = (Constant(0) if n == 1 else Offset(0) for n in kinds.shape[:2])

    def __call__(self, b, h, q_idx, kv_idx):
        rows, columns = self.kinds.shape[2:]
        row, column = q_idx // self.q_block, kv_idx // self.kv_block
        there = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        kind = self.kinds[self.b(b), self.h(h), _clamped(row, rows - 1), _clamped(column, columns - 1)]
        return there & ((kind == 2) | ((kind == 1) & self.mod(b, h, q_idx, kv_idx)))


def _clamped(index, last: int):
    return index.clamp(0, max(last, 0)) if isinstance(index, Tensor) else min(max(index, 0), max(last, 0))


def noop_mask(b, h, q_idx, kv_idx):
    """Every position is allowed."""
    return q_idx >= 0


def and_masks(*mask_mods: Callable) -> Callable:
    """The mask_mod that is true where all of `mask_mods` are; of none it is true everywhere."""
    return _combined(AndMasks, mask_mods)


def or_masks(*mask_mods: Callable) -> Callable:
    """The mask_mod that is true where at least one of `mask_mods` is; of none it is false everywhere."""
    return _combined(OrMasks, mask_mods)


def xor_masks(*mask_mods: Callable) -> Callable:
    """The mask_mod that is true where an odd number of `mask_mods` is."""
    return _combined(XorMasks, mask_mods)


def not_mask(mask_mod: Callable) -> Callable:
    """The mask_mod that is true where `mask_mod` is false."""
    return mask_mod.mods[0] if isinstance(mask_mod, NotMask) else _combined(NotMask, (mask_mod,))


def shift_mask(mask_mod: Callable, q_offset: int | Tensor = 0, kv_offset: int | Tensor = 0) -> Callable:
    """The mask_mod that asks `mask_mod` at (q_idx + q_offset, kv_idx + kv_offset), as a step of decoding does."""
    return View(mask_mod, q_idx=Offset(q_offset), kv_idx=Offset(kv_offset))


def _combined(kind: type[_Combined], mods: tuple[Callable, ...]) -> Callable:
    for i, mod in enumerate(mods):
        if not callable(mod):
            got = type(mod).__name__
            raise TypeError(f"{kind.made_by}: argument {i} must be a mask_mod(b, h, q_idx, kv_idx), got {got}")
    return mods[0] if len(mods) == 1 and kind is not NotMask else kind(mods)
