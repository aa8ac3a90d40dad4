"""Whether the shapes of query, key and value go together, and whether lengths and heads stand in each other's place."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from flexref.blocks.inputs import unserved

NAMES = ("query", "key", "value")
# which of query, key and value may have been handed in as (B, L, H, D), the most likely first
_TURNS = ((1, 1, 1), (1, 0, 0), (0, 1, 1), (0, 1, 0), (0, 0, 1))


def check_shapes(query: Sequence[int], key: Sequence[int], value: Sequence[int], enable_gqa: bool) -> None:
    """Raise ValueError for three shapes, of four sizes each, that do not go together."""
    problem = _problem(query, key, value, enable_gqa)
    if problem is not None:
        raise ValueError(f"{problem}{_turned(query, key, value, enable_gqa)}.")


def _turned_lengths(query: Sequence[int], key: Sequence[int], lengths: Sequence[int]) -> str:
    """The hint where a block mask of `lengths` (query, key) fits once query and key are transposed; "" otherwise."""
    return _hint(NAMES) if (query[1], key[1]) == tuple(lengths) else ""


def _turned(query: Sequence[int], key: Sequence[int], value: Sequence[int], enable_gqa: bool) -> str:
    """The hint where transposing some of the three mends them, and one of these has more heads than positions."""
    shapes = query, key, value
    for turn in _TURNS:
        mended = [(x[0], x[2], x[1], x[3]) if t else x for t, x in zip(turn, shapes, strict=True)]
        if any(x[1] > x[2] for x in compress(shapes, turn)) and _problem(mended[0], mended[1], mended[2], enable_gqa) is None:
            return _hint(compress(NAMES, turn))
    return ""


def _hint(names: Iterable[str]) -> str:
    return f"; if {' and '.join(names)} came as (B, L, H, D), pass x.transpose(1, 2): heads go before length"


def _problem(query: Sequence[int], key: Sequence[int], value: Sequence[int], enable_gqa: bool) -> str | None:
    batch, q_heads, _, head_dim = query
    kv_batch, kv_heads, _, key_dim = key
    if tuple(value[:3]) != tuple(key[:3]):
        return f"key and value must agree in batch, heads and length, got key {tuple(key)} and value {tuple(value)}"
    if key_dim != head_dim:
        return f"query and key must have the same head_dim, got query {head_dim} and key {key_dim}"
    if head_dim < 1 or value[3] < 1:
        return f"head_dim must be at least 1, got query {tuple(query)} and value {tuple(value)}"
    if kv_batch not in (batch, 1):
        return f"key and value must have query's batch {batch}, or 1, got {kv_batch}"
    if q_heads < 1 or kv_heads < 1:
        return f"there must be at least one head, got query {q_heads} and key {kv_heads}"
    if q_heads != kv_heads and not enable_gqa:
        return f"query has {q_heads} heads but key and value have {kv_heads}; pass enable_gqa=True for grouped-query attention"
    if q_heads % kv_heads:
        return f"query's heads must be a multiple of key's and value's, got {q_heads} and {kv_heads}"
    return None


def checked_scale(scale: float | None, head_dim: int) -> float:
    """The factor of the scores, by default 1 / sqrt(head_dim). Raises TypeError or ValueError."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(
            f"scale must be a number or None, got {type(scale).__name__}; for a tensor pass scale=float(x)."
        )
    try:
        value = float(scale)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"scale must be finite, got {scale}.")
    return value


def check_block_mask(block_mask: Any, query: Tensor, key: Tensor) -> None:
    """Raise ValueError for a block mask of other lengths, batches, heads or device than query and key have."""
    block_mask.check_lists()
    q_len, kv_len = query.shape[2], key.shape[2]
    if tuple(block_mask.seq_lengths) != (q_len, kv_len):
        raise ValueError(
            f"block_mask is for lengths (query, key) {tuple(block_mask.seq_lengths)}, but query and key have {(q_len, kv_len)}; "
            f"make it with Q_LEN={q_len}, KV_LEN={kv_len}, or use block_mask.resize({q_len}, {kv_len})"
            f"{_turned_lengths(query.shape, key.shape, block_mask.seq_lengths)}."
        )
    for name, have, want in (("B", block_mask.B, query.shape[0]), ("H", block_mask.H, query.shape[1])):
        if have not in (1, want):
            what = "batch" if name == "B" else "number of query heads"
            raise ValueError(f"block_mask has {name}={have}; it must be 1 or query's {what} {want}.")
    device = torch.device(block_mask.device)
    if device.type != query.device.type or (device.index or 0) != (query.device.index or 0):
        raise ValueError(
            f"block_mask is on {block_mask.device} but query is on {query.device}; use block_mask.to({str(query.device)!r})."
        )


def check_serves(block_mask: Any, reads: Callable[[str], bool], query: Sequence[int]) -> None:
    """Raise ValueError where the blocks of batch or head 0 are to be those of all, and mask_mod would say otherwise."""
    wrong = unserved(reads, block_mask.shape, query)
    if wrong is not None:
        name, index, want = wrong
        raise ValueError(
            f"block_mask was made with {name}=1, but its mask_mod reads {index} and query has {want}; make it with {name}={want}."
        )
