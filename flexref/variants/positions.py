"""Score mods of positions: slopes, buckets, tables and spans over how far a key lies from its query, fixed or learned."""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flexref.program.mod_objects import CallableMod
from flexref.variants.checks import count, floats, number, placed, sizes


def relative_position(score, b, h, q_idx, kv_idx):
    """Adds how far the key lies before the query."""
    return score + (q_idx - kv_idx)


class alibi(CallableMod):
    """Subtracts the distance q_idx - kv_idx times the slope of the head, by `alibi_slopes`; `slopes` (H,) may replace them."""

    def __init__(self, heads: int, slopes: Tensor | None = None):
        if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
            raise ValueError(f"heads must be an int of at least 1, got {heads!r}")
        if slopes is None:
            slopes = alibi_slopes(heads)
        if slopes.shape != (heads,) or not slopes.is_floating_point():
            raise ValueError(f"slopes must be floats of shape ({heads},), got {slopes.dtype} {tuple(slopes.shape)}")
        self.slopes = slopes

    def __call__(self, score, b, h, q_idx, kv_idx):
        return score + self.slopes[h] * (kv_idx - q_idx)


def alibi_slopes(heads: int, device: torch.device | str | None = None) -> Tensor:
    """float32 (heads,): 2^(-8 (h + 1) / n) for the greatest power of two n <= heads; the rest are every other slope of 2 n heads.

    Press et al., Train Short, Test Long (ALiBi), 2022, and the authors' program for other numbers of heads.
    """
    n = 1 << count("heads", heads, 1).bit_length() - 1
    exponents = [-8.0 * (h + 1) / n for h in range(n)] + [-8.0 * (2 * h + 1) / (2 * n) for h in range(heads - n)]
    return placed(torch.exp2(torch.tensor(exponents, dtype=torch.float64, device="cpu")).float(), device)


class t5_bias(CallableMod):
    """Adds table[bucket, h] by the distance d = kv_idx - q_idx; `table` is floats (buckets, H), and may be learned.

    Of n buckets the first n // 2 are one for each distance, and the others reach to `max_distance` in equal steps of the
    logarithm: e + floor(log(|d| / e) / log(max_distance / e) * (n - e)) with e = n // 2, at most n - 1. If `bidirectional`,
    half of the buckets are for keys behind the query; else those count as distance 0. Raffel et al., T5, 2020.
    """

    def __init__(self, table: Tensor, bidirectional: bool = True, max_distance: int = 128):
        self.table = floats("table", table, (2,))
        if not isinstance(bidirectional, bool):
            raise TypeError(f"bidirectional must be a bool, got {type(bidirectional).__name__}")
        self.buckets = placed(t5_buckets(len(table), bidirectional, max_distance), table.device)

    def __call__(self, score, b, h, q_idx, kv_idx):
        reach = self.buckets.shape[0] // 2
        return score + self.table[self.buckets[_clipped(kv_idx - q_idx, reach) + reach], h]


def t5_buckets(buckets: int, bidirectional: bool = True, max_distance: int = 128) -> Tensor:
    """int64 (2 max_distance + 1,) on the CPU: T5's bucket of the distances kv_idx - q_idx from -max_distance to max_distance.

    In whole numbers: with e and n as in `t5_bias`, |d| is in bucket e + k where |d|^(n - e) e^k >= max_distance^k e^(n - e).
    """
    least = 4 if bidirectional else 2
    n = count("buckets", buckets, least) // (2 if bidirectional else 1)
    exact = n // 2
    count("max_distance", max_distance, exact + 1)
    near, steps, bucket = [], n - exact, 0
    for distance in range(max_distance + 1):
        while bucket < n - 1 and _reached(distance, bucket + 1, exact, steps, max_distance):
            bucket += 1
        near.append(bucket)
    behind = [n + x for x in near[1:]] if bidirectional else [0] * max_distance
    return torch.tensor([*reversed(near), *behind], dtype=torch.int64, device="cpu")


class relative_table(CallableMod):
    """Adds table[h, d + reach] with the distance d = kv_idx - q_idx clipped to -reach and reach; `table` may be learned.

    `table`: floats (2 reach + 1,), or (H, 2 reach + 1) with one row for each head. Shaw et al., Relative Position
    Representations, 2018, as a number for each distance.
    """

    def __init__(self, table: Tensor):
        self.table = floats("table", table, (1, 2))
        _odd(table.shape[-1:])

    def __call__(self, score, b, h, q_idx, kv_idx):
        reach = self.table.shape[-1] // 2
        at = _clipped(kv_idx - q_idx, reach) + reach
        return score + (self.table[at] if self.table.dim() == 1 else self.table[h, at])


class relative_grid(CallableMod):
    """Adds table[h, dy + reach, dx + reach]: learned by how many rows and columns, or more axes, the key lies away.

    `shape`: of the canvas, flattened row by row; `table`: floats (2 reach + 1, ...) for each of its axes, or with H before
    them; distances are clipped to each axis's reach. Liu et al., Swin Transformer, 2021.
    """

    def __init__(self, table: Tensor, shape: Sequence[int]):
        self.shape = sizes("shape", shape)
        self.table = floats("table", table, (len(self.shape), len(self.shape) + 1))
        _odd(table.shape[-len(self.shape) :])

    def __call__(self, score, b, h, q_idx, kv_idx):
        at, inner = [], 1
        for axis in reversed(range(len(self.shape))):
            i, j = q_idx // inner, kv_idx // inner
            if axis:
                i, j = i % self.shape[axis], j % self.shape[axis]
            reach = self.table.shape[axis - len(self.shape)] // 2
            at.append(_clipped(j - i, reach) + reach)
            inner *= self.shape[axis]
        if self.table.dim() > len(self.shape):
            at.append(h)
        return score + self.table[tuple(reversed(at))]


