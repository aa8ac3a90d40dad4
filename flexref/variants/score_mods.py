"""Score mods to import instead of writing: each is a score_mod(score, b, h, q_idx, kv_idx), or makes one.

They are objects or module-level functions, so that they print, compare and pickle. They also work as score_mod of
torch.nn.attention.flex_attention.
"""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flexref.program.mod_objects import CallableMod, name_of
from flexref.variants.checks import count, number
from flexref.variants.graphs import graph_distance, graph_distances, graph_path, graph_paths
from flexref.variants.patterns import per_layer
from flexref.variants.positions import (
    adaptive_span,
    alibi,
    alibi_slopes,
    gaussian_span,
    mla_rope,
    relative_grid,
    relative_position,
    relative_table,
    sandwich,
    t5_bias,
    t5_buckets,
)

__all__ = [
    "activation", "adaptive_span", "alibi", "alibi_slopes", "by_mask", "causal", "compose", "gaussian_span", "graph_distance",
    "graph_distances", "graph_path", "graph_paths", "mla_rope", "per_head", "per_layer", "relative_grid", "relative_position",
    "relative_table", "sandwich", "soft_cap", "t5_bias", "t5_buckets", "table_bias", "undo_softmax",
]  # fmt: skip


def causal(score, b, h, q_idx, kv_idx):
    """A causal mask by score: -inf after the query."""
    return torch.where(torch.as_tensor(q_idx >= kv_idx), score, -math.inf)


# where the fraction of soft_cap's fast form reaches 1
LAMBERT_END = 4.97178685


class soft_cap(CallableMod):
    """cap * tanh(score / cap): scores stay within -cap and cap. As in Gemma 2, 2024.

    `fast` takes a fraction for tanh, no exponential: with y = x^2, x (y^3 + 378 y^2 + 17325 y + 135135) / (28 y^3 + 3150 y^2 +
    62370 y + 135135), the seventh convergent of Lambert's continued fraction, up to x = 4.97178685, where it is 1 and
    stays. The score is off by less than 1e-4 * cap: most there, by 1 - tanh(x) = 9.6e-5, and nowhere by more than the tenth
    convergent is away.
    """

    def __init__(self, cap: float, fast: bool = False):
        if not isinstance(fast, bool):
            raise TypeError(f"fast must be a bool, got {type(fast).__name__}")
        self.cap, self.fast = number("cap", cap), fast or None

    def __call__(self, score, b, h, q_idx, kv_idx):
        if not self.fast:
            return self.cap * torch.tanh(score / self.cap)
        x = torch.clamp(score / self.cap, -LAMBERT_END, LAMBERT_END)
        y = x * x
        above = ((y + 378.0) * y + 17325.0) * y + 135135.0
        below = ((28.0 * y + 3150.0) * y + 62370.0) * y + 135135.0
        return self.cap * (x * above / below)


class table_bias(CallableMod):
    """Adds a bias read from `table`, floats (L, S), (H, L, S) or (B, H, L, S), which may be learned."""

    def __init__(self, table: Tensor):
        if not isinstance(table, Tensor) or not table.is_floating_point() or not 2 <= table.dim() <= 4:
            got = f"{table.dtype} {tuple(table.shape)}" if isinstance(table, Tensor) else type(table).__name__
            raise TypeError(f"table must be a float tensor (L, S), (H, L, S) or (B, H, L, S), got {got}")
        self.table = table

    def __call__(self, score, b, h, q_idx, kv_idx):
        if self.table.dim() == 2:
            return score + self.table[q_idx, kv_idx]
        return score + (self.table[h, q_idx, kv_idx] if self.table.dim() == 3 else self.table[b, h, q_idx, kv_idx])


class activation(CallableMod):
    """log(function(score) + offset), so that `undo_softmax` makes sum of function(score) * value of the output: no softmax.

    function(score) + offset must be above 0 wherever scores are; by default GELU, which is above -0.17.
    """

    def __init__(self, function: Callable = torch.nn.functional.gelu, offset: float = 1.0):
        if not callable(function):
            raise TypeError(f"function must be a pointwise function of the score, got {type(function).__name__}")
        self.function, self.offset = function, number("offset", offset)

    def __call__(self, score, b, h, q_idx, kv_idx):
        return torch.log(self.function(score) + self.offset)


def undo_softmax(out: Tensor, lse: Tensor, value_sum: Tensor, offset: float = 1.0) -> Tensor:
    """out * exp(lse) - offset * value_sum: what `activation` of the same offset weighs the values to.

    out (B, H, L, Ev), lse (B, H, L); value_sum: of the values that each row may see, broadcast to (B, H, L, Ev).
    """
    offset = number("offset", offset)
    return out * lse.exp().unsqueeze(-1) - offset * value_sum


class by_mask(CallableMod):
    """A mask_mod as a score_mod: -inf where it is false."""

    def __init__(self, mask_mod: Callable):
        self.mask_mod = mask_mod

    def __call__(self, score, b, h, q_idx, kv_idx):
        return torch.where(torch.as_tensor(self.mask_mod(b, h, q_idx, kv_idx)), score, -math.inf)


class compose(CallableMod):
    """One score_mod after the other, the first one first."""

    def __init__(self, *mods: Callable):
        for i, mod in enumerate(mods):
            if not callable(mod):
                raise TypeError(f"compose: argument {i} must be a score_mod, got {type(mod).__name__}")
        self.mods = mods

    def _text(self) -> str:
        return f"compose({', '.join(map(name_of, self.mods))})"

    def __call__(self, score, b, h, q_idx, kv_idx):
        for mod in self.mods:
            score = mod(score, b, h, q_idx, kv_idx)
        return score


class per_head(CallableMod):
    """The first score_mod for the first `each` heads, the next for the next; each counts its heads from 0. Others have none."""

    def __init__(self, *mods: Callable, each: int = 1):
        for i, mod in enumerate(mods):
            if not callable(mod):
                raise TypeError(f"per_head: argument {i} must be a score_mod, got {type(mod).__name__}")
        self.mods, self.each = mods, count("each", each, 1)

    def _text(self) -> str:
        return f"per_head({', '.join(map(name_of, self.mods))}, each={self.each})"

    def __call__(self, score, b, h, q_idx, kv_idx):
        result = score
        for i, mod in enumerate(self.mods):
            local = h - i * self.each
            own = torch.as_tensor((local >= 0) & (local < self.each))
            # a mod is asked at none but its own heads, also where the answer does not count
            local = local.clamp(0, self.each - 1) if isinstance(local, Tensor) else min(max(local, 0), self.each - 1)
            result = torch.where(own, mod(score, b, local, q_idx, kv_idx), result)
        return result


# as its objects are, torch.load(weights_only=True) may refer to its functions
torch.serialization.add_safe_globals([causal, relative_position])
