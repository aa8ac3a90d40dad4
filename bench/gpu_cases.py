"""What is timed on a GPU, and what is asked of each engine on an H100 or H200. Tokens B x S are 16k, the width H x D is 2048."""
from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from bench.cases import Target, Variant
from flexref.cli.cases import CAP, alibi, before, capped, prefixed, same
from flexref.program.mod_objects import moved
from flexref.variants import masks, score_mods

TOKENS, WIDTH, WINDOW = 16384, 2048, 1024
LENGTHS, DIMS = (1024, 2048, 4096, 8192, 16384, 32768), (64, 128, 256)
# bytes of keys and values of a decoding step
DECODE_BYTES, DECODE_LENGTHS = (32 << 20, 256 << 20, 1 << 30), (8192, 65536)
# more than any cache holds
COLD_BYTES = 256 << 20

# each beside what was measured in the same run
TARGETS: dict[str, tuple[Target, ...]] = {
    "triton": (
        Target("forward / torch flex: geometric mean", 1.15),
        Target("backward / torch flex: geometric mean", 1.2),
        Target("forward / FlashAttention-2: geometric mean", 1.0),
        Target("backward / FlashAttention-2: geometric mean", 0.95),
        Target("decode / copy: geometric mean", 0.8),
    ),
    "cupy": (
        Target("forward / FlashAttention-2: geometric mean", 0.9),
        Target("backward / FlashAttention-2: geometric mean", 0.6),
    ),
    "numba_cuda": (
        Target("forward / FlashAttention-2: geometric mean", 0.4),
        Target("forward float32, D 128, full", 12.0, "TFLOP/s"),
    ),
}


def variants(heads: int, length: int, device: str) -> dict[str, Variant]:
    """The seven; the documents are four of unequal length, the prefix is an eighth."""
    cuts = [0, length // 7, length // 3, 3 * length // 5, length]
    lengths = tuple(end - start for start, end in pairwise(cuts))
    prefix = max(1, length // 8)
    found = (
        Variant("full"),
        Variant("causal", mask_mod=masks.causal, allowed=before),
        Variant("window 1024", mask_mod=masks.sliding_window(WINDOW), allowed=_near),
        Variant("document", mask_mod=masks.document(masks.document_ids(list(lengths))), allowed=same(lengths)),
        Variant("ALiBi", score_mods.alibi(heads), score=alibi(heads)),
        Variant("soft-cap", score_mods.soft_cap(CAP), score=capped),
        Variant("PrefixLM", mask_mod=masks.prefix_lm(prefix), allowed=prefixed(prefix)),
    )
    return {v.name: Variant(v.name, _at(v.score_mod, device), _at(v.mask_mod, device), v.score, v.allowed) for v in found}


def _near(b, h, i, j):
    return (j <= i) & (i - j < WINDOW)


def _at(mod: Callable | None, device: str) -> Callable | None:
    return None if mod is None else moved(mod, torch.device(device))


def density(variant: Variant, length: int) -> float:
    """The share of positions that are allowed, from 256 rows spread evenly."""
    if variant.allowed is None:
        return 1.0
    rows = torch.linspace(0, length - 1, min(length, 256)).long()
    return float(variant.allowed(0, 0, rows[:, None], torch.arange(length)).double().mean())


def shape(length: int, dim: int) -> tuple[int, int, int, int]:
    """(B, H, S, D)."""
    return max(1, TOKENS // length), WIDTH // dim, length, dim
