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

__all__ = ["alibi", "by_mask", "causal", "compose", "relative_position", "soft_cap", "table_bias"]


def relative_position(score, b, h, q_idx, kv_idx):
    """Adds how far the key lies before the query."""
    return score + (q_idx - kv_idx)


def causal(score, b, h, q_idx, kv_idx):
    """A causal mask by score: -inf after the query."""
    return torch.where(torch.as_tensor(q_idx >= kv_idx), score, -math.inf)


class alibi(CallableMod):
    """Subtracts the distance times the slope of the head, 2^(-8 (h + 1) / heads); `slopes` (H,) may replace them."""

    def __init__(self, heads: int, slopes: Tensor | None = None):
        if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
            raise ValueError(f"heads must be an int of at least 1, got {heads!r}")
        if slopes is None:
            slopes = torch.exp2(-8.0 * torch.arange(1, heads + 1, dtype=torch.float64) / heads).float()
        if slopes.shape != (heads,) or not slopes.is_floating_point():
            raise ValueError(f"slopes must be floats of shape ({heads},), got {slopes.dtype} {tuple(slopes.shape)}")
        self.slopes = slopes

    def __call__(self, score, b, h, q_idx, kv_idx):
        return score + self.slopes[h] * (kv_idx - q_idx)


class soft_cap(CallableMod):
    """cap * tanh(score / cap): scores stay within -cap and cap."""

    def __init__(self, cap: float):
        if isinstance(cap, bool) or not isinstance(cap, (int, float)) or not 0 < cap < math.inf:
            raise ValueError(f"cap must be a positive number, got {cap!r}")
        self.cap = float(cap)

    def __call__(self, score, b, h, q_idx, kv_idx):
        return self.cap * torch.tanh(score / self.cap)


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

# as its objects are, torch.load(weights_only=True) may refer to its functions
torch.serialization.add_safe_globals([causal, relative_position])
