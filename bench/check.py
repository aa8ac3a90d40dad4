"""The comparison that a backend must pass before it is timed."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import flexref
from bench.cases import Variant, variants
from flexref.cli.cases import Case
from flexref.cli.judge import judge
from flexref.cli.text import Inputs as Text
from flexref.conformance.compare import Call, expectations

SMALL = 330
INPUTS = ("query", "key", "value")
Inputs = tuple[Tensor, Tensor, Tensor]


def complaint(variant: Variant, inputs: Inputs, backend: str, gradients: bool) -> str:
    """Why this variant may not be timed with this backend; "" means that it may.

    Two comparisons by the conformance suite's budget: every element of a small problem, with gradients if they are to
    be timed, and sampled rows of the very call that is timed.
    """
    try:
        attention = partial(flexref.flex_attention, return_lse=True, backend=backend)
        small(variants(inputs[0].shape[1], SMALL)[variant.name], inputs[0], attention, gradients)
        mask = block_mask(variant, inputs[0].shape[2])
        out = flexref.flex_attention(*inputs, variant.score_mod, mask, backend=backend)
    except (AssertionError, flexref.FlexrefError, ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    case = Case(variant.name, Text(*inputs, lengths=()), score=variant.score, allowed=variant.allowed)
    return judge(case, out).complaint


def block_mask(variant: Variant, length: int, device: torch.device | str = "cpu") -> flexref.BlockMask | None:
    """The variant's BlockMask for L = S = `length`."""
    if variant.mask_mod is None:
        return None
    return flexref.create_block_mask(variant.mask_mod, None, None, length, length, device=device)


def small(variant: Variant, like: Tensor, attention: Callable, gradients: bool) -> None:
    """Every element of L = S = SMALL, for which `variant` was made, in the heads, width, dtype and device of `like`.

    `attention(query, key, value, score_mod, block_mask)` gives out and lse. Raises AssertionError that names the worst element.
    """
    heads, width, device = like.shape[1], like.shape[3], like.device
    generator = torch.Generator().manual_seed(3)
    query, key, value, grad_out = (
        torch.randn(1, heads, SMALL, width, generator=generator).to(like.dtype) for _ in range(4)
    )
    score = variant.score
    call = Call(
        query,
        key,
        value,
        make_score=None if score is None else lambda _: score,
        mask_mod=variant.allowed,
        wanted=INPUTS if gradients else (),
        grad_out=grad_out if gradients else None,
    )
    leaves = tuple(x.to(device, copy=True).requires_grad_(gradients) for x in (query, key, value))
    out, lse = attention(*leaves, variant.score_mod, block_mask(variant, SMALL, device))
    results = {"out": out, "lse": lse}
    if gradients:
        out.backward(grad_out.to(device))
        results |= {f"grad {name}": leaf.grad for name, leaf in zip(INPUTS, leaves, strict=True)}
    expected = expectations(call)
    for what, result in results.items():
        assert result is not None, f"{what}: no gradient"
        expected[what].judge(result.cpu())
