"""Interval analysis: never wrong, and not blind for the masks that people write."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexref.program.interval import Interval, interval
from flexref.program.intervals import EMPTY, FULL, PARTIAL, Classifier, index_ranges
from flexref.program.trace import trace

documents = torch.tensor([0] * 20 + [1] * 50 + [2] * 7 + [5] * 123)
per_batch = torch.stack([documents, documents.flip(0)])

MASKS = {
    "causal": lambda b, h, q, k: q >= k,
    "window": lambda b, h, q, k: (q >= k) & (q - k < 50),
    "document": lambda b, h, q, k: documents[q] == documents[k],
    "document_per_batch": lambda b, h, q, k: (per_batch[b, q] == per_batch[b][k]) & (q >= k) | (k < 20),
    "blocks": lambda b, h, q, k: q // 32 == k // 32,
    "stripes": lambda b, h, q, k: (q - k) % 3 == 0,
    "xor": lambda b, h, q, k: (q % 16 < 12) ^ (k > 30),
    "per_head": lambda b, h, q, k: abs(q - k) < 10 * (h + 1),
    "float": lambda b, h, q, k: q / 3.0 > k * 1.0,
    "not": lambda b, h, q, k: ~(q != k),
    "true": lambda b, h, q, k: True,
    "where": lambda b, h, q, k: torch.where(q < 64, q >= k, k < 64),
}
# every block of these is decided without running the mask
SHARP = {"causal", "window", "document", "blocks", "per_head", "not", "true"}


def ranges(length: int, block: int) -> torch.Tensor:
    starts = torch.arange(0, length, block)
    return torch.stack([starts, (starts + block).clamp(max=length) - 1], 1)


def exact(mask, b, h, q_ranges, kv_ranges, length, kv_len) -> torch.Tensor:
    dense = mask(torch.tensor(b), torch.tensor(h), torch.arange(length)[:, None], torch.arange(kv_len)[None])
    dense = torch.as_tensor(dense).expand(length, kv_len)
    kinds = torch.empty(len(q_ranges), len(kv_ranges), dtype=torch.int8)
    for i, (q0, q1) in enumerate(q_ranges.tolist()):
        for j, (k0, k1) in enumerate(kv_ranges.tolist()):
            block = dense[q0 : q1 + 1, k0 : k1 + 1]
            kinds[i, j] = FULL if block.all() else PARTIAL if block.any() else EMPTY
    return kinds


@pytest.mark.parametrize("name", MASKS)
@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 120),
    kv_len=st.integers(1, 120),
    q_block=st.integers(7, 50),
    kv_block=st.integers(7, 50),
)
def test_a_decided_block_is_what_it_is_said_to_be(name, length, kv_len, q_block, kv_block):
    mask = MASKS[name]
    traced = trace(mask, "mask")
    classify = Classifier(traced.graph, traced.captured, traced.scalars)
    q_ranges, kv_ranges = ranges(length, q_block), ranges(kv_len, kv_block)
    for b, h in ((0, 0), (1, 2)):
        q, kv = (x.double() for x in (q_ranges.repeat_interleave(len(kv_ranges), 0), kv_ranges.repeat(len(q_ranges), 1)))
        kinds = classify(interval(b), interval(h), Interval(q[:, 0], q[:, 1]), Interval(kv[:, 0], kv[:, 1]))
        kinds = kinds.view(len(q_ranges), len(kv_ranges))
        want = exact(mask, b, h, q_ranges, kv_ranges, length, kv_len)
        decided = kinds != PARTIAL
        assert torch.equal(kinds[decided], want[decided])
        if name in SHARP:
            assert torch.equal(kinds, want)


def test_index_ranges_prove_what_is_in_range():
    bias = torch.zeros(10)
    traced = trace(lambda s, b, h, q, k: s + bias[q] + bias[q - k + 2] + bias[documents[k]], "score")
    found = index_ranges(traced.graph, {"q_idx": 10, "kv_idx": 4})
    assert sorted(found.values()) == sorted(
        [[(0.0, 9.0)], [(-1.0, 11.0)], [(0.0, 3.0)], [(float("-inf"), float("inf"))]]
    )
