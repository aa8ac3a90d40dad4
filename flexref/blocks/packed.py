"""Documents that lie one behind another in packed tokens: where each begins, and mods that see one document alone.

Every number here belongs to a query token, so that a kernel reads it once a row, and a range of keys is two comparisons.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexref.blocks.mask_mods import MaskMod
from flexref.program.mod_objects import CallableMod

ALIGNMENTS = (None, "start", "end")


class Places(NamedTuple):
    """For each query token, int64 (tokens,): the number of its document, where that begins among the queries and among the
    keys, and where the keys end that the token may attend to."""

    document: Tensor
    q_start: Tensor
    kv_start: Tensor
    kv_stop: Tensor


def places(q_offsets: Tensor, kv_offsets: Tensor, causal: str | None = None) -> Places:
    """Of documents whose tokens begin at `offsets`, int64 (documents + 1,), the last one of which is the number of tokens.

    causal "start": a query attends to no key behind its own place; "end": the last query of a document has its last key's.
    """
    q_lengths, kv_lengths = q_offsets.diff(), kv_offsets.diff()
    document = torch.repeat_interleave(torch.arange(len(q_lengths), device=q_offsets.device), q_lengths)
    q_start, kv_start, kv_stop = (x[document] for x in (q_offsets[:-1], kv_offsets[:-1], kv_offsets[1:]))
    if causal is not None:
        place = torch.arange(len(document), device=document.device) - q_start
        if causal == "end":
            place = place + (kv_lengths - q_lengths)[document]
        kv_stop = torch.minimum(kv_stop, kv_start + place + 1)
    return Places(document, q_start, kv_start, kv_stop)


class _OfDocuments(CallableMod):
    """A mod of one document among packed tokens: it sees the document's number as b, and positions counted from its begin."""

    def __init__(self, mod: Callable | None, at: Places):
        self.mod = mod
        self.document, self.q_start, self.kv_start, self.kv_stop = at

    @property
    def at(self) -> Places:
        """Where the documents are."""
        return Places(self.document, self.q_start, self.kv_start, self.kv_stop)

    def local(self, q_idx: Any, kv_idx: Any) -> tuple[Any, Any, Any]:
        """(b, q_idx, kv_idx) of the document; a key that is not its own has a place that there is, for there it may be read."""
        # no mod is told about a document without keys, but the least place is 0
        last, first = self.kv_stop[q_idx] - 1, self.kv_start[q_idx]
        own = torch.clamp_min(torch.where(kv_idx < last, kv_idx, last) - first, 0)
        return self.document[q_idx], q_idx - self.q_start[q_idx], own


class Packed(_OfDocuments, MaskMod):
    """A mask_mod of one document, or None, that lets each document attend to itself alone."""

    def __call__(self, b, h, q_idx, kv_idx):
        own = (kv_idx >= self.kv_start[q_idx]) & (kv_idx < self.kv_stop[q_idx])
        if self.mod is None:
            return own
        document, q_place, kv_place = self.local(q_idx, kv_idx)
        return own & self.mod(document, h, q_place, kv_place)


class PackedScore(_OfDocuments):
    """A score_mod of one document."""

    def __call__(self, score, b, h, q_idx, kv_idx):
        assert self.mod is not None
        document, q_place, kv_place = self.local(q_idx, kv_idx)
        return self.mod(score, document, h, q_place, kv_place)
