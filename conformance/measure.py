"""How far rounding moves a score_mod: it is run in the accumulation type on scores moved by their own error."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flexref.conformance.call import Call, Positions
from flexref.conformance.rounding import Rounding, finite
from flexref.reference import at_each_position

Index = tuple[Tensor, Tensor, Tensor, Tensor]


class Mod(NamedTuple):
    """score_mod at the allowed positions, flat: its value and slope, and what rounding does to each."""

    post: Tensor
    slope: Tensor
    post_error: Tensor
    slope_error: Tensor


class Run:
    """score_mod once, on flat scores, with its own leaves for whatever it reads."""

    def __init__(self, call: Call, score: Tensor, index: Index, dtype: torch.dtype):
        self.score = score.detach().to(dtype).requires_grad_()
        floats = {name: t for name, t in call.captured.items() if t.is_floating_point()}
        self.leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in floats.items()}
        post = self.score
        if call.make_score:
            if len(score):
                mod = call.make_score(call.captured | self.leaves)
                post = at_each_position(mod, dtype)(self.score, *index)
        self.post = post.to(dtype)

    def pull(self, cotangent: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        """What `cotangent` (N,) of the result is for each leaf, in float64."""
        zeros = [torch.zeros_like(x, dtype=torch.float64) for x in leaves]
        if not self.post.requires_grad:
            return zeros
        grads = torch.autograd.grad(
            self.post, leaves, cotangent.to(self.post.dtype), retain_graph=True, allow_unused=True
        )
        return [zero if g is None else g.to(torch.float64) for g, zero in zip(grads, zeros, strict=True)]


def _signs(n: int) -> list[Tensor]:
    """All up, all down, and each at random: a kink within reach of a score is crossed by one of the first two."""
    random = torch.Generator().manual_seed(0)
    mixed = [torch.randint(0, 2, (n,), generator=random) * 2.0 - 1 for _ in range(2)]
    return [torch.ones(n), -torch.ones(n), *mixed]


def measure(call: Call, positions: Positions, r: Rounding, doubt: Tensor) -> Mod:
    """score_mod's value and slope at the exact scores, and how far both are off in the accumulation type."""
    exact = Run(call, positions.score, positions.index, torch.float64)
    post, slope = exact.post.detach(), exact.pull(torch.ones_like(exact.post), [exact.score])[0]
    post_off, slope_off = torch.zeros_like(post), torch.zeros_like(post)
    for sign in _signs(len(post)):
        run = Run(call, positions.score + sign * doubt, positions.index, r.acc)
        moved = run.pull(torch.ones_like(run.post), [run.score])[0]
        post_off = torch.maximum(post_off, (run.post.detach() - post).abs())
        slope_off = torch.maximum(slope_off, (moved - slope).abs())
    slope, slope_off = finite(slope), finite(slope_off)
    return Mod(post, slope, finite(2 * post_off), 2 * slope_off + 2 * r.u * slope.abs())
