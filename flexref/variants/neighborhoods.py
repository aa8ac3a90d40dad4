"""Masks of images and videos whose pixels or patches are flattened: neighbourhoods in 1, 2, 3 or more axes, and tiles.

An order says which coordinates a token has: rows one behind another, tiles one behind another, or along a Z-order curve.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flexref.blocks.mask_mods import MaskMod
from flexref.program.mod_objects import CallableMod
from flexref.variants.checks import count, each_axis, sizes


class Order(CallableMod):
    """order(index) is the tuple of the coordinates of a token, one for each axis of `shape`."""

    shape: tuple[int, ...]

    def __call__(self, index):
        raise NotImplementedError(f"{type(self).__name__} has no __call__(index)")

    def permutation(self, device: torch.device | str | None = None) -> Tensor:
        """int64 (tokens,): x[..., permutation, :] puts tokens that lie row by row in this order; its argsort() puts them back."""
        at = torch.arange(math.prod(self.shape), device=device)
        raster = torch.zeros_like(at)
        for coordinate, size in zip(self(at), self.shape, strict=True):
            raster = raster * size + coordinate
        return raster


class raster_order(Order):
    """Row by row, the last axis quickest: index = (t * height + y) * width + x."""

    def __init__(self, shape: Sequence[int]):
        self.shape = sizes("shape", shape)

    def __call__(self, index):
        return _coordinates(index, self.shape)


class tile_order(Order):
    """Tile by tile, the tiles and the tokens in each of them row by row; every side of `shape` is a multiple of the tile's."""

    def __init__(self, shape: Sequence[int], tile: int | Sequence[int]):
        self.shape = sizes("shape", shape)
        self.tile = each_axis("tile", tile, len(self.shape))
        self.tiles = _tiles(self.shape, self.tile)

    def __call__(self, index):
        size = math.prod(self.tile)
        tiles, within = _coordinates(index // size, self.tiles), _coordinates(index % size, self.tile)
        return tuple(a * n + c for a, n, c in zip(tiles, self.tile, within, strict=True))


class morton_order(Order):
    """The Z-order curve of Morton, 1966: bits of the coordinates taken in turn, the last axis first; sides are powers of two."""

    def __init__(self, shape: Sequence[int]):
        self.shape = sizes("shape", shape)
        for i, n in enumerate(self.shape):
            if n & (n - 1):
                raise ValueError(f"shape[{i}] must be a power of two, got {n}")

    def __call__(self, index):
        axes, place = [index * 0 for _ in self.shape], 0
        for bit in range(max(self.shape).bit_length() - 1):
            for axis in reversed(range(len(axes))):
                if self.shape[axis] >> bit > 1:
                    # division and remainder, since intervals know these and not shifts
                    axes[axis] = axes[axis] + index // (1 << place) % 2 * (1 << bit)
                    place += 1
        return tuple(axes)


class natten(MaskMod):
    """Neighbourhood attention: along each axis the `kernel` keys nearest to the query, moved inwards at the borders.

    With dilation d, i' = i // d and n = the positions that agree with i modulo d: start = clamp(i' - kernel // 2, 0, n -
    kernel), and key j is allowed where j % d == i % d and start <= j // d < start + kernel. On a causal axis: i' - kernel < j
    // d <= i'. `kernel`, `dilation`, `causal`: one for each axis of `shape`, or one for all. Tokens past the canvas see, and
    are seen by, none. Hassani et al., Neighborhood Attention Transformer, 2022; dilated, 2022; causal axes as in the project
    NATTEN.
    """

    def __init__(
        self,
        shape: Sequence[int],
        kernel: int | Sequence[int],
        dilation: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
        order: Order | None = None,
    ):
        self.shape = sizes("shape", shape)
        axes = len(self.shape)
        self.kernel, self.dilation = each_axis("kernel", kernel, axes), each_axis("dilation", dilation, axes)
        self.causal = tuple(causal) if isinstance(causal, (tuple, list)) else (causal,) * axes
        if len(self.causal) != axes or not all(isinstance(x, bool) for x in self.causal):
            raise TypeError(f"causal must be a bool, or one for each of {axes} axes, got {causal!r}")
        if order is not None and (not isinstance(order, Order) or order.shape != self.shape):
            raise ValueError(f"order must be one of the shape {self.shape}, such as tile_order(shape, tile), got {order!r}")
        self.order = order

    def __call__(self, b, h, q_idx, kv_idx):
        total = math.prod(self.shape)
        result = _inside(q_idx, total) & _inside(kv_idx, total)
        order = self.order or raster_order(self.shape)
        axes = zip(order(q_idx), order(kv_idx), self.shape, self.kernel, self.dilation, self.causal, strict=True)
        for i, j, size, kernel, dilation, causal in axes:
            if dilation > 1:
                result = result & (i % dilation == j % dilation)
                size = (size - 1 - i % dilation) // dilation + 1
                i, j = i // dilation, j // dilation
            result = result & (_before(i, j, kernel) if causal else _near(i, j, size, kernel))
        return result


class sliding_tile(MaskMod):
    """Sliding tile attention: `natten` of whole tiles, of tokens in tile_order, and `text` tokens behind them.

    `kernel` and `tile` in tokens, one for each axis of `shape` or one for all; sides and kernel are multiples of the tile's.
    Text and image see each other and text sees text. Zhang et al., Fast Video Generation with Sliding Tile Attention, 2025.
    """

    def __init__(self, shape: Sequence[int], kernel: int | Sequence[int], tile: int | Sequence[int], text: int = 0):
        self.shape = sizes("shape", shape)
        self.tile = each_axis("tile", tile, len(self.shape))
        self.kernel = each_axis("kernel", kernel, len(self.shape))
        _tiles(self.shape, self.tile)
        for i, (n, t) in enumerate(zip(self.kernel, self.tile, strict=True)):
            if n % t:
                raise ValueError(f"kernel[{i}] must be a multiple of the tile's {t}, got {n}")
        self.text = count("text", text)

    def __call__(self, b, h, q_idx, kv_idx):
        total, size, tiles = math.prod(self.shape), math.prod(self.tile), _tiles(self.shape, self.tile)
        result = _inside(q_idx, total) & _inside(kv_idx, total)
        queries, keys = _coordinates(q_idx // size, tiles), _coordinates(kv_idx // size, tiles)
        for i, j, n, kernel, tile in zip(queries, keys, tiles, self.kernel, self.tile, strict=True):
            result = result & _near(i, j, n, kernel // tile)
        if not self.text:
            return result
        everyone = _inside(q_idx, total + self.text) & _inside(kv_idx, total + self.text)
        return result | (everyone & ((q_idx >= total) | (kv_idx >= total)))


class spatial_head(MaskMod):
    """Keys of the frames around the query's: |q_idx - kv_idx| < width, in tokens.

    The `prompt` tokens before the video see, and are seen by, all. With `sink` > 0 the first `sink` tokens behind the prompt
    are seen by all, too. Xi et al., Sparse VideoGen, 2025.
    """

    def __init__(self, width: int, prompt: int = 0, sink: int = 0):
        self.width, self.prompt, self.sink = count("width", width), count("prompt", prompt), count("sink", sink)

    def __call__(self, b, h, q_idx, kv_idx):
        near = abs(q_idx - kv_idx) < self.width
        return near | (q_idx < self.prompt) | (kv_idx < self.prompt + self.sink)


class temporal_head(MaskMod):
    """Keys of about the same place in every frame of `frame` tokens: |the query's place - the key's place| < width, in tokens.

    The place of a token is (index - prompt) % frame. The `prompt` tokens before the video see, and are seen by, all. Xi et al.,
    Sparse VideoGen, 2025.
    """

    def __init__(self, frame: int, width: int, prompt: int = 0):
        self.frame, self.width, self.prompt = count("frame", frame, 1), count("width", width), count("prompt", prompt)

    def __call__(self, b, h, q_idx, kv_idx):
        near = abs((q_idx - self.prompt) % self.frame - (kv_idx - self.prompt) % self.frame) < self.width
        return near | (q_idx < self.prompt) | (kv_idx < self.prompt)


def _tiles(shape: tuple[int, ...], tile: tuple[int, ...]) -> tuple[int, ...]:
    for i, (n, t) in enumerate(zip(shape, tile, strict=True)):
        if n % t:
            raise ValueError(f"shape[{i}] must be a multiple of the tile's {t}, got {n}; pad the canvas")
    return tuple(n // t for n, t in zip(shape, tile, strict=True))


def _coordinates(index, shape: tuple[int, ...]) -> tuple:
    """The first coordinate goes on past the canvas."""
    found, inner = [], 1
    for size in reversed(shape[1:]):
        found.append(index // inner % size if size > 1 else index * 0)
        inner *= size
    return (index // inner, *reversed(found))


def _inside(index, total: int):
    return (index >= 0) & (index < total)


def _before(i, j, kernel: int):
    return (j <= i) & (i - j < kernel)


def _near(i, j, size, kernel: int):
    if isinstance(size, int) and kernel >= size:
        return True
    # of fewer positions than the kernel it begins before the first, and all are near
    start = _least(_greatest(i - kernel // 2, 0), size - kernel)
    return (j >= start) & (j < start + kernel)


def _greatest(x, bound):
    return torch.maximum(x, x * 0 + bound) if isinstance(x, Tensor) else max(x, bound)


def _least(x, bound):
    return torch.minimum(x, x * 0 + bound) if isinstance(x, Tensor) else min(x, bound)


