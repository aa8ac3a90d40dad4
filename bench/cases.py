"""What is timed, and what is asked of it. Sizes: B 1, H 8, S 2048, D 64 unless a target says otherwise."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from bench.documents import ASKED, AT_LEAST
from bench.masks import ROWS, STEPS, target_names
from flexref.cli.cases import CAP, WINDOW, alibi, before, capped, near, same
from flexref.variants import masks, score_mods


@dataclass(frozen=True)
class Target:
    """A number that is asked for: `value` is at least (or with `at_most`, at most) `asked`."""

    name: str
    asked: float
    unit: str = "x"
    at_most: bool = False

    def met(self, value: float) -> bool:
        """Whether `value` is on the right side of what is asked."""
        return value <= self.asked if self.at_most else value >= self.asked


TARGETS = {
    target.name: target
    for target in (
        Target("forward float32 / torch flex: geometric mean", 1.8),
        Target("forward float32 / torch flex: least variant", 1.3),
        Target("forward bfloat16 / torch flex: geometric mean", 2.0),
        Target("forward / SDPA: full", 0.95),
        Target("forward / SDPA: causal", 1.05),
        Target("forward / SDPA with a dense mask: window 256", 6.0),
        Target("forward + backward / SDPA: causal", 1.0),
        Target("forward + backward / SDPA with a dense mask: window 256", 5.0),
        Target("first call of a new mod", 1.5, "s", at_most=True),
        Target("first call with an empty cache, drivers and all", 1.5, "s", at_most=True),
        Target("first call from the disk cache in a new process, over the import", 0.3, "s", at_most=True),
        Target("import flexref over import torch", 0.15, "s", at_most=True),
        Target("fixed cost of a call, L = S = 16", 150.0, "us", at_most=True),
        Target("peak extra memory, causal forward + backward, over q, k, v, out and gradients", 2.0, "x", at_most=True),
        Target("growth of peak extra memory when S doubles", 2.3, "x", at_most=True),
        Target("two threads over one", 1.8),
        *(Target(target_names(row)[0], seconds, "s", at_most=True) for row, (_, _, seconds, _) in ROWS.items()),
        *(Target(target_names(row)[1], memory, "MB", at_most=True) for row, (*_, memory) in ROWS.items() if memory is not None),
        *(Target(step, 50.0, "us", at_most=True) for step in STEPS),
        *(Target(name, asked, at_most=name not in AT_LEAST) for name, asked in ASKED.items()),
        Target("causal as a score_mod / causal as a mask, 17,797 tokens", 1.1, at_most=True),
    )
}


@dataclass(frozen=True)
class Variant:
    """The mods, and the same as the demo's plain formulas `score` and `allowed`, which judge them."""

    name: str
    score_mod: Callable | None = None
    mask_mod: Callable | None = None
    score: Callable | None = None
    allowed: Callable | None = None


def variants(heads: int, length: int) -> dict[str, Variant]:
    """The six of the targets; the documents are four of unequal length."""
    cuts = [0, length // 7, length // 3, 3 * length // 5, length]
    lengths = tuple(end - start for start, end in pairwise(cuts))
    document, together = masks.document(masks.document_ids(list(lengths))), same(lengths)

    found = (
        Variant("full"),
        Variant("causal", mask_mod=masks.causal, allowed=before),
        Variant("window 256", mask_mod=masks.sliding_window(WINDOW), allowed=near),
        Variant("ALiBi + causal", score_mods.alibi(heads), masks.causal, alibi(heads), before),
        Variant("soft-cap", score_mods.soft_cap(CAP), score=capped),
        Variant(
            "document + causal",
            mask_mod=masks.and_masks(document, masks.causal),
            allowed=lambda *at: before(*at) & together(*at),
        ),
    )
    return {variant.name: variant for variant in found}
