"""The demo's variants: each as mods from flexref.variants, and again as a plain formula that judges them.

The formulas are written for whole index tensors that broadcast; they go through no program and no engine.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flexref.cli.text import Inputs
from flexref.variants import masks, score_mods

WINDOW, CAP = 256, 20.0


@dataclass(frozen=True)
class Case:
    """`score_mod`, `mask_mod`: what flexref is given. `score(s, b, h, i, j)`, `allowed(b, h, i, j)`: the formulas.

    `additive`: score is s plus something that does not depend on s, so that SDPA can take it as a dense bias.
    """

    name: str
    inputs: Inputs
    score_mod: Callable | None = None
    mask_mod: Callable | None = None
    score: Callable[..., Tensor] | None = None
    allowed: Callable[..., Tensor] | None = None
    additive: bool = True


def relative(s, b, h, i, j):
    """How far the key lies before the query is added."""
    return s + (i - j)


def alibi(heads: int) -> Callable[..., Tensor]:
    """The distance is subtracted, times 2^(-8/n), 2^(-16/n), ... for n heads, and 2^(-4/n), 2^(-12/n) ... for the rest.

    n is the greatest power of two that is at most `heads`.
    """
    n = 2 ** (len(bin(heads)) - 3)

    def score(s, b, h, i, j):
        power = torch.where(h < n, 8.0 * (h + 1), 8.0 * (h - n) + 4) / n
        return s + torch.exp2(-power).to(s.dtype) * (j - i)

    return score


def capped(s, b, h, i, j):
    """No score beyond CAP."""
    return CAP * torch.tanh(s / CAP)


def before(b, h, i, j):
    """Causal."""
    return j <= i


def near(b, h, i, j):
    """Causal, the last WINDOW keys."""
    return (j <= i) & (i - j < WINDOW)


def prefixed(length: int) -> Callable[..., Tensor]:
    """Causal, and all see the first `length` keys."""
    return lambda b, h, i, j: (j <= i) | (j < length)


def same(lengths: tuple[int, ...]) -> Callable[..., Tensor]:
    """Query and key are of one document of a packed sequence."""
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return lambda b, h, i, j: ids[i] == ids[j]


def real(lengths: tuple[int, ...]) -> Callable[..., Tensor]:
    """Neither query nor key is the padding of its document."""
    at = torch.tensor(lengths)
    return lambda b, h, i, j: (i < at[b]) & (j < at[b])


def make_cases(packed: Inputs, batch: Inputs) -> list[Case]:
    """Every variant of the FlexAttention article and two combinations; all but the ragged batch on `packed`."""
    heads, length = packed.query.shape[1:3]
    prefix = length // 16
    biased, together = alibi(heads), same(packed.lengths)
    slopes, cap = score_mods.alibi(heads), score_mods.soft_cap(CAP)
    document, window = masks.document(masks.document_ids(list(packed.lengths))), masks.sliding_window(WINDOW)

    def case(name: str, **parts) -> Case:
        return Case(name, packed, **parts)

    return [
        case("full"),
        case("relative position", score_mod=score_mods.relative_position, score=relative),
        case("ALiBi", score_mod=slopes, score=biased),
        case("soft-capping", score_mod=cap, score=capped, additive=False),
        case("causal by score_mod", score_mod=score_mods.causal, allowed=before),
        case("causal by mask", mask_mod=masks.causal, allowed=before),
        case("sliding window + causal", mask_mod=window, allowed=near),
        case("PrefixLM", mask_mod=masks.prefix_lm(prefix), allowed=prefixed(prefix)),
        case("document mask", mask_mod=document, allowed=together),
        Case("ragged batch", batch, mask_mod=masks.padded(torch.tensor(batch.lengths)), allowed=real(batch.lengths)),
        case(
            "window + document + causal",
            mask_mod=masks.and_masks(window, document),
            allowed=lambda *at: near(*at) & together(*at),
        ),
        case(
            "soft-cap + ALiBi + document",
            score_mod=score_mods.compose(cap, slopes),
            mask_mod=document,
            score=lambda s, *at: biased(capped(s, *at), *at),
            allowed=together,
            additive=False,
        ),
    ]


def sdpa_mask(case: Case) -> Tensor | None:
    """The whole case as one dense attn_mask of SDPA, (B or 1, H or 1, L, S) bool or float32; None where it has none."""
    if case.score is None and case.allowed is None:
        return None
    length = case.inputs.query.shape[2]
    first = _dense_rows(case, torch.arange(1))
    dense = torch.empty(*first.shape[:2], length, length, dtype=first.dtype)
    # a few rows at a time: the 64-bit indices would need many times the memory of the mask
    for rows in torch.arange(length).split(256):
        dense[:, :, rows[0] : rows[-1] + 1] = _dense_rows(case, rows)
    return dense


def sdpa_bytes(case: Case) -> int:
    """What that mask and SDPA's own float copy of it need."""
    if case.score is None and case.allowed is None:
        return 0
    row = _dense_rows(case, torch.arange(1))
    return row.numel() * case.inputs.query.shape[2] * (4 if row.is_floating_point() else 5)


def _dense_rows(case: Case, rows: Tensor) -> Tensor:
    """Some rows of the dense mask, as broad in batch and heads as the formulas make it."""
    batch, heads, length = case.inputs.query.shape[:3]
    at = torch.arange(batch)[:, None, None, None], torch.arange(heads)[:, None, None], rows[:, None], torch.arange(length)
    allowed = torch.ones((), dtype=torch.bool) if case.allowed is None else case.allowed(*at)
    if case.score is None:
        part = allowed
    else:
        part = torch.where(allowed, case.score(torch.zeros(()), *at), -torch.inf)
    return part.reshape(*(1,) * (4 - part.dim()), *part.shape)
