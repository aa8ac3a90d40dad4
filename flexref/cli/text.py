"""The demo's input: topics of Python's own language reference as byte tokens with fixed embeddings."""
from __future__ import annotations

import random
from typing import NamedTuple

import torch
from torch import Tensor

SEED = 0


class Inputs(NamedTuple):
    """query, key, value (B, H, L, D) float32, and the lengths of the documents in them, in order.

    A packed sequence has B = 1 and the documents end to end; a batch has one document a row, padded at its end.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    lengths: tuple[int, ...]


def documents(length: int) -> list[bytes]:
    """Whole topics in a fixed order, at least `length` bytes together, none above a quarter of that.

    Raises RuntimeError where this Python comes without `pydoc_data.topics`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise RuntimeError(
            "the demo reads pydoc_data.topics, which this Python lacks; install the full standard library"
        ) from error
    texts = [topics[name].encode() for name in sorted(topics)]
    texts = [text for text in texts if len(text) <= max(length // 4, 512)]
    random.Random(SEED).shuffle(texts)
    chosen: list[bytes] = []
    while sum(map(len, chosen)) < length:
        chosen.append(texts[len(chosen) % len(texts)])
    return chosen


def packed(texts: list[bytes], heads: int, head_dim: int) -> Inputs:
    """One sequence of all documents: B = 1, L = the sum of their lengths."""
    tokens = torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)[None]
    return _embedded(tokens, heads, head_dim, texts)


def batched(texts: list[bytes], heads: int, head_dim: int) -> Inputs:
    """One document a row: B = their number, L = the longest; the padding is token 0."""
    longest = max(map(len, texts))
    rows = [torch.frombuffer(bytearray(text.ljust(longest, b"\0")), dtype=torch.uint8) for text in texts]
    return _embedded(torch.stack(rows), heads, head_dim, texts)


def _embedded(tokens: Tensor, heads: int, head_dim: int, texts: list[bytes]) -> Inputs:
    """Each byte, and each position through waves, has a fixed random vector for each of query, key and value."""
    generator = torch.Generator().manual_seed(SEED)
    position = torch.arange(tokens.shape[1])[:, None] / 10000 ** torch.linspace(0, 1, head_dim // 2)
    waves = torch.cat([position.sin(), position.cos()], 1)
    made = []
    for _ in range(3):
        table = torch.randn(256, heads, head_dim, generator=generator)
        turn = torch.randn(waves.shape[1], heads * head_dim, generator=generator) / waves.shape[1] ** 0.5
        x = table[tokens.int()] + (waves @ turn).view(-1, heads, head_dim)
        made.append(x.transpose(1, 2).contiguous())
    return Inputs(*made, lengths=tuple(map(len, texts)))
