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


def make_cases(packed: Inputs, batch: Inputs) -> list[Case]:
    """Every variant of the FlexAttention article and two combinations; all but the ragged batch on `packed`."""
    heads, length = packed.query.shape[1:3]
    prefix = length // 16
    ids = torch.repeat_interleave(torch.arange(len(packed.lengths)), torch.tensor(packed.lengths))
    lengths = torch.tensor(batch.lengths)
    alibi = score_mods.alibi(heads)
    document = masks.document(ids)
    window = masks.sliding_window(WINDOW)

    def biased(s, b, h, i, j):
        return s + torch.exp2(-8.0 * (h + 1) / heads).to(s.dtype) * (j - i)

    def capped(s, b, h, i, j):
        return CAP * torch.tanh(s / CAP)

    def before(b, h, i, j):
        return j <= i

    def near(b, h, i, j):
        return (j <= i) & (i - j < WINDOW)

    def same(b, h, i, j):
        return ids[i] == ids[j]

    def real(b, h, i, j):
        return (i < lengths[b]) & (j < lengths[b])

    def case(name: str, **parts) -> Case:
        return Case(name, packed, **parts)

    return [
        case("full"),
        case("relative position", score_mod=score_mods.relative_position, score=lambda s, b, h, i, j: s + (i - j)),
        case("ALiBi", score_mod=alibi, score=biased),
        case("soft-capping", score_mod=score_mods.soft_cap(CAP), score=capped, additive=False),
        case("causal by score_mod", score_mod=score_mods.causal, allowed=before),
        case("causal by mask", mask_mod=masks.causal, allowed=before),
        case("sliding window + causal", mask_mod=window, allowed=near),
        case("PrefixLM", mask_mod=masks.prefix_lm(prefix), allowed=lambda b, h, i, j: (j <= i) | (j < prefix)),
        case("document mask", mask_mod=document, allowed=same),
        Case("ragged batch", batch, mask_mod=masks.padded(lengths, lengths), allowed=real),
        case(
            "window + document + causal",
            mask_mod=masks.and_masks(window, document),
            allowed=lambda *at: near(*at) & same(*at),
        ),
        case(
            "soft-cap + ALiBi + document",
            score_mod=score_mods.compose(score_mods.soft_cap(CAP), alibi),
            mask_mod=document,
            score=lambda s, *at: biased(capped(s, *at), *at),
            allowed=same,
            additive=False,
        ),
    ]


def sdpa_mask(case: Case) -> Tensor | None:
    """The whole case as one dense attn_mask of SDPA, (B, H or 1, L, S) bool or float32; None where it has none."""
    if case.score is None and case.allowed is None:
        return None
    batch, heads, length = case.inputs.query.shape[:3]
    j = torch.arange(length)
    b = torch.arange(batch)[:, None, None, None]
    h = torch.arange(heads if case.score else 1)[:, None, None]
    shape = (b.shape[0], h.shape[0], length, length)
    dense = torch.empty(shape, dtype=torch.float32 if case.score else torch.bool)
    # a few rows at a time: the 64-bit indices would need many times the memory of the mask
    for rows in torch.arange(length).split(256):
        i = rows[:, None]
        if case.score:
            part = case.score(torch.zeros(()), b, h, i, j).expand(*shape[:2], len(rows), length)
            if case.allowed:
                part = part.masked_fill(~case.allowed(b, h, i, j), -torch.inf)
        else:
            assert case.allowed is not None
            part = case.allowed(b, h, i, j)
        dense[:, :, rows[0] : rows[-1] + 1] = part
    return dense


def sdpa_bytes(case: Case) -> int:
    """What that mask and SDPA's own float copy of it need."""
    batch, heads, length = case.inputs.query.shape[:3]
    elements = batch * (heads if case.score else 1) * length * length
    return elements * (4 if case.score else 5)

