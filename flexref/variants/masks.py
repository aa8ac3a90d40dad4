"""Masks to import instead of writing: each is a mask_mod(b, h, q_idx, kv_idx), or makes one.

They are objects or module-level functions, so that they print, compare and pickle; `&`, `|` and `~` combine them. They
also work as mask_mod of torch.nn.attention.flex_attention.
"""
from __future__ import annotations

import torch
from torch import Tensor

from flexref.blocks.mask_mods import MaskMod, and_masks, noop_mask, not_mask, or_masks, shift_mask, xor_masks

__all__ = [
    "and_masks", "causal", "chunked", "dilated_window", "document", "document_ids", "from_table", "global_tokens",
    "neighborhood", "noop_mask", "not_mask", "or_masks", "padded", "prefix_lm", "shift_mask", "sliding_window", "tree",
    "window", "xor_masks",
]  # fmt: skip


def causal(b, h, q_idx, kv_idx):
    """No query sees a key after it."""
    return q_idx >= kv_idx


class window(MaskMod):
    """Keys at most `before` positions before the query and at most `after` behind it."""

    def __init__(self, before: int, after: int):
        self.before, self.after = _count("before", before), _count("after", after)

    def __call__(self, b, h, q_idx, kv_idx):
        return (kv_idx >= q_idx - self.before) & (kv_idx <= q_idx + self.after)


class sliding_window(MaskMod):
    """Causal, and only the last `size` keys: the query's own and the size - 1 before it."""

    def __init__(self, size: int):
        self.size = _count("size", size, 1)

    def __call__(self, b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (q_idx - kv_idx < self.size)


class dilated_window(MaskMod):
    """Causal, and `size` keys that lie `dilation` apart, the query's own the last."""

    def __init__(self, size: int, dilation: int):
        self.size, self.dilation = _count("size", size, 1), _count("dilation", dilation, 1)

    def __call__(self, b, h, q_idx, kv_idx):
        distance = q_idx - kv_idx
        return (distance >= 0) & (distance < self.size * self.dilation) & (distance % self.dilation == 0)


class global_tokens(MaskMod):
    """The first `count` positions see, and are seen by, all; `or` it with a window."""

    def __init__(self, count: int):
        self.count = _count("count", count)

    def __call__(self, b, h, q_idx, kv_idx):
        return (q_idx < self.count) | (kv_idx < self.count)


class chunked(MaskMod):
    """Only keys in the query's own chunk of `size` positions."""

    def __init__(self, size: int):
        self.size = _count("size", size, 1)

    def __call__(self, b, h, q_idx, kv_idx):
        return q_idx // self.size == kv_idx // self.size


class prefix_lm(MaskMod):
    """Causal, but the first `length` keys are seen by all; an int, or an integer tensor (B,) with one for each batch."""

    def __init__(self, length: int | Tensor):
        self.length = _integers("length", length, (1,)) if isinstance(length, Tensor) else _count("length", length)

    def __call__(self, b, h, q_idx, kv_idx):
        length = self.length[b] if isinstance(self.length, Tensor) else self.length
        return (kv_idx < length) | (q_idx >= kv_idx)


class document(MaskMod):
    """Query and key of one document; `ids` is an integer tensor (L,), or (B, L) with other documents in each batch."""

    def __init__(self, ids: Tensor):
        self.ids = _integers("ids", ids, (1, 2))

    def __call__(self, b, h, q_idx, kv_idx):
        if self.ids.dim() == 2:
            return self.ids[b, q_idx] == self.ids[b, kv_idx]
        return self.ids[q_idx] == self.ids[kv_idx]


class padded(MaskMod):
    """A ragged batch, padded at the end: batch b has q_lengths[b] queries and kv_lengths[b] keys, integer tensors (B,)."""

    def __init__(self, q_lengths: Tensor, kv_lengths: Tensor | None = None):
        self.q_lengths = _integers("q_lengths", q_lengths, (1,))
        self.kv_lengths = self.q_lengths if kv_lengths is None else _integers("kv_lengths", kv_lengths, (1,))

    def __call__(self, b, h, q_idx, kv_idx):
        return (q_idx < self.q_lengths[b]) & (kv_idx < self.kv_lengths[b])


class neighborhood(MaskMod):
    """Pixels of an image of rows of `width`, flattened: those at most `reach` rows and columns away."""

    def __init__(self, width: int, reach: int):
        self.width, self.reach = _count("width", width, 1), _count("reach", reach)

    def __call__(self, b, h, q_idx, kv_idx):
        down = abs(q_idx // self.width - kv_idx // self.width)
        across = abs(q_idx % self.width - kv_idx % self.width)
        return (down <= self.reach) & (across <= self.reach)


class from_table(MaskMod):
    """A bool tensor (L, S), (H, L, S) or (B, H, L, S) read as it is."""

    def __init__(self, table: Tensor):
        if not isinstance(table, Tensor) or table.dtype != torch.bool or not 2 <= table.dim() <= 4:
            got = f"{table.dtype} of shape {tuple(table.shape)}" if isinstance(table, Tensor) else type(table).__name__
            raise TypeError(f"table must be a bool tensor (L, S), (H, L, S) or (B, H, L, S), got {got}")
        self.table = table

    def __call__(self, b, h, q_idx, kv_idx):
        if self.table.dim() == 2:
            return self.table[q_idx, kv_idx]
        return self.table[h, q_idx, kv_idx] if self.table.dim() == 3 else self.table[b, h, q_idx, kv_idx]


def tree(parents: list[int]) -> from_table:
    """Each node of a tree sees itself and its ancestors; parents[i] < i, or -1 for a root. As in speculative decoding."""
    table = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if not -1 <= parent < node:
            raise ValueError(f"parents[{node}] is {parent}; a parent comes before its node, and -1 marks a root")
        if parent >= 0:
            table[node] |= table[parent]
    return from_table(table)


def document_ids(lengths: list[int] | Tensor) -> Tensor:
    """Documents of these lengths packed one behind the other, as `document` takes them: int64 (sum of lengths,)."""
    counts = torch.as_tensor(lengths, dtype=torch.int64)
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


def _count(name: str, n: int, least: int = 0) -> int:
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"{name} must be an int, got {type(n).__name__}")
    if n < least:
        raise ValueError(f"{name} must be at least {least}, got {n}")
    return n


def _integers(name: str, x: Tensor, dims: tuple[int, ...]) -> Tensor:
    integers = isinstance(x, Tensor) and x.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    if not integers or x.dim() not in dims:
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        wanted = " or ".join(map(str, dims))
        raise TypeError(f"{name} must be an integer tensor of {wanted} dimensions, got {got}")
    return x

# as its objects are, torch.load(weights_only=True) may refer to its functions
torch.serialization.add_safe_globals([causal])
