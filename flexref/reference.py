"""What flexref means: attention with a score_mod and a mask_mod, once to be read and once to be used.

`loops` is the definition: four loops, plain Python integers, one softmax a row. `einsum` says the same with
whole tensors and is differentiable by torch autograd. Every backend is held to these two, so they import
nothing of flexref but one_float.py (what numbers are in a mod) and taken.py (a branch that was not taken has no
gradient), and call the user's own functions.
docs/semantics.md states the rules.

Shapes: query (B, Hq, L, E), key (B or 1, Hkv, S, E), value (B or 1, Hkv, S, Ev); Hq is a multiple of Hkv.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flexref.one_float import OneFloat
from flexref.taken import OneShape, follow

ACC_DTYPE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
INF, NAN = math.inf, math.nan


class Result(NamedTuple):
    """out (B, Hq, L, Ev) in query's dtype; lse and max_scores (B, Hq, L) in the accumulation type."""

    out: Tensor
    lse: Tensor
    max_scores: Tensor


def loops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    *,
    scale: float | None = None,
    blocks: tuple[Tensor, Tensor] | None = None,
    sink: Tensor | None = None,
    index: Callable = int,
) -> Result:
    """The definition. The mods get Python integers, so `print`, `if` and `breakpoint()` work inside them.

    `blocks`: two bool tensors that broadcast to (B, Hq, L, S): positions listed, and positions listed full.
    `sink`: (Hq,) or (Hq, n), the scores of keys that every query of the head may attend to and whose value is 0 (R16).
    `index`: makes b, h, q_idx, kv_idx; give `torch.tensor` for a mod that calls torch functions on them.
    """
    query, key, value, scale, out_dtype = _prepare(query, key, value, scale)
    B, H, L, S = query.shape[0], query.shape[1], query.shape[2], key.shape[2]
    listed, full = _blocks(blocks, (B, H, L, S), query.device)
    out = query.new_zeros(B, H, L, value.shape[3])
    lse = query.new_full((B, H, L), -INF)
    max_scores = lse.clone()

    for b in range(B):
        for h in range(H):
            for q_idx in range(L):
                scores = [] if sink is None else [x for x in _by_head(sink, query)[h] if x != -INF]
                values = [value.new_zeros(value.shape[3]) for _ in scores]
                for kv_idx in range(S):
                    at = index(b), index(h), index(q_idx), index(kv_idx)
                    if not listed[b, h, q_idx, kv_idx]:
                        continue
                    with OneFloat(query.dtype):
                        masked = not full[b, h, q_idx, kv_idx] and mask_mod and not _truth(mask_mod(*at))
                    if masked:
                        continue
                    score = scale * torch.dot(query[b, h, q_idx], key[b, h, kv_idx])
                    if score_mod:
                        with OneFloat(query.dtype):
                            score = score_mod(score, *at)
                        score = torch.as_tensor(score, dtype=query.dtype, device=query.device)
                    if score == -INF:
                        continue
                    scores.append(score)
                    values.append(value[b, h, kv_idx])
                if scores:
                    at = b, h, q_idx
                    out[at], lse[at], max_scores[at] = _attend_row(torch.stack(scores), torch.stack(values))
    return Result(out.to(out_dtype), lse, max_scores)


