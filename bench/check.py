"""The comparison that a backend must pass before it is timed."""
from __future__ import annotations

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
        _small(variant.name, inputs[0], backend, gradients)
        mask = block_mask(variant, inputs[0].shape[2])
        out = flexref.flex_attention(*inputs, variant.score_mod, mask, backend=backend)
    except (AssertionError, flexref.FlexrefError, ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    case = Case(variant.name, Text(*inputs, lengths=()), score=variant.score, allowed=variant.allowed)
    return judge(case, out).complaint


def block_mask(variant: Variant, length: int) -> flexref.BlockMask | None:
    """The variant's BlockMask for L = S = `length`."""
    if variant.mask_mod is None:
        return None
    return flexref.create_block_mask(variant.mask_mod, None, None, length, length, device="cpu")


def _small(name: str, like: Tensor, backend: str, gradients: bool) -> None:
    """Raises AssertionError that names the worst element."""
    heads, width = like.shape[1], like.shape[3]
    variant = variants(heads, SMALL)[name]
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
    leaves = tuple(x.clone().requires_grad_(gradients) for x in (query, key, value))
    arguments = variant.score_mod, block_mask(variant, SMALL)
    out, lse = flexref.flex_attention(leaves[0], leaves[1], leaves[2], *arguments, return_lse=True, backend=backend)
    results = {"out": out, "lse": lse}
    if gradients:
        out.backward(grad_out)
        results |= {f"grad {name}": leaf.grad for name, leaf in zip(INPUTS, leaves, strict=True)}
    expected = expectations(call)
    for what, result in results.items():
        assert result is not None, f"{what}: no gradient"
        expected[what].judge(result)
