"""Score mods to import at the edges of their arguments, against NumPy; gradients of what is learned against dense attention."""
from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from flexref import explain, flex_attention
from flexref.program.interpret import interpret
from flexref.program.trace import trace
from flexref.variants import masks, score_mods
from flexref.variants.score_mods import LAMBERT_END

LENGTH = 20


def rand(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def added(mod, heads: int, q_len: int, kv_len: int | None = None) -> np.ndarray:
    """What a mod adds to a score of 0: (heads, q_len, kv_len), of its program in float64."""
    program = trace(mod, "score", torch.float64)
    h, q = torch.arange(heads)[:, None, None], torch.arange(q_len)[:, None]
    at = {"score": torch.zeros(()), "b": torch.zeros((), dtype=torch.int64), "h": h, "q_idx": q}
    at["kv_idx"] = torch.arange(q_len if kv_len is None else kv_len)
    out = interpret(program.graph, at, program.captured, program.scalars, torch.float64)["out"]
    return out.expand(heads, len(q), len(at["kv_idx"])).numpy()


def distances(q_len: int, kv_len: int | None = None) -> np.ndarray:
    return np.arange(q_len if kv_len is None else kv_len) - np.arange(q_len)[:, None]


def check_gradients(make: Callable[[Tensor], Callable], dense: Callable[[Tensor, Tensor], Tensor], learned: Tensor, heads=3):
    """Outputs and gradients of both engines, in float64, against a softmax of the whole table of scores."""
    wanted = None
    for backend in ("", "numba_cpu", "reference"):
        leaves = [rand(2, heads, LENGTH, 4, seed=n).requires_grad_() for n in range(3)] + [learned.clone().requires_grad_()]
        query, key, value, table = leaves
        if backend:
            out = flex_attention(query, key, value, make(table), backend=backend)
        else:
            out = torch.softmax(dense(query @ key.transpose(-1, -2) / 2, table), -1) @ value
        found = [out, *torch.autograd.grad((out * rand(*out.shape, seed=5)).sum(), leaves)]
        wanted = wanted or found
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert wanted and wanted[-1].abs().sum() > 0


def published_slopes(heads: int) -> list[float]:
    """The authors' rule: a geometric sequence for powers of two, and every other one of twice as many heads for the rest."""
    if math.log2(heads).is_integer():
        start = 2 ** (-(2 ** -(math.log2(heads) - 3)))
        return [start * start**i for i in range(heads)]
    closest = 2 ** math.floor(math.log2(heads))
    return published_slopes(closest) + published_slopes(2 * closest)[0::2][: heads - closest]


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 6, 7, 8, 12, 16, 20, 40, 71, 112])
def test_slopes_of_any_number_of_heads(heads):
    slopes = score_mods.alibi_slopes(heads)
    assert slopes.dtype == torch.float32
    np.testing.assert_allclose(slopes.numpy(), published_slopes(heads), rtol=1e-6)
    assert torch.equal(score_mods.alibi(heads).slopes, slopes)


def test_slopes_of_eight_heads_are_halves():
    assert score_mods.alibi_slopes(8).tolist() == [0.5**n for n in range(1, 9)]


def published_buckets(d: np.ndarray, buckets: int, bidirectional: bool, max_distance: int, dtype) -> np.ndarray:
    """T5's formula, in floats as transformers computes it."""
    found = np.zeros_like(d)
    if bidirectional:
        buckets //= 2
        found += (d > 0) * buckets
        n = abs(d)
    else:
        n = -np.minimum(d, 0)
    exact = buckets // 2
    steps = np.log(np.maximum(n, 1).astype(dtype) / dtype(exact)) / dtype(math.log(max_distance / exact)) * dtype(buckets - exact)
    far = np.minimum(exact + steps.astype(np.int64), buckets - 1)
    return found + np.where(n < exact, n, far)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets, reach", [(4, 3), (7, 9), (8, 20), (32, 128), (33, 100), (32, 1000), (64, 256), (12, 17)])
