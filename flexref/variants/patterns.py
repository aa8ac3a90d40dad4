"""Sparse patterns of long sequences: dilated windows, tokens that see all, blocks at random, chosen tiles; one for each head."""
from __future__ import annotations

from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

from flexref.blocks.mask_mods import Concatenated, MaskMod, or_masks
from flexref.variants import checks
from flexref.variants.checks import bools, integers, placed


class dilated(MaskMod):
    """Keys `dilation` apart, at most `before` of them before the query and `after` behind it, and the query's own.

    With d = q_idx - kv_idx: d % dilation == 0 and -after * dilation <= d <= before * dilation. `dilation` is an int, or an
    integer tensor (H,) with one for each head. Beltagy et al., Longformer, 2020.
    """

    def __init__(self, before: int, after: int, dilation: int | Tensor):
        self.before, self.after = checks.count("before", before), checks.count("after", after)
        self.dilation = _dilation(dilation)

    def __call__(self, b, h, q_idx, kv_idx):
        dilation = self.dilation[h] if isinstance(self.dilation, Tensor) else self.dilation
        distance = q_idx - kv_idx
        # in steps, since before * dilation may be more than an index can be
        return (distance % dilation == 0) & (distance // dilation <= self.before) & (-distance // dilation <= self.after)


class global_tokens(MaskMod):
    """The first `count` positions see, and are seen by, all; or those marked in a bool tensor (L,) or (B, L). For `|`."""

    def __init__(self, count: int | Tensor):
        self.count = bools("count", count, (1, 2)) if isinstance(count, Tensor) else checks.count("count", count)

    def __call__(self, b, h, q_idx, kv_idx):
        if not isinstance(self.count, Tensor):
            return (q_idx < self.count) | (kv_idx < self.count)
        if self.count.dim() == 2:
            return self.count[b, q_idx] | self.count[b, kv_idx]
        return self.count[q_idx] | self.count[kv_idx]


def longformer(reach: int, tokens: int | Tensor, dilation: int | Tensor = 1) -> Callable:
    """`reach` keys on each side, `dilation` apart, and global tokens, as `dilated` and `global_tokens` take them.

    Beltagy et al., Longformer, 2020.
    """
    return or_masks(dilated(reach, reach, dilation), global_tokens(tokens))


class bigbird(MaskMod):
    """In blocks of `size`: the `window` around the query's, the first `edge`, and `random` others; the first `edge` see all.

    With block i of the query and j of the key: |i - j| <= window // 2 or i < edge or j < edge or j in chosen[h, i]; `window` is
    odd. `length`: of the sequence, whose last block may be shorter. `random` keys are drawn for each head and block by `seed`,
    among those not seen anyway; `chosen` int64 (heads, blocks, random). Zaheer et al., Big Bird, 2020.
    """

    def __init__(
        self, length: int, size: int, window: int = 3, edge: int = 2, random: int = 3, heads: int = 1, seed: int = 0,
        device: torch.device | str | None = None,
    ):  # fmt: skip
        length, self.size = checks.count("length", length), checks.count("size", size, 1)
        self.window, self.edge = checks.count("window", window, 1), checks.count("edge", edge)
        if window % 2 == 0:
            raise ValueError(f"window must be odd, got {window}")
        blocks = -(-length // size)
        others = checks.count("random", random), checks.count("heads", heads, 1), checks.count("seed", seed)
        self.chosen = placed(_drawn(blocks, window // 2, edge, *others), device)

    def __call__(self, b, h, q_idx, kv_idx):
        i, j = q_idx // self.size, kv_idx // self.size
        result = (abs(i - j) <= self.window // 2) | (i < self.edge) | (j < self.edge)
        head = h if self.chosen.shape[0] > 1 else h * 0
        for n in range(self.chosen.shape[2]):
            result = result | (self.chosen[head, i, n] == j)
        return result


class selected_tiles(MaskMod):
    """Query tiles see the key tiles that are chosen for them: chosen[b, h, q_idx // size, kv_idx // size].

    `chosen`: bool (tiles, tiles), (H, tiles, tiles) or (B, H, tiles, tiles); `size` in tokens, an int or one for queries and
    one for keys. With `filled`, an integer tensor (tiles,), only the first filled[t] keys of tile t are there. Zhang et al.,
    VSA, 2025; `top_tiles` chooses.
    """

    def __init__(self, chosen: Tensor, size: int | tuple[int, int], filled: Tensor | None = None):
        self.chosen = bools("chosen", chosen, (2, 3, 4))
        q_size, kv_size = size if isinstance(size, (tuple, list)) else (size, size)
        self.q_size, self.kv_size = checks.count("size", q_size, 1), checks.count("size", kv_size, 1)
        self.filled = None if filled is None else integers("filled", filled, (1,))
        if filled is not None and len(filled) != chosen.shape[-1]:
            raise ValueError(f"filled must have one for each of {chosen.shape[-1]} tiles of keys, got {len(filled)}")

    def __call__(self, b, h, q_idx, kv_idx):
        i, j = q_idx // self.q_size, kv_idx // self.kv_size
        chosen = self.chosen[(b, h, i, j)[-self.chosen.dim() :]]
        return chosen if self.filled is None else chosen & (kv_idx % self.kv_size < self.filled[j])


def tiles_of_indices(indices: Tensor, tiles: int) -> Tensor:
    """The bool table (..., tiles of queries, `tiles`) from the numbers of those chosen, int64 (..., tiles of queries, k)."""
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.dim() < 2:
        raise TypeError("indices must be an int64 tensor of at least 2 dimensions (..., tiles of queries, k)")
    table = torch.zeros(*indices.shape[:-1], checks.count("tiles", tiles), dtype=torch.bool, device=indices.device)
    return table.scatter(-1, indices, True)


def top_tiles(query: Tensor, key: Tensor, size: int, keep: int) -> Tensor:
    """The `keep` key tiles of each query tile with the greatest product of means: bool (B, H, tiles, tiles) for `selected_tiles`.

    query (B, H, L, E), key (B, H, S, E); a last tile that is not full has the mean of what is there. Zhang et al., VSA, 2025.
    """
    for name, x in (("query", query), ("key", key)):
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
            raise TypeError(f"{name} must be a float tensor (B, H, length, E)")
    scores = _means(query, checks.count("size", size, 1)) @ _means(key, size).transpose(-1, -2)
    return tiles_of_indices(scores.topk(min(checks.count("keep", keep, 1), scores.shape[-1])).indices, scores.shape[-1])


def per_head(*mask_mods: Callable, each: int = 1) -> Callable:
    """The first mask_mod for the first `each` heads, the next for the next; each counts its heads from 0. Others see nothing."""
    for i, mod in enumerate(mask_mods):
        if not callable(mod):
            raise TypeError(f"per_head: argument {i} must be a mask_mod(b, h, q_idx, kv_idx), got {type(mod).__name__}")
    return Concatenated(mask_mods, (checks.count("each", each, 1),) * len(mask_mods), 1)


def per_layer(*mods: Callable, layers: int) -> tuple[Callable, ...]:
    """The mod of each of `layers` layers, mods[layer % len(mods)]: five windows and one causal, again and again."""
    for i, mod in enumerate(mods):
        if not callable(mod):
            raise TypeError(f"per_layer: argument {i} must be a mod, got {type(mod).__name__}")
    if not mods:
        raise ValueError("per_layer: got no mod")
    return tuple(mods[layer % len(mods)] for layer in range(checks.count("layers", layers)))


def _dilation(dilation: int | Tensor) -> int | Tensor:
    if not isinstance(dilation, Tensor):
        return checks.count("dilation", dilation, 1)
    if bool((integers("dilation", dilation, (1,)) < 1).any()):
        raise ValueError(f"dilation must be at least 1, got {dilation.tolist()}")
    return dilation


def _drawn(blocks: int, reach: int, edge: int, random: int, heads: int, seed: int) -> Tensor:
    """Of each head and block, key blocks that it does not see anyway; its own again where there are too few."""
    draw, rows = Random(seed), []
    for i in list(range(blocks)) * heads:
        low = range(edge, max(edge, i - reach))
        high = range(max(edge, i + reach + 1), blocks)
        free = len(low) + len(high) if i >= edge else 0
        places = draw.sample(range(free), min(random, free))
        rows.append([low[n] if n < len(low) else high[n - len(low)] for n in places] + [i] * (random - len(places)))
    return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(heads, blocks, random)


def _means(x: Tensor, size: int) -> Tensor:
    """The mean of each tile of `size` tokens, in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    tiles = -(-x.shape[2] // size)
    sums = torch.nn.functional.pad(x, (0, 0, 0, tiles * size - x.shape[2])).unflatten(2, (tiles, size)).sum(3)
    held = (x.shape[2] - torch.arange(tiles, device=x.device) * size).clamp(max=size)
    return sums / held[:, None]