class sandwich(CallableMod):
    """Adds (sum over i < dim / 2 of cos(d / 10000^(2 i / dim))) / (8 (h + 1) / heads) with d = q_idx - kv_idx.

    `length`: distances of less than that are there, float32 rounded from float64. Chi et al., Dissecting Transformer Length
    Extrapolation (Sandwich), 2023.
    """

    def __init__(self, heads: int, length: int, dim: int = 128, device: torch.device | str | None = None):
        count("heads", heads, 1)
        if count("dim", dim, 2) % 2:
            raise ValueError(f"dim must be even, got {dim}")
        distances = torch.arange(count("length", length, 1), dtype=torch.float64, device="cpu")
        sums = torch.zeros_like(distances)
        for i in range(dim // 2):
            sums += torch.cos(distances / 10000 ** (2 * i / dim))
        scale = heads / (8.0 * torch.arange(1, heads + 1, dtype=torch.float64, device="cpu"))
        self.cosines, self.scale = placed(sums.float(), device), placed(scale.float(), device)

    def __call__(self, score, b, h, q_idx, kv_idx):
        return score + self.cosines[abs(q_idx - kv_idx)] * self.scale[h]


class adaptive_span(CallableMod):
    """Multiplies weights by min(1, (ramp + span[h] - d) / ramp), and masks where that is not above 0.

    They fall from 1 to 0 within `ramp` positions past a learned span. d = |q_idx - kv_idx|; `span` is floats (H,) in positions,
    and gets gradients. The logarithm of the factor is added to the score. Sukhbaatar et al., Adaptive Attention Span, 2019.
    """

    def __init__(self, span: Tensor, ramp: float):
        self.span, self.ramp = floats("span", span, (1,)), number("ramp", ramp)

    def __call__(self, score, b, h, q_idx, kv_idx):
        left = (self.ramp + self.span[h] - abs(q_idx - kv_idx)) / self.ramp
        seen = left > 0
        # no logarithm of 0 in either branch, whose derivative would be infinite
        factor = torch.where(seen, torch.where(left < 1, left, 1.0), 1.0)
        return torch.where(seen, score + torch.log(factor), -math.inf)


class gaussian_span(CallableMod):
    """Subtracts d^2 / (2 width[h]^2) with d = q_idx - kv_idx; `width` is floats (H,) in positions, and gets gradients.

    Yang et al., Modeling Localness for Self-Attention Networks, 2018, with the window at the query.
    """

    def __init__(self, width: Tensor):
        self.width = floats("width", width, (1,))

    def __call__(self, score, b, h, q_idx, kv_idx):
        steps = (q_idx - kv_idx) / self.width[h]
        return score - 0.5 * steps * steps


class mla_rope(CallableMod):
    """Adds scale * <query_rope[b, h, q_idx], key_rope[b, h // group, kv_idx]>, beside a compressed part; both learned.

    query_rope: floats (B, H, L, R), already turned by their positions, key_rope: (B, Hkv, S, R) or (B, S, R) for all heads. The
    product is 2 R reads for each score, and its kernel is long to compile where R is great: query and key with their rotary
    parts concatenated, and scaled, are the same attention and quicker. DeepSeek-V2, 2024.
    """

    def __init__(self, query_rope: Tensor, key_rope: Tensor, scale: float = 1.0):
        self.query_rope, self.key_rope = floats("query_rope", query_rope, (4,)), floats("key_rope", key_rope, (3, 4))
        self.scale = number("scale", scale)
        if query_rope.shape[-1] != key_rope.shape[-1]:
            raise ValueError(f"key_rope must have the last size of query_rope, {query_rope.shape[-1]}, got {key_rope.shape[-1]}")
        heads, kv_heads = query_rope.shape[1], key_rope.shape[1]
        if key_rope.dim() == 4 and (not kv_heads or heads % kv_heads):
            raise ValueError(f"key_rope must have heads that divide the {heads} of query_rope, got {kv_heads}")

    def __call__(self, score, b, h, q_idx, kv_idx):
        at = (b, kv_idx)
        if self.key_rope.dim() == 4:
            at = (b, h // (self.query_rope.shape[1] // self.key_rope.shape[1]), kv_idx)
        product = 0.0
        for r in range(self.query_rope.shape[-1]):
            product = product + self.query_rope[b, h, q_idx, r] * self.key_rope[(*at, r)]
        return score + self.scale * product


def _reached(distance: int, step: int, exact: int, steps: int, last: int) -> bool:
    """Whether a distance is in bucket `step` or a later one."""
    if step <= exact:
        return distance >= step
    k = step - exact
    return distance**steps * exact**k >= last**k * exact**steps


def _clipped(x, reach: int):
    return x.clamp(-reach, reach) if isinstance(x, Tensor) else min(max(x, -reach), reach)


def _odd(lengths: Sequence[int]) -> None:
    if not all(n % 2 for n in lengths):
        raise ValueError(f"table must have 2 * reach + 1 entries for distances, got {tuple(lengths)}")