def test_buckets_are_those_of_the_published_formula(buckets, reach, bidirectional):
    d = np.arange(-reach, reach + 1)
    got = score_mods.t5_buckets(buckets, bidirectional, reach).numpy()
    for dtype in (np.float32, np.float64):
        assert np.array_equal(got, published_buckets(d, buckets, bidirectional, reach, dtype))
    table = rand(buckets, 2)
    far = distances(2 * reach + 9, 3)
    wanted = table.numpy()[published_buckets(far, buckets, bidirectional, reach, np.float64)]
    assert np.array_equal(added(score_mods.t5_bias(table, bidirectional, reach), 2, *far.shape), wanted.transpose(2, 0, 1))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_a_table_of_buckets_is_learned(bidirectional):
    at = torch.from_numpy(published_buckets(distances(LENGTH), 8, bidirectional, 11, np.float64))
    check_gradients(
        lambda table: score_mods.t5_bias(table, bidirectional, 11),
        lambda score, table: score + table[at].permute(2, 0, 1),
        rand(8, 3),
    )


@pytest.mark.parametrize("reach", [0, 1, 4, 40])
def test_a_table_of_distances_is_learned(reach):
    at = torch.from_numpy(distances(LENGTH).clip(-reach, reach) + reach)
    check_gradients(score_mods.relative_table, lambda score, table: score + table[:, at], rand(3, 2 * reach + 1))
    if reach:
        check_gradients(score_mods.relative_table, lambda score, table: score + table[at], rand(2 * reach + 1))


@pytest.mark.parametrize(
    "shape, reach", [((4, 5), (3, 4)), ((5, 4), (0, 1)), ((20,), (7,)), ((2, 2, 5), (1, 0, 9)), ((2, 5), (1, 1))]
)
def test_a_table_of_a_grid_is_learned(shape, reach):
    # a canvas that is shorter than the sequence goes on, row after row
    at = np.unravel_index(np.arange(LENGTH), (LENGTH, *shape[1:]))
    index = tuple(torch.from_numpy((x - x[:, None]).clip(-r, r) + r) for x, r in zip(at, reach, strict=True))
    sides = [2 * r + 1 for r in reach]
    check_gradients(
        lambda table: score_mods.relative_grid(table, shape),
        lambda score, table: score + table[(slice(None), *index)],
        rand(3, *sides),
    )
    assert np.array_equal(added(score_mods.relative_grid(rand(*sides), shape), 1, LENGTH)[0], rand(*sides)[index].numpy())


