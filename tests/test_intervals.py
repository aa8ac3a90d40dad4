"""Interval analysis: never wrong, and not blind for the masks that people write."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexref.program.interpret import dtype_of, evaluate
from flexref.program.interval import Interval, interval
from flexref.program.intervals import EMPTY, FULL, PARTIAL, WIDEST, Classifier, evaluate_intervals, index_ranges
from flexref.program.range_tables import Reader
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


INF = float("inf")
WILD = torch.tensor([0.0, -0.0, 1e-45, 3e-39, -1e-30, 0.1, -2.5, 16777217.0, 3e38, -3e38, INF, -INF, float("nan"), 7.0])
TAME = torch.linspace(-3, 9, 40)
DOUBLES = torch.linspace(0, 1, 40, dtype=torch.float64) * 1e9 / 3
WHOLE = torch.randint(-9, 9, (40,), generator=torch.Generator().manual_seed(0))


def number(draw: random.Random, depth: int) -> str:
    """A formula of floats, at the ends of their range as well as in the midst."""
    if depth == 0:
        return draw.choice([
            "s", "q * 1.0", "k / 3", "h * 0.5", "TAME[q]", "TAME[k]", "WILD[k % 14]", "WILD[q % 14]", "DOUBLES[k]",
            "WHOLE[q] * 1.0", "(q - k) * 1.0", "torch.full((), 0.1)",
        ])  # fmt: skip
    a, c = number(draw, depth - 1), number(draw, draw.randrange(depth))
    n = draw.choice(["0.1", "1.0", "3.0", "-2.0", "1e8", "1e-30", "1e30", "16777216.0", "0.0", "float('inf')"])
    return draw.choice([
        f"({a} + {c})", f"({a} - {c})", f"({a} * {c})", f"({a} + {n})", f"({a} - {n})", f"({a} * {n})", f"({a} / {n})",
        f"({n} / {a})", f"({a} // {n})", f"({a} % {n})", f"({a} % {c})", f"torch.div({a}, {n}, rounding_mode='trunc')",
        f"-({a})", f"abs({a})", f"torch.minimum({a}, {c})", f"torch.maximum({a}, {c})", f"torch.floor({a})", f"torch.ceil({a})",
        f"torch.where({a} < {c}, {a}, {c})", f"torch.where(q > k, {a}, {c})", f"({a}).long() * 1.0", f"({a}).detach()",
        f"torch.sqrt({a})", f"torch.log({a})", f"torch.clamp({a}, -2, 5)", f"((({a}).long() // 3) % 5) * 0.1",
    ])  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(seed=st.integers(0, 10**9), depth=st.integers(1, 4), acc=st.sampled_from([torch.float32, torch.float64]))
def test_every_number_lies_in_its_interval_in_float32_and_in_float64(seed, depth, acc):
    draw = random.Random(seed)
    a, c = number(draw, depth), number(draw, draw.randrange(depth))
    text = f"torch.where({a} {draw.choice(['<', '<=', '>', '>=', '==', '!='])} {c}, {a}, {c})"
    traced = trace(eval(f"lambda s, b, h, q, k: {text}", globals() | {"torch": torch}), "score", acc)
    starts = [(draw.randrange(40), draw.randrange(40)) for _ in range(6)]
    q_ends = [(q, draw.randrange(q, min(40, q + 9))) for q, _ in starts]
    k_ends = [(k, draw.randrange(k, min(40, k + 9))) for _, k in starts]
    q_tiles, k_tiles = (torch.tensor(ends, dtype=torch.float64) for ends in (q_ends, k_ends))
    inputs = {
        "b": interval(0.0), "h": interval(0.0, 3.0),
        "q_idx": Interval(q_tiles[:, 0], q_tiles[:, 1]), "kv_idx": Interval(k_tiles[:, 0], k_tiles[:, 1]),
    }  # fmt: skip
    readers = [Reader(x) for x in traced.captured]
    known = evaluate_intervals(
        traced.graph, inputs, lambda node, at: readers[node.attr].read(at, WIDEST[node.type]), traced.scalars  # type: ignore[index]
    )
    for tile, ((q_first, q_last), (k_first, k_last)) in enumerate(zip(q_ends, k_ends, strict=True)):
        q, k = torch.arange(q_first, q_last + 1)[:, None, None], torch.arange(k_first, k_last + 1)[:, None]
        s = torch.tensor([0.0, -1.5, 1e30, float("inf"), -float("inf"), float("nan"), 1e-40]).to(acc)
        at = {"score": s, "b": torch.tensor(0), "h": torch.tensor(2), "q_idx": q, "kv_idx": k}
        values = evaluate(
            traced.graph, at, lambda _, node, i: traced.captured[node.attr][tuple(i)].to(dtype_of(node.type, acc)),  # type: ignore[index]
            lambda _, node: torch.tensor(traced.scalars[node.attr], dtype=dtype_of(node.type, acc)), acc,  # type: ignore[index]
        )  # fmt: skip
        for node, value, within in zip(traced.graph.nodes, values, known, strict=True):
            low, high, nan = (x if x.dim() == 0 else x[tile] for x in within)
            number_ = value.double()
            # numbers that an engine may take for 0
            small = number_.abs() < 2.0**-126
            inside = (number_ >= low) & (number_ <= high) & ~(small & ~((low <= 0) & (high >= 0)) & (node.type == "float"))
            assert bool((inside | (number_.isnan() & bool(nan))).all()), f"{text}: {node} is {value} in [{low}, {high}], {nan}"
