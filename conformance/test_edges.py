"""Malformed input: the error is of the right type, names the argument, and comes before any backend runs.

And what is unusual but allowed, for each backend: infinities, tiny and huge values, one query head of many.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexref.arguments import prepare
from flexref.backend import Backend
from flexref.blocks.mask import BlockMask, create_block_mask
from flexref.conformance.cases import Case
from flexref.conformance.checks import check_case
from flexref.errors import TraceError

ALL = ("query", "key", "value", "captured")


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def tensors(**changes) -> dict:
    query, key = torch.ones(2, 4, 8, 16), torch.ones(2, 2, 8, 16)
    return dict(dict(query=query, key=key, value=key, enable_gqa=True), **changes)


def one(*shape: int, **how) -> torch.Tensor:
    return torch.ones(*shape, **how)


BAD: dict[str, tuple[dict, type[Exception], str]] = {
    "query is a list": (dict(query=[[1.0]]), TypeError, "query"),
    "query has 3 dimensions": (dict(query=one(4, 8, 16)), ValueError, "query"),
    "integers": (dict(query=one(2, 4, 8, 16, dtype=torch.int64)), TypeError, "query"),
    "complex": (dict(value=one(2, 2, 8, 16, dtype=torch.complex64)), TypeError, "value"),
    "sparse": (dict(key=one(2, 2, 8, 16).to_sparse()), TypeError, "key"),
    "devices differ": (dict(key=one(2, 2, 8, 16, device="meta")), ValueError, "key.*device|key is on"),
    "dtypes differ": (dict(key=one(2, 2, 8, 16, dtype=torch.float64)), TypeError, "key"),
    "head sizes differ": (dict(key=one(2, 2, 8, 15)), ValueError, "key"),
    "key and value lengths differ": (dict(value=one(2, 2, 7, 16)), ValueError, "value"),
    "key and value heads differ": (dict(value=one(2, 4, 8, 16)), ValueError, "value"),
    "batches differ": (dict(key=one(3, 2, 8, 16), value=one(3, 2, 8, 16)), ValueError, "batch"),
    "heads do not divide": (dict(query=one(2, 5, 8, 16)), ValueError, "heads"),
    "grouped heads not asked for": (dict(enable_gqa=False), ValueError, "enable_gqa"),
    "no heads": (dict(key=one(2, 0, 8, 16), value=one(2, 0, 8, 16)), ValueError, "head"),
    "head size 0": (dict(query=one(2, 4, 8, 0), key=one(2, 2, 8, 0)), ValueError, "head_dim"),
    "scale is NaN": (dict(scale=math.nan), ValueError, "scale"),
    "scale is infinite": (dict(scale=math.inf), ValueError, "scale"),
    "scale is a string": (dict(scale="0.5"), TypeError, "scale"),
    "score_mod is no function": (dict(score_mod=3), TraceError, "score_mod"),
    "score_mod has 4 arguments": (dict(score_mod=causal), TraceError, "score_mod"),
    "mask_mod has 5 arguments": (dict(mask_mod=lambda s, b, h, q_idx, kv_idx: s > 0), TraceError, "mask_mod"),
    "score_mod gives a bool": (dict(score_mod=lambda s, b, h, q_idx, kv_idx: s > 0), TraceError, "score_mod"),
    "mask_mod gives a number": (dict(mask_mod=lambda b, h, q_idx, kv_idx: q_idx), TraceError, "mask_mod"),
    "score_mod gives nothing": (dict(score_mod=lambda s, b, h, q_idx, kv_idx: None), TraceError, "score_mod"),
    "block_mask is a function": (dict(block_mask=causal), TypeError, "block_mask"),
    "block_mask for other lengths": (dict(block_mask=(None, None, 8, 9)), ValueError, "block_mask"),
    "block_mask for other batches": (dict(block_mask=(3, None, 8, 8)), ValueError, "block_mask"),
    "block_mask for other heads": (dict(block_mask=(None, 2, 8, 8)), ValueError, "block_mask"),
    "mask_mod and block_mask": (dict(mask_mod=causal, block_mask=(None, None, 8, 8)), ValueError, "mask_mod"),
}


@pytest.mark.parametrize("what", BAD)
def test_malformed_call(what: str):
    changes, error, names = BAD[what]
    if isinstance(changes.get("block_mask"), tuple):
        changes = dict(changes, block_mask=create_block_mask(causal, *changes["block_mask"]))
    with pytest.raises(error, match=names):
        prepare(**tensors(**changes))


def _lists(**changes) -> dict:
    """A sound block mask of 2 x 2 blocks of 16, as from_kv_blocks takes it."""
    counts, indices = torch.tensor([[[1, 2]]]), torch.tensor([[[[0, 1], [0, 1]]]])
    given = dict(
        kv_num_blocks=counts, kv_indices=indices, BLOCK_SIZE=16, mask_mod=causal, seq_lengths=(32, 32)
    )
    return dict(given, **changes)


LISTS: dict[str, dict] = {
    "index too large": dict(kv_indices=torch.tensor([[[[2, 1], [0, 1]]]])),
    "index negative": dict(kv_indices=torch.tensor([[[[-1, 1], [0, 1]]]])),
    "count too large": dict(kv_num_blocks=torch.tensor([[[1, 3]]])),
    "count negative": dict(kv_num_blocks=torch.tensor([[[-1, 2]]])),
    "listed twice": dict(kv_indices=torch.tensor([[[[0, 1], [1, 1]]]])),
    "block size 0": dict(BLOCK_SIZE=0),
    "block size negative": dict(BLOCK_SIZE=(16, -16)),
    "too few rows for the length": dict(seq_lengths=(64, 32)),
    "counts and indices of different shape": dict(kv_num_blocks=torch.tensor([[[1, 2, 1]]])),
    "counts of floats": dict(kv_num_blocks=torch.tensor([[[1.0, 2.0]]])),
    "listed partial and full": dict(
        full_kv_num_blocks=torch.tensor([[[1, 0]]]), full_kv_indices=torch.tensor([[[[0, 1], [0, 1]]]])
    ),
}


@pytest.mark.parametrize("what", LISTS)
def test_malformed_block_lists(what: str):
    x = one(1, 1, 32, 8)
    with pytest.raises((ValueError, TypeError, IndexError)):
        prepare(x, x, x, block_mask=BlockMask.from_kv_blocks(**_lists(**LISTS[what])))


def test_sound_block_lists_are_accepted():
    x = one(1, 1, 32, 8)
    prepare(x, x, x, block_mask=BlockMask.from_kv_blocks(**_lists()))


DIMENSION = st.sampled_from((0, 1, 2, 3, 4))


@given(query=st.tuples(*[DIMENSION] * 4), key=st.tuples(*[DIMENSION] * 4), value=st.tuples(*[DIMENSION] * 4))
def test_any_shapes_are_understood_or_refused(query, key, value):
    x: dict[str, Any] = dict(query=one(*query), key=one(*key), value=one(*value), enable_gqa=True)
    sound = key[:3] == value[:3] and key[3] == query[3] and query[3] * value[3] > 0
    sound = sound and key[0] in (1, query[0]) and query[1] > 0 and key[1] > 0 and query[1] % key[1] == 0
    if sound:
        problem, _ = prepare(**x)
        assert (problem.q_len, problem.kv_len, problem.value_dim) == (query[2], key[2], value[3])
    else:
        with pytest.raises(ValueError, match="query|key|value"):
            prepare(**x)


def test_infinite_values(backend: Backend):
    case = Case(
        q_len=20, kv_len=33, score="torch.where(kv_idx == 4, 1000.0 * gain * 0 - inf, score)", max_scores=True
    )
    check_case(backend, case)
    check_case(
        backend, Case(q_len=20, kv_len=33, score="score * torch.where(q_idx == 3, inf, 1.0)", max_scores=True)
    )


def test_numbers_at_the_ends_of_a_type(backend: Backend):
    for score in ("score * 1e30", "score * 1e-30", "score - 1e30", "score * 1e-42"):
        check_case(backend, Case(q_len=9, kv_len=33, score=score, wants=("value",)))
    # half-precision products over 65504 are sums in float32
    check_case(
        backend,
        Case(q_len=9, kv_len=33, dtype="float16", values="large", head_dim=128, scale=0.001, wants=ALL),
    )


def test_scale_zero_and_negative(backend: Backend):
    for scale in (0.0, -1.0, 1e-3):
        check_case(backend, Case(q_len=9, kv_len=33, scale=scale, wants=ALL))


def test_empty_batch(backend: Backend):
    check_case(backend, Case(batch=0, kv_len=5, wants=("query", "key", "value")))