@pytest.mark.parametrize("heads, length, dim", [(1, 1, 2), (3, 17, 128), (8, 40, 6)])
def test_sandwich(heads, length, dim):
    """The product of two sinusoidal embeddings, as the paper has it, over the head's ratio."""
    waves = np.arange(length)[:, None] / 10000 ** (2 * np.arange(dim // 2) / dim)
    embedding = np.concatenate([np.sin(waves), np.cos(waves)], 1)
    wanted = embedding @ embedding.T / (8 * np.arange(1, heads + 1) / heads)[:, None, None]
    # the table of cosines and that of the heads are rounded once each
    got = added(score_mods.sandwich(heads, length, dim), heads, length)
    np.testing.assert_allclose(got, wanted, rtol=2.1 * 2**-24, atol=1e-13 * dim)


def test_sandwich_of_a_longer_sequence_is_an_error():
    query = torch.zeros(1, 1, 9, 4)
    with pytest.raises(IndexError, match="cosines"):
        flex_attention(query, query, query, score_mods.sandwich(1, 8, 4))


@pytest.mark.parametrize("ramp", [0.5, 3.0, 100.0])
def test_spans_are_learned(ramp):
    """The paper multiplies weights; a row keeps its own key, whose factor is 1."""
    d = torch.from_numpy(abs(distances(LENGTH))).double()
    span = torch.tensor([0.25, 5.7, 60.0], dtype=torch.float64)

    def dense(score, span):
        factor = ((ramp + span[:, None, None] - d) / ramp).clamp(0, 1)
        weight = factor * torch.exp(score - score.amax(-1, keepdim=True))
        return torch.log(weight.clamp(min=1e-300)).masked_fill(factor == 0, -math.inf)

    check_gradients(lambda span: score_mods.adaptive_span(span, ramp), dense, span)


def test_a_span_leaves_out_blocks_as_a_mask_does():
    x = torch.zeros(1, 1, 2048, 8)
    score_mod = score_mods.adaptive_span(torch.tensor([40.0], requires_grad=True), 8)
    # of 16 blocks in a row, its own and one on each side: 46 of 256
    assert "makes 82.03% of the positions -inf by whole blocks" in str(explain(x, x, x, score_mod))


def test_widths_are_learned():
    d = torch.from_numpy(distances(LENGTH)).double()
    check_gradients(
        score_mods.gaussian_span,
        lambda score, width: score - d**2 / (2 * width[:, None, None] ** 2),
        torch.tensor([0.3, 4.0, 1e4], dtype=torch.float64),
    )


@pytest.mark.parametrize("heads, kv_heads, width", [(4, 2, 3), (2, 1, 1), (2, 2, 0), (4, None, 6)])
def test_the_rotary_part_is_learned(heads, kv_heads, width):
    shape = (2, LENGTH, width) if kv_heads is None else (2, kv_heads, LENGTH, width)
    query_rope, key_rope = rand(2, heads, LENGTH, width, seed=7), rand(*shape, seed=8)
    of_heads = (key_rope[:, None] if kv_heads is None else key_rope).repeat_interleave(heads // (kv_heads or 1), 1)
    if not width:
        got = score_mods.mla_rope(query_rope, key_rope)(torch.tensor(2.0), 0, 1, 3, 4)
        assert got == 2.0
        return
    check_gradients(
        lambda turned: score_mods.mla_rope(turned, key_rope, 0.3),
        lambda score, turned: score + 0.3 * turned @ of_heads.transpose(-1, -2),
        query_rope,
        heads,
    )
    check_gradients(
        lambda turned: score_mods.mla_rope(query_rope, turned, 0.3),
        lambda score, turned: score
        + 0.3 * query_rope @ (turned[:, None] if kv_heads is None else turned.repeat_interleave(heads // kv_heads, 1)).mT,
        key_rope,
        heads,
    )


def graph(nodes: int, edges: int, seed: int, batch: int = 2) -> np.ndarray:
    draw = np.random.default_rng(seed)
    found = np.zeros((batch, nodes, nodes), bool)
    for b in range(batch):
        found[b, draw.integers(0, nodes, edges), draw.integers(0, nodes, edges)] = True
    return found


def walk(edges: np.ndarray) -> list[list[int | None]]:
    """Breadth first from every node; None where there is no way."""
    found: list[list[int | None]] = []
    for start in range(len(edges)):
        far: list[int | None] = [None] * len(edges)
        far[start], ring = 0, [start]
        while ring:
            following = []
            for i in ring:
                for j in np.flatnonzero(edges[i]).tolist():
                    if far[j] is None:
                        far[j] = far[i] + 1  # type: ignore[operator]
                        following.append(j)
            ring = following
        found.append(far)
    return found


@pytest.mark.parametrize("nodes, edges", [(1, 0), (1, 1), (5, 0), (9, 12), (12, 20), (14, 60)])
@pytest.mark.parametrize("longest", [0, 2, 30])
def test_ways_through_a_graph(nodes, edges, longest):
    there = graph(nodes, edges, nodes)
    kinds = np.random.default_rng(1).integers(1, 9, there.shape)
    far = score_mods.graph_distances(torch.from_numpy(there), longest)
    found, lengths = score_mods.graph_paths(torch.from_numpy(there), torch.from_numpy(kinds), longest)
    assert far.dtype == torch.int32 and found.shape == (*there.shape, longest)
    for b in range(len(there)):
        ways = walk(there[b])
        for i, j in np.ndindex(nodes, nodes):
            way = ways[i][j]
            assert far[b, i, j] == min(longest + 1 if way is None else way, longest + 1)
            assert lengths[b, i, j] == min(way or 0, longest)
            at, steps = i, []
            for _ in range(int(lengths[b, i, j])):
                left = ways[at][j]
                at_next = [k for k in np.flatnonzero(there[b, at]).tolist() if ways[k][j] is not None and ways[k][j] + 1 == left]  # type: ignore[operator]
                steps.append(int(kinds[b, at, at_next[0]]))
                at = at_next[0]
            assert found[b, i, j].tolist() == steps + [0] * (longest - len(steps))
    one = score_mods.graph_distances(torch.from_numpy(there[0]), longest)
    assert torch.equal(one, far[0])


def test_biases_of_a_graph_are_learned():
    there = torch.from_numpy(graph(LENGTH, 45, 3))
    far = score_mods.graph_distances(there, 4)
    check_gradients(
        lambda bias: score_mods.graph_distance(bias, far),
        lambda score, bias: score + bias[:, far.long()].transpose(0, 1),
        rand(3, 6),
    )
    types = torch.from_numpy(np.random.default_rng(2).integers(0, 5, there.shape))
    edges, lengths = score_mods.graph_paths(there, types, 3)

    def dense(score, bias):
        total = sum(torch.where(lengths > n, bias[:, n][:, edges[..., n]], 0.0) for n in range(3))
        return score + (total / lengths.clamp(min=1)).transpose(0, 1)

    check_gradients(lambda bias: score_mods.graph_path(bias, edges, lengths), dense, rand(3, 3, 5))


@pytest.mark.parametrize("function, offset", [(torch.nn.functional.gelu, 1.0), (torch.relu, 0.5), (torch.sigmoid, 1e-3)])
@pytest.mark.parametrize("backend", ["numba_cpu", "reference"])
def test_attention_without_softmax(function, offset, backend):
    query, key, value = (rand(1, 2, LENGTH, 4, seed=n) for n in range(3))
    mod = score_mods.activation(function, offset)
    shifted = masks.shift_mask(masks.causal, -1)
    out, lse = flex_attention(query, key, value, mod, mask_mod=shifted, return_lse=True, backend=backend)
    before = torch.ones(LENGTH, LENGTH, dtype=torch.float64).tril(-1)
    wanted = (function(query @ key.transpose(-1, -2) / 2) * before) @ value
    # the first row sees nothing
    torch.testing.assert_close(score_mods.undo_softmax(out, lse, before @ value, offset), wanted, rtol=1e-9, atol=1e-9)


def convergent(x: Fraction, n: int) -> Fraction:
    """Lambert's continued fraction of tanh, x / (1 + x^2 / (3 + x^2 / (5 + ...))), cut after n terms."""
    below = Fraction(2 * n - 1)
    for k in range(n - 1, 0, -1):
        below = 2 * k - 1 + x * x / below
    return x / below


def capped_fast(scores: Tensor, cap: float, dtype) -> Tensor:
    program = trace(score_mods.soft_cap(cap, fast=True), "score", dtype)
    inputs = {name: torch.zeros((), dtype=torch.int64) for name in ("b", "h", "q_idx", "kv_idx")}
    return interpret(program.graph, {"score": scores, **inputs}, program.captured, program.scalars, dtype)["out"]


@pytest.mark.parametrize("cap", [1.0, 20.0, 50.0])
def test_the_fast_cap_is_as_near_as_it_says(cap):
    """Convergents with an odd number of terms lie above tanh and with an even number below: two of them bound the error."""
    x = np.concatenate([np.linspace(0, LAMBERT_END, 2001), np.linspace(LAMBERT_END, 30, 101)[1:], [1e30, np.inf]])
    end = Fraction(LAMBERT_END)
    upper = [convergent(min(Fraction(v), end) if np.isfinite(v) else end, 7) for v in x]
    lower = [convergent(min(Fraction(v), end) if np.isfinite(v) else end, 10) for v in x]
    bound = np.array([float(a - b) for a, b in zip(upper, lower, strict=True)])
    # the fraction ends where it is 1, and there is farthest from tanh
    assert 0 <= 1 - upper[-1] < 1e-10 and bound.max() < 1e-4
    for sign in (1, -1):
        scores = torch.from_numpy(sign * cap * x)
        exact = cap * np.tanh(sign * x)
        # x rounded moves tanh by half a unit; each of 22 steps of the fraction, whose terms are all positive, moves it by one
        for dtype, unit in ((torch.float64, 2.0**-53), (torch.float32, 2.0**-24)):
            error = abs(capped_fast(scores.to(dtype), cap, dtype).double().numpy() - exact)
            assert (error <= cap * (bound + 24 * unit)).all()
        assert (abs(capped_fast(scores, cap, torch.float64)) <= cap).all()
    assert capped_fast(torch.tensor([math.nan]), cap, torch.float32).isnan().all()


def test_the_fast_cap_in_an_engine():
    query, key, value = (3 * rand(1, 2, LENGTH, 8, seed=n, dtype=torch.float32) for n in range(3))
    outs = []
    for backend in ("numba_cpu", "reference"):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        out = flex_attention(*leaves, score_mods.soft_cap(5.0, fast=True), backend=backend)
        outs.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for got, want in zip(*outs, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)


def test_each_head_has_its_own():
    table = rand(2, 9)
    mod = score_mods.per_head(score_mods.relative_table(table), score_mods.alibi(2), each=2)
    d = distances(LENGTH)
    rows = table.numpy()[:, d.clip(-4, 4) + 4]
    slopes = d * np.array(published_slopes(2))[:, None, None]
    np.testing.assert_allclose(added(mod, 5, LENGTH), np.concatenate([rows, slopes, np.zeros((1, LENGTH, LENGTH))]))
    at = torch.from_numpy(d.clip(-4, 4) + 4)
    check_gradients(
        lambda table: score_mods.per_head(score_mods.relative_table(table), score_mods.alibi(1), each=2),
        lambda score, table: score + torch.cat([table[:, at], torch.from_numpy(d * 2.0**-8)[None]]),
        table,
    )


IDS = torch.zeros(2, 3, dtype=torch.int64)
FLOATS = torch.zeros(2, 3)
WRONG = {
    "alibi": (lambda: score_mods.alibi(0), ValueError, "heads must be an int of at least 1, got 0"),
    "slopes": (lambda: score_mods.alibi(2, torch.ones(3)), ValueError, r"slopes must be floats of shape \(2,\)"),
    "heads": (lambda: score_mods.alibi_slopes(0), ValueError, "heads must be at least 1, got 0"),
    "cap": (lambda: score_mods.soft_cap(-1.0), ValueError, "cap must be a positive number, got -1.0"),
    "fast": (lambda: score_mods.soft_cap(1.0, 1), TypeError, "fast must be a bool, got int"),
    "bias": (lambda: score_mods.table_bias(IDS), TypeError, "table must be a float tensor"),
    "compose": (lambda: score_mods.compose(3), TypeError, "compose: argument 0 must be a score_mod, got int"),
    "per_head": (lambda: score_mods.per_head(3), TypeError, "per_head: argument 0 must be a score_mod, got int"),
    "each": (lambda: score_mods.per_head(each=0), ValueError, "each must be at least 1, got 0"),
    "t5 table": (lambda: score_mods.t5_bias(IDS), TypeError, "table must be a float tensor of 2 dimensions, got torch.int64"),
    "buckets": (lambda: score_mods.t5_bias(torch.zeros(3, 2)), ValueError, "buckets must be at least 4, got 3"),
    "buckets of the past": (lambda: score_mods.t5_buckets(1, False), ValueError, "buckets must be at least 2, got 1"),
    "max_distance": (lambda: score_mods.t5_buckets(32, True, 8), ValueError, "max_distance must be at least 9, got 8"),
    "bidirectional": (lambda: score_mods.t5_bias(torch.zeros(8, 2), 1), TypeError, "bidirectional must be a bool, got int"),
    "even table": (lambda: score_mods.relative_table(torch.zeros(4)), ValueError, r"2 \* reach \+ 1 entries.*\(4,\)"),
    "even grid": (lambda: score_mods.relative_grid(torch.zeros(3, 4), (2, 2)), ValueError, r"for distances, got \(3, 4\)"),
    "grid of other axes": (lambda: score_mods.relative_grid(torch.zeros(3), (2, 2)), TypeError, "float tensor of 2 or 3 dim"),
    "dim": (lambda: score_mods.sandwich(2, 8, 3), ValueError, "dim must be even, got 3"),
    "length": (lambda: score_mods.sandwich(2, 0), ValueError, "length must be at least 1, got 0"),
    "span": (lambda: score_mods.adaptive_span(IDS, 2), TypeError, "span must be a float tensor of 1 dimensions"),
    "ramp": (lambda: score_mods.adaptive_span(FLOATS[0], 0), ValueError, "ramp must be a positive number, got 0"),
    "rope": (lambda: score_mods.mla_rope(FLOATS, FLOATS), TypeError, "query_rope must be a float tensor of 4 dimensions"),
    "rope's width": (
        lambda: score_mods.mla_rope(torch.zeros(1, 2, 3, 4), torch.zeros(1, 3, 5)), ValueError,
        "key_rope must have the last size of query_rope, 4, got 5",
    ),
    "rope's heads": (
        lambda: score_mods.mla_rope(torch.zeros(1, 4, 3, 4), torch.zeros(1, 3, 3, 4)), ValueError,
        "key_rope must have heads that divide the 4 of query_rope, got 3",
    ),
    "rope's scale": (
        lambda: score_mods.mla_rope(torch.zeros(1, 4, 3, 4), torch.zeros(1, 3, 4), 0), ValueError,
        "scale must be a positive number, got 0",
    ),
    "widths": (lambda: score_mods.gaussian_span(FLOATS), TypeError, "width must be a float tensor of 1 dimensions"),
    "distances": (lambda: score_mods.graph_distance(FLOATS, FLOATS), TypeError, "distances must be an integer tensor of"),
    "edges": (lambda: score_mods.graph_path(FLOATS, IDS, IDS), TypeError, "bias must be a float tensor of 3 dimensions"),
    "rows": (
        lambda: score_mods.graph_path(FLOATS[None], IDS[None].repeat(1, 1, 2), IDS), ValueError,
        "bias must have a row for each of 6 edges of a path, got 2",
    ),
    "adjacency": (lambda: score_mods.graph_distances(IDS, 2), TypeError, r"adjacency must be a bool tensor \(N, N\)"),
    "types": (
        lambda: score_mods.graph_paths(IDS[:, :2] > 0, IDS, 2), ValueError,
        r"types must have the shape of adjacency, \(2, 2\), got \(2, 3\)",
    ),
    "function": (lambda: score_mods.activation(3), TypeError, "function must be a pointwise function of the score, got int"),
    "offset": (lambda: score_mods.activation(offset=0.0), ValueError, "offset must be a positive number, got 0.0"),
    "undone offset": (lambda: score_mods.undo_softmax(FLOATS, FLOATS, FLOATS, -1), ValueError, "offset must be a positive"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments_are_named(what):
    make, error, text = WRONG[what]
    with pytest.raises(error, match=text):
        make()
