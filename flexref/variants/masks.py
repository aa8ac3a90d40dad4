"""Masks to import instead of writing: each is a mask_mod(b, h, q_idx, kv_idx), or makes one.

They are objects or module-level functions, so that they print, compare and pickle; `&`, `|` and `~` combine them. They
also work as mask_mod of torch.nn.attention.flex_attention.
"""
from __future__ import annotations

import torch
from torch import Tensor

from flexref.blocks.mask_mods import MaskMod, and_masks, noop_mask, not_mask, or_masks, shift_mask, xor_masks
from flexref.variants.checks import LAST, count, integers
from flexref.variants.documents import (
    after_prefix,
    block_diffusion,
    document,
    document_ids,
    document_offsets,
    per_chunk,
    per_document,
    shared_prefix,
    tree,
    vision_cross,
)
from flexref.variants.neighborhoods import (
    morton_order,
    natten,
    raster_order,
    sliding_tile,
    spatial_head,
    temporal_head,
    tile_order,
)
from flexref.variants.patterns import (
    bigbird,
    dilated,
    global_tokens,
    longformer,
    per_head,
    per_layer,
    selected_tiles,
    tiles_of_indices,
    top_tiles,
)

__all__ = [
    "after_prefix", "and_masks", "bigbird", "block_diffusion", "causal", "chunked", "dilated", "dilated_window", "document",
    "document_ids", "document_offsets", "from_table", "global_tokens", "longformer", "morton_order", "natten", "neighborhood",
    "noop_mask", "not_mask", "or_masks", "padded", "per_chunk", "per_document", "per_head", "per_layer", "prefix_lm",
    "raster_order", "selected_tiles", "shared_prefix", "shift_mask", "sliding_tile", "sliding_window", "spatial_head",
    "temporal_head", "tile_order", "tiles_of_indices", "top_tiles", "tree", "vision_cross", "window", "xor_masks",
]  # fmt: skip


def causal(b, h, q_idx, kv_idx):
    """No query sees a key after it."""
    return q_idx >= kv_idx


class window(MaskMod):
    """Keys at most `before` positions before the query and at most `after` behind it."""

    def __init__(self, before: int, after: int):
        self.before, self.after = count("before", before), count("after", after)

    def __call__(self, b, h, q_idx, kv_idx):
        return (q_idx - kv_idx <= self.before) & (kv_idx - q_idx <= self.after)


class sliding_window(MaskMod):
    """Causal, and only the last `size` keys: the query's own and the size - 1 before it."""

    def __init__(self, size: int):
        self.size = count("size", size, 1)

    def __call__(self, b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (q_idx - kv_idx < self.size)


class dilated_window(MaskMod):
    """Causal, and `size` keys that lie `dilation` apart, the query's own the last."""

    def __init__(self, size: int, dilation: int):
        self.size, self.dilation = count("size", size, 1), count("dilation", dilation, 1)

    def __call__(self, b, h, q_idx, kv_idx):
        distance = q_idx - kv_idx
        # no index is farther than LAST, and no constant may be more
        last = min((self.size - 1) * self.dilation, LAST)
        return (distance >= 0) & (distance <= last) & (distance % self.dilation == 0)


class chunked(MaskMod):
    """Only keys in the query's own chunk of `size` positions."""

    def __init__(self, size: int):
        self.size = count("size", size, 1)

    def __call__(self, b, h, q_idx, kv_idx):
        return q_idx // self.size == kv_idx // self.size


class prefix_lm(MaskMod):
    """Causal, but the first `length` keys are seen by all; an int, or an integer tensor (B,) with one for each batch."""

    def __init__(self, length: int | Tensor):
        self.length = integers("length", length, (1,)) if isinstance(length, Tensor) else count("length", length)

    def __call__(self, b, h, q_idx, kv_idx):
        length = self.length[b] if isinstance(self.length, Tensor) else self.length
        return (kv_idx < length) | (q_idx >= kv_idx)


class padded(MaskMod):
    """A ragged batch, padded at the end: batch b has q_lengths[b] queries and kv_lengths[b] keys, integer tensors (B,)."""

    def __init__(self, q_lengths: Tensor, kv_lengths: Tensor | None = None):
        self.q_lengths = integers("q_lengths", q_lengths, (1,))
        self.kv_lengths = self.q_lengths if kv_lengths is None else integers("kv_lengths", kv_lengths, (1,))

    def __call__(self, b, h, q_idx, kv_idx):
        return (q_idx < self.q_lengths[b]) & (kv_idx < self.kv_lengths[b])


class neighborhood(MaskMod):
    """Pixels of an image of rows of `width`, flattened: those at most `reach` rows and columns away."""

    def __init__(self, width: int, reach: int):
        self.width, self.reach = count("width", width, 1), count("reach", reach)

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


# as its objects are, torch.load(weights_only=True) may refer to its functions
torch.serialization.add_safe_globals([causal])
