"""Masks of sequences that are made of parts: packed documents, shared prefixes, trees, images beside text, noised copies."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flexref.blocks.mask_mods import MaskMod
from flexref.program.mod_objects import name_of
from flexref.variants.checks import count, integers, lengths_of, parents_of, placed


class document(MaskMod):
    """Query and key of one document; `ids` is an integer tensor (L,), or (B, L) with other documents in each batch."""

    def __init__(self, ids: Tensor):
        self.ids = integers("ids", ids, (1, 2))

    def __call__(self, b, h, q_idx, kv_idx):
        if self.ids.dim() == 2:
            return self.ids[b, q_idx] == self.ids[b, kv_idx]
        return self.ids[q_idx] == self.ids[kv_idx]


class per_document(MaskMod):
    """`mask_mod` within each of the documents packed one behind another; it sees positions counted from where that begins.

    `lengths`: how many tokens each has, ints or an integer tensor (documents,).
    """

    def __init__(self, mask_mod: Callable, lengths: Sequence[int] | Tensor, device: torch.device | str | None = None):
        self.mod = _mask_mod("mask_mod", mask_mod)
        counts = lengths_of("lengths", lengths)
        device = lengths.device if isinstance(lengths, Tensor) and device is None else device
        self.ids = placed(document_ids(counts), device)
        self.begin = placed(document_offsets(counts)[:-1].repeat_interleave(counts), device)

    def _text(self) -> str:
        return f"per_document({name_of(self.mod)}, tokens={len(self.ids)})"

    def __call__(self, b, h, q_idx, kv_idx):
        same = self.ids[q_idx] == self.ids[kv_idx]
        return same & self.mod(b, h, q_idx - self.begin[q_idx], kv_idx - self.begin[kv_idx])


class per_chunk(MaskMod):
    """`mask_mod` within each chunk of `size` positions, which it sees as 0 to size - 1: batches folded into one sequence."""

    def __init__(self, mask_mod: Callable, size: int):
        self.mod, self.size = _mask_mod("mask_mod", mask_mod), count("size", size, 1)

    def __call__(self, b, h, q_idx, kv_idx):
        same = q_idx // self.size == kv_idx // self.size
        return same & self.mod(b, h, q_idx % self.size, kv_idx % self.size)


class after_prefix(MaskMod):
    """All see the first `length` keys; `mask_mod` says what they see of the others, and counts these from 0.

    `length` is an int, or an integer tensor (B,). With `tree` a draft is verified behind a cache; with `causal & chunked(n)`
    blocks of n drafted tokens are trained, each seeing the prefix and itself. JetSpec, 2026.
    """

    def __init__(self, mask_mod: Callable, length: int | Tensor):
        self.mod = _mask_mod("mask_mod", mask_mod)
        self.length = integers("length", length, (1,)) if isinstance(length, Tensor) else count("length", length)

    def __call__(self, b, h, q_idx, kv_idx):
        length = self.length[b] if isinstance(self.length, Tensor) else self.length
        before = kv_idx < length
        return before | self.mod(b, h, q_idx, torch.where(torch.as_tensor(before), 0, kv_idx - length))


class tree(MaskMod):
    """Each node of a tree sees itself and its ancestors: entry[kv_idx] <= entry[q_idx] < end[kv_idx].

    `parents`: of each node its parent, which comes before it, or -1 for a root; ints, or an integer tensor (N,). A walk through
    the tree, each node followed by what is below it, enters node n as the entry[n]-th and has left it before the end[n]-th. As
    in speculative decoding: SpecInfer, Miao et al., 2023.
    """

    def __init__(self, parents: Sequence[int] | Tensor, device: torch.device | str | None = None):
        device = parents.device if isinstance(parents, Tensor) and device is None else device
        entry, end = _walk(parents_of("parents", parents))
        self.entry, self.end = placed(entry, device), placed(end, device)

    def __call__(self, b, h, q_idx, kv_idx):
        at = self.entry[q_idx]
        # an ancestor comes before, which the numbers say too, but not of whole blocks
        return (kv_idx <= q_idx) & (self.entry[kv_idx] <= at) & (at < self.end[kv_idx])


class shared_prefix(MaskMod):
    """Packed documents that continue others: a token sees its own causally, and all of those that it continues.

    `lengths`: tokens of each document, `parents`: which one it continues, as in `tree`; ints, or integer tensors (documents,).
    A prompt with many answers is a root with many children. By document d of the token: causal and entry[d(kv)] <= entry[d(q)]
    < end[d(kv)]. Juravsky et al., Hydragen, 2024.
    """

    def __init__(
        self, lengths: Sequence[int] | Tensor, parents: Sequence[int] | Tensor, device: torch.device | str | None = None
    ):
        counts = lengths_of("lengths", lengths)
        device = lengths.device if isinstance(lengths, Tensor) and device is None else device
        found = parents_of("parents", parents)
        if len(found) != len(counts):
            raise ValueError(f"parents must have one for each of {len(counts)} documents, got {len(found)}")
        self.entry, self.end = (placed(x.repeat_interleave(counts.cpu()), device) for x in _walk(found))

    def __call__(self, b, h, q_idx, kv_idx):
        at = self.entry[q_idx]
        return (kv_idx <= q_idx) & (self.entry[kv_idx] <= at) & (at < self.end[kv_idx])


class vision_cross(MaskMod):
    """Text that sees images, of `tokens` keys each: image = kv_idx // tokens, allowed where first[image] <= q_idx < last[image].

    `intervals`: of each image the text positions that see it, [first, last), an integer tensor (images, 2), or (B, images, 2).
    Keys behind the last image are seen by none. Alayrac et al., Flamingo, 2022.
    """

    def __init__(self, intervals: Tensor, tokens: int):
        self.intervals, self.tokens = integers("intervals", intervals, (2, 3)), count("tokens", tokens, 1)
        if intervals.shape[-1] != 2 or not intervals.shape[-2]:
            raise ValueError(f"intervals must be of shape (images, 2) with at least one image, got {tuple(intervals.shape)}")

    def __call__(self, b, h, q_idx, kv_idx):
        images, image = self.intervals.shape[-2], kv_idx // self.tokens
        image = torch.minimum(image, image * 0 + images - 1) if isinstance(image, Tensor) else min(image, images - 1)
        at = (b, image) if self.intervals.dim() == 3 else (image,)
        seen = (self.intervals[(*at, 0)] <= q_idx) & (q_idx < self.intervals[(*at, 1)])
        return (kv_idx < images * self.tokens) & seen


class block_diffusion(MaskMod):
    """A noised copy of `length` tokens and behind it the clean one, in blocks of `size`: 2 * length positions.

    A noised token sees the noised ones of its own block and the clean ones of blocks before it; a clean token the clean ones of
    its own block and those before. Positions past both see, and are seen by, none. Arriola et al., Block Diffusion (BD3-LM),
    2025.
    """

    def __init__(self, length: int, size: int):
        self.length, self.size = count("length", length), count("size", size, 1)

    def __call__(self, b, h, q_idx, kv_idx):
        length, size = self.length, self.size
        q_noised, q_clean = q_idx < length, (q_idx >= length) & (q_idx - length < length)
        kv_noised, kv_clean = kv_idx < length, (kv_idx >= length) & (kv_idx - length < length)
        q_block, kv_clean_block = q_idx // size, (kv_idx - length) // size
        own = q_noised & kv_noised & (q_block == kv_idx // size)
        earlier = q_noised & kv_clean & (kv_clean_block < q_block)
        return own | earlier | (q_clean & kv_clean & (kv_clean_block <= (q_idx - length) // size))


def document_ids(lengths: Sequence[int] | Tensor) -> Tensor:
    """Documents of these lengths packed one behind the other, as `document` takes them: int64 (sum of lengths,)."""
    counts = _counts(lengths)
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


def document_offsets(lengths: Sequence[int] | Tensor) -> Tensor:
    """Where each document begins, and at the end where the last one ends: int64 (documents + 1,)."""
    counts = _counts(lengths)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _counts(lengths: Sequence[int] | Tensor) -> Tensor:
    # as_tensor would move a tensor to the default device
    return lengths.long() if isinstance(lengths, Tensor) else torch.as_tensor(lengths, dtype=torch.int64)


def _walk(parents: list[int]) -> tuple[Tensor, Tensor]:
    """The number at which each node is entered when children follow their parent at once, and where its subtree ends."""
    below = [1] * len(parents)
    for node in reversed(range(len(parents))):
        if parents[node] >= 0:
            below[parents[node]] += below[node]
    # where the next child enters; that of no node, the next root
    following, entry = [0] * (len(parents) + 1), [0] * len(parents)
    for node, parent in enumerate(parents):
        entry[node] = following[parent]
        following[parent] += below[node]
        following[node] = entry[node] + 1
    ends = [first + n for first, n in zip(entry, below, strict=True)]
    return torch.tensor(entry, dtype=torch.int64, device="cpu"), torch.tensor(ends, dtype=torch.int64, device="cpu")


def _mask_mod(name: str, mod: Callable) -> Callable:
    if not callable(mod):
        raise TypeError(f"{name} must be a mask_mod(b, h, q_idx, kv_idx), got {type(mod).__name__}")
    return mod
