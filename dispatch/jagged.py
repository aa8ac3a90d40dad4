"""Jagged nested tensors (B, H, S*, E) as one batch of packed tokens, and results as jagged tensors again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexref.blocks.nested import jagged_offsets
from flexref.blocks.packed import Packed, PackedScore, Places, places
from flexref.contents import Contents
from flexref.recent import Recent

_places = Recent(32)


class PackedCall(NamedTuple):
    """The arguments of a call that sees packed tokens; `offsets`: where the sequences of the query begin."""

    query: Tensor
    key: Tensor
    value: Tensor
    score_mod: Callable | None
    mask_mod: Callable | None
    offsets: Tensor

    def jagged(self, x: Tensor | None) -> Tensor | None:
        """A result (1, H, tokens) or (1, H, tokens, Ev) as the jagged tensor (B, H, S*) or (B, H, S*, Ev)."""
        if x is None:
            return None
        by_token = x[0].transpose(0, 1)
        return torch.nested.nested_tensor_from_jagged(by_token, self.offsets).transpose(1, 2)


def is_jagged(*inputs: Any) -> bool:
    """Whether any of query, key and value is a jagged nested tensor."""
    return any(isinstance(x, Tensor) and x.is_nested and x.layout == torch.jagged for x in inputs)


def packed_call(query: Any, key: Any, value: Any, score_mod: Callable | None, block_mask: Any, mask_mod: Any) -> PackedCall:
    """Of jagged query, key and value; the mods are written for one sequence, a block_mask for the packed tokens.

    Raises TypeError where one of the three is not jagged, ValueError where they do not fit together.
    """
    named = {"query": query, "key": key, "value": value}
    dense = [name for name, x in named.items() if not is_jagged(x)]
    if dense:
        jagged = ", ".join(name for name in named if name not in dense)
        raise TypeError(f"{jagged} is a jagged nested tensor but {dense[0]} is not; all three must be, or none.")
    for name, x in named.items():
        if x.dim() != 4 or x._ragged_idx != 2:
            hint = "nt.unflatten(-1, (heads, E)).transpose(1, 2) makes it of (B, S*, heads * E)"
            raise ValueError(f"{name} must be jagged with the shape (B, H, S*, E), got {tuple(x.shape)}; {hint}.")
    q_offsets, kv_offsets, value_offsets = (jagged_offsets(name, x) for name, x in named.items())
    if len(q_offsets) != len(kv_offsets):
        raise ValueError(f"query has {len(q_offsets) - 1} sequences and key {len(kv_offsets) - 1}: they must be as many.")

    def check() -> None:
        for name, offsets in (("query", q_offsets), ("key", kv_offsets)):
            check_offsets(f"{name}.offsets()", offsets, name, named[name].values().shape[1])
        if not torch.equal(kv_offsets, value_offsets):
            raise ValueError("key and value must have sequences of the same lengths.")

    if value.offsets() is not key.offsets():
        check()
    at = kept_places(query.offsets(), key.offsets(), None, (query.values().shape[1], key.values().shape[1]), check)
    if mask_mod is not None or block_mask is None:
        mask_mod = Packed(mask_mod, at)
    else:
        _check_block_mask(block_mask, at)
    score_mod = None if score_mod is None else PackedScore(score_mod, at)
    query, key, value = (x.values()[None] for x in named.values())
    return PackedCall(query, key, value, score_mod, mask_mod, named["query"].offsets())


def _check_block_mask(block_mask: Any, at: Places) -> None:
    """Raise ValueError for a block mask of other documents."""
    mod = getattr(block_mask, "mask_mod", None)
    if not isinstance(mod, Packed) or not all(map(torch.equal, mod.at, at)):
        raise ValueError(
            "block_mask is not one of create_nested_block_mask for sequences of these lengths: make it of these tensors, or pass "
            "the mask_mod of one sequence as mask_mod."
        )


def check_offsets(name: str, offsets: Tensor, of: str, tokens: int) -> None:
    """Raise ValueError unless they are running sums of lengths, from 0 to the tokens of `of`; waits for the device."""
    found = offsets.tolist()
    falls = next((i for i in range(1, len(found)) if found[i] < found[i - 1]), None)
    if falls is not None:
        step = f"{found[falls - 1]} to {found[falls]} at {falls}"
        raise ValueError(f"{name} falls from {step}; it must be running sums of lengths.")
    if found[0] != 0 or found[-1] != tokens:
        raise ValueError(
            f"{name} runs from {found[0]} to {found[-1]}; it must run from 0 to the number of tokens of {of}, {tokens}."
        )


def kept_places(
    q_offsets: Tensor, kv_offsets: Tensor, causal: str | None, tokens: tuple[int, int], check: Callable[[], Any]
) -> Places:
    """The places of documents, the same tensors as long as the offsets are the same: what is kept by them stays.

    `check` is called once for the same numbers and tokens; it may wait for the device.
    """
    given = q_offsets, kv_offsets

    def make():
        check()
        return places(q_offsets.long(), kv_offsets.long(), causal), Contents(given)

    key = id(q_offsets), id(kv_offsets), causal, tokens
    return _places.get(key, make, keep_alive=given, fits=lambda known: known[1].same(given))[0]
