"""The variants against a formula written again, in every engine of meaning: plain integers, torch's vmap, and the tracer."""
from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from flexref.blocks.mask import create_block_mask, create_mask
from flexref.program.interpret import interpret
from flexref.program.trace import trace
from flexref.variants import masks, score_mods

IDS = torch.tensor([[0] * 5 + [1] * 4 + [2] * 11, [0] * 12 + [3] * 8])
TABLE = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0)) < 0.5
ANCESTORS: list[tuple] = [(), (0,), (0,), (0, 1), (0, 1, 3)]
LENGTHS = torch.tensor([7, 15])

MASKS: dict[str, tuple[Callable, Callable]] = {
    "causal": (masks.causal, lambda b, h, q, k: k <= q),
    "window": (masks.window(3, 1), lambda b, h, q, k: -1 <= q - k <= 3),
    "sliding_window": (masks.sliding_window(4), lambda b, h, q, k: 0 <= q - k < 4),
    "dilated_window": (masks.dilated_window(3, 4), lambda b, h, q, k: q - k in (0, 4, 8)),
    "global_tokens": (masks.global_tokens(2), lambda b, h, q, k: min(q, k) < 2),
    "global or sliding": (masks.global_tokens(2) | masks.sliding_window(3), lambda b, h, q, k: min(q, k) < 2 or 0 <= q - k < 3),
    "chunked": (masks.chunked(6), lambda b, h, q, k: q // 6 == k // 6),
    "prefix_lm": (masks.prefix_lm(6), lambda b, h, q, k: k < 6 or k <= q),
    "prefix_lm of a batch": (masks.prefix_lm(LENGTHS), lambda b, h, q, k: k < (7, 15)[b] or k <= q),
    "document": (masks.document(IDS[0]), lambda b, h, q, k: IDS[0].tolist()[q] == IDS[0].tolist()[k]),
    "document of a batch": (masks.document(IDS), lambda b, h, q, k: IDS[b].tolist()[q] == IDS[b].tolist()[k]),
    "padded": (masks.padded(LENGTHS), lambda b, h, q, k: max(q, k) < (7, 15)[b]),
    "padded apart": (masks.padded(LENGTHS, LENGTHS + 2), lambda b, h, q, k: q < (7, 15)[b] and k < (9, 17)[b]),
    "neighborhood": (masks.neighborhood(5, 1), lambda b, h, q, k: abs(q // 5 - k // 5) < 2 and abs(q % 5 - k % 5) < 2),
    "table": (masks.from_table(TABLE), lambda b, h, q, k: TABLE[b, h, q, k]),
    "table of heads": (masks.from_table(TABLE[0]), lambda b, h, q, k: TABLE[0, h, q, k]),
    "table of all": (masks.from_table(TABLE[0, 0]), lambda b, h, q, k: TABLE[0, 0, q, k]),
    "tree": (masks.tree([-1, 0, 0, 1] + [3] * 16), lambda b, h, q, k: k == q or k in ANCESTORS[min(q, 4)]),
    "and": (masks.causal & masks.chunked(6), lambda b, h, q, k: k <= q and q // 6 == k // 6),  # type: ignore[operator]
    "xor": (masks.causal ^ masks.chunked(6), lambda b, h, q, k: (k <= q) != (q // 6 == k // 6)),  # type: ignore[operator]
    "not": (~masks.chunked(6), lambda b, h, q, k: q // 6 != k // 6),
    "shifted": (masks.shift_mask(masks.causal, 3, 1), lambda b, h, q, k: k + 1 <= q + 3),
}


def brute(mod) -> torch.Tensor:
    at = torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, 20, 20))).tolist()
    return torch.tensor([bool(mod(*x)) for x in at]).reshape(2, 3, 20, 20)


def traced(mod, kind, *score) -> torch.Tensor:
    program = trace(mod, kind)
    at = [torch.arange(n).reshape([-1 if i == j else 1 for j in range(4)]) for i, n in enumerate((2, 3, 20, 20))]
    names = ("score", "b", "h", "q_idx", "kv_idx")[1 - len(score) :]
    inputs: dict[str, torch.Tensor] = dict(zip(names, (*score, *at), strict=True))
    return interpret(program.graph, inputs, program.captured, program.scalars, torch.float32)["out"].expand(2, 3, 20, 20)


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    mod, formula = MASKS[name]
    dense = brute(formula)
    assert torch.equal(brute(mod), dense)
    assert torch.equal(create_mask(mod, 2, 3, 20, 20, "cpu"), dense)
    assert torch.equal(traced(mod, "mask"), dense)
    assert torch.equal(torch_flex.create_mask(mod, 2, 3, 20, 20, device="cpu"), dense)
    again = pickle.loads(pickle.dumps(mod))
    assert again == mod and repr(again) == repr(mod) and "object at" not in getattr(mod, "__name__", "")
    mask = create_block_mask(mod, 2, 3, 20, 20, "cpu", 6)
    assert pickle.loads(pickle.dumps(mask)) == mask


SCORE = torch.linspace(-40, 40, 2 * 3 * 20 * 20).reshape(2, 3, 20, 20)
BIAS = torch.linspace(-1, 1, 3 * 20 * 20).reshape(3, 20, 20)
SCORES: dict[str, tuple[Callable, Callable]] = {
    "relative_position": (score_mods.relative_position, lambda s, b, h, q, k: s + q - k),
    "causal": (score_mods.causal, lambda s, b, h, q, k: s if k <= q else -math.inf),
    "alibi": (score_mods.alibi(3), lambda s, b, h, q, k: s + 2 ** (-8 * (h + 1) / 3) * (k - q)),
    "soft_cap": (score_mods.soft_cap(20), lambda s, b, h, q, k: 20 * math.tanh(s / 20)),
    "table_bias": (score_mods.table_bias(BIAS), lambda s, b, h, q, k: s + BIAS[h, q, k].item()),
    "by_mask": (score_mods.by_mask(masks.chunked(6)), lambda s, b, h, q, k: s if q // 6 == k // 6 else -math.inf),
    "compose": (
        score_mods.compose(score_mods.soft_cap(20.0), score_mods.alibi(3)),
        lambda s, b, h, q, k: 20 * math.tanh(s / 20) + 2 ** (-8 * (h + 1) / 3) * (k - q),
    ),
    "compose nothing": (score_mods.compose(), lambda s, b, h, q, k: s),
}


@pytest.mark.parametrize("name", SCORES)
def test_score_mods(name):
    mod, formula = SCORES[name]
    at = torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, 20, 20))).tolist()
    wanted = torch.tensor([formula(s.item(), *x) for s, x in zip(SCORE.flatten(), at, strict=True)]).reshape(SCORE.shape)
    plain = torch.tensor([float(mod(s, *x)) for s, x in zip(SCORE.flatten(), at, strict=True)]).reshape(SCORE.shape)
    torch.testing.assert_close(plain, wanted)
    torch.testing.assert_close(traced(mod, "score", SCORE), wanted)
    again = pickle.loads(pickle.dumps(mod))
    assert again == mod and "object at" not in mod.__name__
    query = torch.randn(2, 3, 20, 8)
    with mock.patch.object(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True):
        assert torch_flex.flex_attention(query, query, query, mod).shape == query.shape


def test_they_print_what_made_them():
    assert repr(masks.sliding_window(4)) == "sliding_window(size=4)"
    assert repr(masks.document(IDS)) == "document(ids=<int64 (2, 20)>)"
    assert repr(masks.causal & masks.chunked(6)) == "and_masks(causal, chunked(size=6))"  # type: ignore[operator]
    assert repr(~masks.global_tokens(1)) == "not_mask(global_tokens(count=1))"
    assert masks.not_mask(~masks.chunked(6)) == masks.chunked(6)
    assert repr(score_mods.compose(score_mods.causal, score_mods.soft_cap(2))) == "compose(causal, soft_cap(cap=2.0))"
    assert repr(masks.shift_mask(masks.causal, 3)) == "View(mod=causal, q_idx=Offset(value=3), kv_idx=Offset(value=0))"


def test_document_ids():
    assert masks.document_ids([2, 0, 3]).tolist() == [0, 0, 2, 2, 2]


WRONG = {
    "window": (lambda: masks.sliding_window(0), ValueError, "size must be at least 1, got 0"),
    "window of a float": (
        lambda: masks.window(1.5, 0),  # type: ignore[arg-type]
        TypeError,
        "before must be an int, got float",
    ),
    "ids of floats": (
        lambda: masks.document(torch.zeros(3)),
        TypeError,
        "ids must be an integer tensor of 1 or 2 dimensions, got torch.float32",
    ),
    "ids of 3 dimensions": (lambda: masks.document(IDS[None]), TypeError, r"got torch.int64 of shape \(1, 2, 20\)"),
    "prefix": (lambda: masks.prefix_lm(IDS), TypeError, "length must be an integer tensor of 1 dimension"),
    "table": (lambda: masks.from_table(IDS), TypeError, "table must be a bool tensor"),
    "tree": (lambda: masks.tree([-1, 1]), ValueError, r"parents\[1\] is 1; a parent comes before its node"),
    "alibi": (lambda: score_mods.alibi(0), ValueError, "heads must be an int of at least 1, got 0"),
    "slopes": (lambda: score_mods.alibi(2, torch.ones(3)), ValueError, r"slopes must be floats of shape \(2,\)"),
    "cap": (lambda: score_mods.soft_cap(-1.0), ValueError, "cap must be a positive number, got -1.0"),
    "bias": (lambda: score_mods.table_bias(IDS), TypeError, "table must be a float tensor"),
    "compose": (
        lambda: score_mods.compose(3),  # type: ignore[arg-type]
        TypeError,
        "compose: argument 0 must be a score_mod, got int",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments_are_named(what):
    make, error, text = WRONG[what]
    with pytest.raises(error, match=text):
        make()
