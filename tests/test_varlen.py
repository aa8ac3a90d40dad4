"""Documents of any lengths, packed or jagged: what each document alone would give, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexref import AuxRequest, create_block_mask, create_nested_block_mask, explain, flex_attention, varlen_attention
from flexref.backends.numba_cpu import cache
from flexref.reference import einsum

BACKENDS = ("numba_cpu", "reference")
LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=5)
SCORES = {
    "none": None,
    "local": lambda t, cu: lambda s, b, h, i, j: s + 0.3 * (i - j) + b,
    "by document": lambda t, cu: lambda s, b, h, i, j: s * t["document"][b] + t["document"][b],
    "by local place": lambda t, cu: lambda s, b, h, i, j: s + t["place"][h, j],
    "by packed token": lambda t, cu: lambda s, b, h, i, j: s + t["token"][cu[b] + j],
    "view": lambda t, cu: lambda s, b, h, i, j: s + t["place"].T[j, h],
}
MASKS = {
    "none": None,
    "some": lambda b, h, i, j: (j != 1) | (b == h),
    "odd": lambda b, h, i, j: (i + j) % 2 == 0,
}


def offsets(lengths, dtype=torch.int64):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def packed(lengths, heads, width=4, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), heads, width, generator=random, dtype=dtype).requires_grad_()


def tables(documents, tokens):
    random = torch.Generator().manual_seed(9)
    shapes = {"document": (documents,), "place": (4, 10), "token": (max(1, tokens),)}
    return {n: torch.randn(s, generator=random, dtype=torch.float64).requires_grad_() for n, s in shapes.items()}


def each_alone(query, key, value, q_lengths, kv_lengths, score, mask, causal, sink):
    """The reference, a document at a time."""
    parts = []
    for d, (q, k, v) in enumerate(zip(query.split(q_lengths), key.split(kv_lengths), value.split(kv_lengths), strict=True)):
        shift = kv_lengths[d] - q_lengths[d] if causal == "end" else 0

        def allowed(b, h, i, j, d=d, shift=shift):
            below = j >= 0 if causal is None else j <= i + shift
            return below if mask is None else below & mask(d, h, i, j)

        one = score and (lambda s, b, h, i, j, d=d: score(s, torch.tensor(d), h, i, j))
        parts.append(einsum(*(x.transpose(0, 1)[None] for x in (q, k, v)), one, allowed, sink=sink))
    return [torch.cat([x[i][0].transpose(0, 1) for x in parts]) for i in range(3)]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5),
    score=st.sampled_from(list(SCORES)),
    mask=st.sampled_from(list(MASKS)),
    causal=st.sampled_from([None, "start", "end"]),
    sinks=st.booleans(),
    group=st.sampled_from([1, 2]),
)
def test_each_document_attends_to_itself_alone(backend, lengths, score, mask, causal, sinks, group):
    q_lengths, kv_lengths = ([pair[i] for pair in lengths] for i in (0, 1))
    query, key, value = packed(q_lengths, 4), packed(kv_lengths, 4 // group, seed=1), packed(kv_lengths, 4 // group, 6, seed=2)
    held, cu_q, cu_k = tables(len(lengths), sum(kv_lengths)), offsets(q_lengths, torch.int32), offsets(kv_lengths)
    score_mod = SCORES[score] and SCORES[score](held, cu_k)
    sink = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64).requires_grad_() if sinks else None
    out, aux = varlen_attention(
        query, key, value, cu_q, cu_k, score_mod, MASKS[mask], causal=causal, enable_gqa=group > 1, sink=sink,
        backend=backend, return_aux=AuxRequest(lse=True, max_scores=True),
    )  # fmt: skip
    wanted = each_alone(query, key, value, q_lengths, kv_lengths, score_mod, MASKS[mask], causal, sink)
    assert aux.lse is not None
    for got, want in zip((out, aux.lse, aux.max_scores), wanted, strict=True):
        torch.testing.assert_close(got, want)
    leaves = [query, key, value, *held.values(), *([sink] if sinks else [])]
    grads = []
    for o, lse in ((out, aux.lse), wanted[:2]):
        loss = o.sin().sum() + lse.where(lse > -1e30, 0.0).sum()
        grads.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


def test_other_documents_need_no_other_kernel():
    held = tables(3, 60)
    mod = lambda s, b, h, i, j: s * held["document"][b] + held["place"][h, j % 10]  # noqa: E731
    builds = []
    for n in range(20):
        lengths = [n, 7 + n % 3, 20 - n]
        query, key, value = (packed(lengths, 4, seed=seed, dtype=torch.float32) for seed in range(3))
        out = varlen_attention(query, key, value, offsets(lengths), score_mod=mod, mask_mod=MASKS["odd"], causal="end")
        out.sum().backward()
        builds.append(len(cache._loaded))
    assert builds[1:] == builds[:-1] and builds[0] > 0


def test_the_same_offsets_keep_the_block_mask(monkeypatch):
    from flexref import arguments

    made = []
    make = arguments.mask_of_call
    monkeypatch.setattr(arguments, "mask_of_call", lambda *a: made.append(1) or make(*a))
    query, key, value = (packed([5, 9], 2, seed=seed) for seed in range(3))
    cu = offsets([5, 9])
    first = varlen_attention(query, key, value, cu, causal="start")
    assert torch.equal(varlen_attention(query, key, value, cu, causal="start"), first) and made == [1]
    # other documents in the same tensor are other documents
    cu.copy_(offsets([9, 5]))
    second, other = (varlen_attention(query, key, value, x, causal="start") for x in (cu, offsets([9, 5])))
    assert torch.equal(second, other) and not torch.equal(second, first)


def test_blocks_of_no_document_are_not_looked_at():
    lengths = [300, 500, 200]
    query = packed(lengths, 1, dtype=torch.float32)
    note = str(explain(*(query.transpose(0, 1)[None],) * 3, mask_mod=_mask_of(lengths)))
    assert "mask_mod   kept" in note
    listed = create_block_mask(_mask_of(lengths), 1, 1, 1000, 1000, "cpu", 16).to_dense()[0, 0]
    ends = offsets(lengths)
    for row in range(len(listed)):
        for column in range(listed.shape[1]):
            meet = any(
                row * 16 < stop and row * 16 + 16 > start and column * 16 < stop and column * 16 + 16 > start
                for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
            )
            assert bool(listed[row, column]) == meet


def _mask_of(lengths):
    from flexref.blocks.packed import Packed, places

    return Packed(None, places(offsets(lengths), offsets(lengths)))


def jagged(lengths, heads=2, width=8, seed=0):
    random = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, heads, width, generator=random, dtype=torch.float64) for n in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", ["mask_mod", "block_mask", "neither"])
def test_jagged_tensors_give_jagged_results_and_gradients(backend, masked):
    lengths = (5, 0, 9, 3)
    leaves = [jagged(lengths, seed=seed) for seed in range(3)]
    query, key, value = (x.transpose(1, 2) for x in leaves)
    table = torch.randn(4, 9, generator=torch.Generator().manual_seed(5), dtype=torch.float64).requires_grad_()
    score = lambda s, b, h, i, j: s + table[b, j]  # noqa: E731
    below = lambda b, h, i, j: (i >= j) | (b == 2)  # noqa: E731
    how: Any = {
        "mask_mod": {"mask_mod": below},
        "block_mask": {"block_mask": create_nested_block_mask(below, 1, 1, query, BLOCK_SIZE=4)},
        "neither": {},
    }[masked]
    results: Any = flex_attention(query, key, value, score, return_lse=True, backend=backend, **how)
    out, lse = results
    assert out.is_nested and out.shape == query.shape and lse.shape == query.shape[:3]
    assert (out + query).shape == query.shape
    (out.values().sum() + lse.values().sin().sum()).backward()
    plain = [x.detach().values().requires_grad_() for x in leaves]
    mask = None if masked == "neither" else below
    again = table.detach().requires_grad_()
    wanted = each_alone(*plain, list(lengths), list(lengths), lambda s, b, h, i, j: s + again[b, j], mask, None, None)
    torch.testing.assert_close(out.transpose(1, 2).values(), wanted[0])
    torch.testing.assert_close(lse.transpose(1, 2).values(), wanted[1])
    (wanted[0].sum() + wanted[1].sin().sum()).backward()
    for leaf, one in zip(leaves, plain, strict=True):
        torch.testing.assert_close(leaf.grad.values(), one.grad)  # type: ignore[union-attr]
    torch.testing.assert_close(table.grad, again.grad)
    assert "chosen" in str(explain(query, key, value, score, **how))


TOKENS = torch.randn(8, 2, 4)
GOOD = torch.tensor([0, 3, 8])


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"query": TOKENS[None]}, ValueError, r"query must be a tensor of 3 dimensions \(tokens, heads, head_dim\), got shape"),
        ({"key": [1, 2]}, TypeError, "key must be a tensor of 3 dimensions.*got list"),
        ({"causal": "left"}, ValueError, 'causal must be "start", "end" or None, got \'left\''),
        ({"cu_seqlens_q": [0, 8]}, TypeError, r"cu_seqlens_q must be an integer tensor \(documents \+ 1,\), got list"),
        ({"cu_seqlens_q": GOOD.float()}, TypeError, "cu_seqlens_q must be an integer tensor.*got torch.float32"),
        ({"cu_seqlens_k": GOOD[None]}, ValueError, r"cu_seqlens_k must have the shape \(documents \+ 1,\), got \(1, 3\)"),
        ({"cu_seqlens_k": GOOD[:0]}, ValueError, r"got \(0,\)"),
        ({"cu_seqlens_k": torch.tensor([0, 3, 5, 8])}, ValueError, "cu_seqlens_q has 2 documents and cu_seqlens_k 3"),
        ({"cu_seqlens_q": torch.tensor([0, 5, 3, 8])}, ValueError, "cu_seqlens_q falls from 5 to 3 at 2"),
        ({"cu_seqlens_q": torch.tensor([1, 3, 8])}, ValueError, "cu_seqlens_q runs from 1 to 8; it must run from 0 to.*query, 8"),
        ({"cu_seqlens_k": torch.tensor([0, 3, 9])}, ValueError, "cu_seqlens_k runs from 0 to 9.*tokens of key, 8"),
        ({"cu_seqlens_k": torch.tensor([0, 3, 8], device="meta")}, ValueError, "cu_seqlens_k"),
        ({"score_mod": lambda s, b: s}, Exception, "must take 5 arguments|argument"),
        ({"mask_mod": 3}, Exception, "mask_mod"),
        ({"value": TOKENS[:7]}, ValueError, "value"),
    ],
)
def test_what_does_not_fit_is_said(change, error, says):
    given = {"query": TOKENS, "key": TOKENS, "value": TOKENS, "cu_seqlens_q": GOOD} | change
    before = {n: x.clone() for n, x in given.items() if isinstance(x, torch.Tensor) and not x.is_meta}
    with pytest.raises(error, match=f"(?s){says}"):
        varlen_attention(**given)
    assert all(torch.equal(given[n], x) for n, x in before.items())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_jagged_tensors_that_do_not_fit():
    query, other = (jagged(n).transpose(1, 2) for n in ((5, 3), (4, 3)))
    fewer = jagged((5,)).transpose(1, 2)
    for inputs, error, says in (
        ((query, query.values()[None], query), TypeError, "query, value is a jagged nested tensor but key is not"),
        ((query.transpose(1, 2), query, query), ValueError, r"query must be jagged with the shape \(B, H, S\*, E\)"),
        ((query, query, other), ValueError, "key and value must have sequences of the same lengths"),
        ((query, fewer, fewer), ValueError, "query has 2 sequences and key 1"),
    ):
        with pytest.raises(error, match=says):
            flex_attention(*inputs)
    turned = create_nested_block_mask(MASKS["odd"], 1, 1, jagged((3, 5)).transpose(1, 2))
    for mask in (turned, create_block_mask(MASKS["odd"], 1, 1, 8, 8, "cpu")):
        with pytest.raises(ValueError, match="not one of create_nested_block_mask for sequences of these lengths"):
            flex_attention(query, query, query, block_mask=mask)
    for offsets_, says in (([0, 3, 99], "runs from 0 to 99"), ([2, 5, 8], "runs from 2"), ([0, 5, 3, 8], "falls from 5 to 3")):
        wrong = torch.nested.nested_tensor_from_jagged(torch.randn(8, 2, 4), torch.tensor(offsets_)).transpose(1, 2)
        with pytest.raises(ValueError, match=rf"query.offsets\(\) {says}"):
            flex_attention(wrong, wrong, wrong)
    with pytest.raises(TypeError, match="pass them to flex_attention"):
        varlen_attention(query, query, query, GOOD)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_score_mod_that_is_false_is_one():
    class Empty(torch.nn.ModuleList):
        def forward(self, score, b, h, q_idx, kv_idx):
            return score + b * kv_idx

    query = jagged((5, 7)).transpose(1, 2)
    mod = Empty()
    want = flex_attention(query, query, query, lambda *x: mod(*x))
    assert torch.equal(flex_attention(query, query, query, mod).values(), want.values())