def _attend_row(score: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One row's softmax: score (N,), value (N, Ev) of its allowed positions -> out (Ev,), lse, row_max."""
    row_max = _nan_if_infinite(score.detach().max())
    weight = torch.exp(score - row_max)
    row_sum = weight.sum()
    return weight @ value / row_sum, row_max + torch.log(row_sum), row_max


def einsum(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    *,
    scale: float | None = None,
    blocks: tuple[Tensor, Tensor] | None = None,
    sink: Tensor | None = None,
) -> Result:
    """The same with whole tensors: differentiable by query, key, value, sink and all that score_mod reads.

    A mod is asked about all positions that concern it together, by torch.vmap, and sees one of them: mask_mod those
    listed and not listed full, score_mod those allowed. Neither ever sees another position.
    """
    query, key, value, scale, out_dtype = _prepare(query, key, value, scale)
    shape = *query.shape[:3], key.shape[2]
    allowed = _allowed(mask_mod, query.dtype, *_blocks(blocks, shape, query.device))

    score = _scores(query, key, score_mod, scale, allowed)
    if (score == -INF).any():
        # a score of -inf is a masked position: ask again without it, so that no gradient passes through it
        allowed = allowed.masked_scatter(allowed, score != -INF)
        score = _scores(query, key, score_mod, scale, allowed)

    # one of -inf, which takes no weight, beside those that there are
    sinks = torch.cat([query.new_full((shape[1], 1), -INF), *([] if sink is None else [_by_head(sink, query)])], 1)
    row_max = torch.maximum(_row_max(score.detach(), allowed), _nan_if_infinite(sinks.detach().amax(1))[:, None])
    b, h, q_idx, _ = allowed.nonzero(as_tuple=True)
    weight = query.new_zeros(shape).masked_scatter(allowed, torch.exp(score - row_max[b, h, q_idx]))
    nothing = row_max == -INF
    sunk = torch.exp(sinks[:, None] - row_max.masked_fill(nothing, 0.0)[..., None]).sum(-1)
    row_sum = torch.where(nothing, 1.0, weight.sum(-1) + sunk)
    if _finite(value, score):
        out = torch.einsum("bhls,bhse->bhle", weight, value)
    else:
        out = torch.einsum("bhls,bhlse->bhle", weight, _as_seen(value, allowed))
    return Result((out / row_sum[..., None]).to(out_dtype), row_max + torch.log(row_sum), row_max)


def _scores(query: Tensor, key: Tensor, score_mod: Callable | None, scale: float, allowed: Tensor) -> Tensor:
    """The score of each allowed position, flat (N,), in the order of `allowed.nonzero()`."""
    if _finite(query, key):
        products = torch.einsum("bhle,bhse->bhls", query, key)
    else:
        products = torch.einsum("bhle,bhlse->bhls", query, _as_seen(key, allowed))
    score = scale * products.masked_select(allowed)
    if score_mod is None:
        return score
    return _ask(score_mod, score.dtype, allowed, score).to(score.dtype)


def _by_head(sink: Tensor, query: Tensor) -> Tensor:
    """The sinks (Hq, n), in the accumulation type."""
    return (sink[:, None] if sink.dim() == 1 else sink).to(query.dtype)


def _as_seen(rows: Tensor, allowed: Tensor) -> Tensor:
    """Rows of key or value (B, Hq, S, E) as each query sees them (B, Hq, L, S, E): masked ones are 0.

    Needed only where something is not finite, because a weight of 0 times NaN is NaN.
    """
    return torch.where(allowed[..., None], rows[:, :, None], 0.0)


def _allowed(mask_mod: Callable | None, acc: torch.dtype, listed: Tensor, full: Tensor) -> Tensor:
    """Listed, and (listed full, or mask_mod says so): bool (B, Hq, L, S)."""
    if mask_mod is None:
        return listed
    asked = listed & ~full
    return listed.masked_scatter(asked, _ask(mask_mod, acc, asked))


def _ask(mod: Callable, acc: torch.dtype, where: Tensor, *score: Tensor) -> Tensor:
    """A mod's answer for all positions where `where` is true, flat (N,), in the order of `where.nonzero()`."""
    at = where.nonzero(as_tuple=True)
    if len(at[0]) == 0:
        return score[0] if score else where[where]
    # the mod may change its own arguments in place
    return at_each_position(mod, acc)(*(x.clone() for x in score), *at)


def at_each_position(mod: Callable, acc: torch.dtype) -> Callable:
    """The mod for many positions: given flat tensors (N,), it sees 0-d tensors of one position, and answers with (N,)."""

    def at_one(*arguments: Tensor) -> Tensor:
        with OneShape(), OneFloat(acc):
            answer = mod(*arguments)
        # score_mod is given one argument more
        return torch.as_tensor(answer if len(arguments) == 5 else _truth(answer), device=arguments[0].device)

    return follow(torch.vmap(at_one))


def _row_max(score: Tensor, allowed: Tensor) -> Tensor:
    """The greatest allowed score of each row (B, Hq, L): -inf if there is none, NaN if one is NaN or +inf."""
    dense = score.new_full(allowed.shape, -INF).masked_scatter(allowed, score)
    if dense.shape[-1] == 0:
        return dense.sum(-1) - INF
    return _nan_if_infinite(dense.amax(-1))


def _nan_if_infinite(row_max: Tensor) -> Tensor:
    return torch.where(row_max == INF, NAN, row_max)


def _finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _truth(result: object) -> bool | Tensor:
    """A mask_mod's answer: a Python bool or a bool tensor."""
    if isinstance(result, bool) or isinstance(result, Tensor) and result.dtype == torch.bool:
        return result
    kind = result.dtype if isinstance(result, Tensor) else type(result).__name__
    raise TypeError(
        f"mask_mod returned {kind}, not a bool. Return a comparison; write `==`, `!=` or torch.logical_not "
        "where `~` or arithmetic made a number of it"
    )


def _blocks(blocks: tuple[Tensor, Tensor] | None, shape: tuple[int, ...], device) -> tuple[Tensor, Tensor]:
    """(listed, full) as bool (B, Hq, L, S). Without a block mask everything is listed and nothing is full."""
    if blocks is None:
        everything = torch.ones(shape, dtype=torch.bool, device=device)
        return everything, ~everything
    return blocks[0].expand(shape), blocks[1].expand(shape)


def _prepare(query: Tensor, key: Tensor, value: Tensor, scale: float | None):
    """Query, key, value in the accumulation type, all with B batches and Hq heads; the scale; out's dtype."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dtype not in ACC_DTYPE:
            raise TypeError(f"{name} is {tensor.dtype}; use float16, bfloat16, float32 or float64")
    B, H, _, E = query.shape
    if key.shape[:3] != value.shape[:3] or key.shape[3] != E:
        shapes = f"key {tuple(key.shape)} and value {tuple(value.shape)}"
        raise ValueError(f"{shapes} do not agree, or key's head size is not query's {E}")
    if key.shape[0] not in (1, B) or key.shape[1] == 0 or H % key.shape[1]:
        heads = f"key's batch and heads {tuple(key.shape[:2])} do not go with query's {(B, H)}"
        raise ValueError(f"{heads}: its batch is 1 or equal, its heads divide query's")
    acc = ACC_DTYPE[query.dtype]
    # head h of the query reads head h // group of key and value
    group = H // key.shape[1]
    key, value = (x.to(acc).repeat_interleave(group, 1).expand(B, -1, -1, -1) for x in (key, value))
    scale = 1 / math.sqrt(E) if scale is None else scale
    return query.to(acc), key, value, scale, query.dtype
