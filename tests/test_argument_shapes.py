"""Lengths and heads in each other's place: the error of the mismatch says so, and other errors do not."""

from __future__ import annotations

import pytest
import torch

from flexref import create_block_mask, flex_attention
from flexref.argument_shapes import check_shapes

HINT = r"came as \(B, L, H, D\), pass x.transpose\(1, 2\): heads go before length"


@pytest.mark.parametrize(
    ("query", "key", "value", "enable_gqa", "names"),
    [
        ((2, 64, 4, 8), (2, 32, 4, 8), (2, 32, 4, 8), False, "query and key and value"),
        ((2, 64, 8, 16), (2, 31, 2, 16), (2, 31, 2, 16), True, "query and key and value"),
        ((2, 1, 4, 8), (2, 32, 4, 8), (2, 32, 4, 8), False, "query and key and value"),
        ((2, 4, 64, 8), (2, 64, 4, 8), (2, 64, 4, 8), False, "key and value"),
        ((2, 64, 4, 8), (2, 4, 32, 8), (2, 4, 32, 8), False, "query"),
        ((2, 4, 64, 8), (2, 4, 64, 8), (2, 64, 4, 8), False, "value"),
        ((2, 4, 64, 8), (2, 64, 4, 8), (2, 4, 64, 8), False, "key"),
    ],
)
def test_a_mismatch_that_transposing_mends_says_so(query, key, value, enable_gqa, names):
    with pytest.raises(ValueError, match=f"; if {names} {HINT}"):
        check_shapes(query, key, value, enable_gqa)


@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        ((2, 8, 64, 16), (2, 2, 64, 16), (2, 2, 64, 16)),
        ((2, 8, 1, 16), (2, 2, 512, 16), (2, 2, 512, 16)),
        ((2, 4, 64, 8), (2, 4, 64, 9), (2, 4, 64, 9)),
        ((2, 4, 64, 8), (3, 4, 64, 8), (3, 4, 64, 8)),
        ((2, 4, 64, 8), (2, 4, 64, 8), (2, 4, 63, 8)),
    ],
)
def test_another_mismatch_does_not(query, key, value):
    with pytest.raises(ValueError) as caught:
        check_shapes(query, key, value, False)
    assert "transpose" not in str(caught.value)


def test_a_block_mask_shows_that_all_three_are_turned():
    mask = create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    x = torch.randn(2, 64, 4, 8)
    with pytest.raises(ValueError, match=rf"lengths \(query, key\) \(64, 64\), but query and key have \(4, 4\).*{HINT}"):
        flex_attention(x, x, x, block_mask=mask)


@pytest.mark.parametrize("backend", ["numba_cpu", "reference"])
def test_a_captured_dimension_of_one_is_not_broadcast(backend):
    """As torch's flex_attention: a T5 bias (1, H, L, S) that is indexed with b where there are several batches."""
    bias, x = torch.zeros(1, 2, 8, 8), torch.randn(3, 2, 8, 8)
    with pytest.raises(IndexError, match=r"bias of shape \(1, 2, 8, 8\) .* in dimension 0.*; index it with 0, since"):
        flex_attention(x, x, x, lambda s, b, h, i, j: s + bias[b, h, i, j], backend=backend)
    flex_attention(x, x, x, lambda s, b, h, i, j: s + bias[0, h, i, j], backend=backend)
