"""Which reads are proved to be in range from the values of the index tensors, and that a write asks anew."""

from __future__ import annotations

import pytest
import torch

from flexref.arguments import prepare
from flexref.index_error import named_index_error
from flexref.index_proof import proved_in_range

SIZE = 12
table = torch.arange(5.0)


def proved(score_mod=None, mask_mod=None, q_len=SIZE, kv_len=SIZE) -> bool:
    query, key = torch.ones(1, 2, q_len, 4), torch.ones(1, 2, kv_len, 4)
    return proved_in_range(*prepare(query, key, key, score_mod, mask_mod=mask_mod))


@pytest.mark.parametrize(
    ("values", "in_range"), [([0, 4], True), ([-5, 3], True), ([0, 5], False), ([-6, 0], False)]
)
def test_an_index_from_a_tensor(values, in_range):
    pick = torch.tensor(values * (SIZE // 2))
    assert proved(lambda s, b, h, q, k: s + table[pick[k]]) is in_range
    assert proved(lambda s, b, h, q, k: s + table[pick[k] % 5])
    assert not proved(lambda s, b, h, q, k: s + table[pick[k] + 9])


def test_a_write_is_seen():
    pick = torch.zeros(SIZE, dtype=torch.int64)

    def mod(score, b, h, q_idx, kv_idx):
        return score + table[pick[kv_idx]]

    assert proved(mod)
    pick[3] = 5
    assert not proved(mod)
    pick[3] = 4
    assert proved(mod)


def test_a_captured_number_is_known():
    def mod(shift):
        return lambda score, b, h, q_idx, kv_idx: score + table[(q_idx + shift) // 4]

    assert proved(mod(0)) and not proved(mod(100)) and proved(mod(8))


def test_a_masked_position_is_not_asked_for():
    # an index that only the mask keeps in range is not proved; a kernel checks it at the allowed positions
    edge = torch.arange(float(SIZE))
    assert not proved(lambda s, b, h, q, k: s + edge[k + 1], lambda b, h, q, k: k < SIZE - 1)


def test_a_mask_and_what_reads_nothing():
    flag = torch.ones(SIZE, dtype=torch.bool)
    assert proved() and proved(lambda s, b, h, q, k: s * 2) and proved(mask_mod=lambda b, h, q, k: flag[k])
    with pytest.raises(IndexError):
        proved(mask_mod=lambda b, h, q, k: flag[k + 1])
    assert proved(lambda s, b, h, q, k: s + table[(s * 100).to(torch.int64)], q_len=0)
    assert not proved(lambda s, b, h, q, k: s + table[(s * 100).to(torch.int64)])


def test_unsigned_indices():
    for dtype in (torch.uint8, torch.uint16, torch.uint32):
        assert proved_in_range(*_with(torch.full((SIZE,), 4, dtype=dtype)))
        assert not proved_in_range(*_with(torch.full((SIZE,), 5, dtype=dtype)))


def _with(pick):
    x = torch.ones(1, 2, SIZE, 4)
    return prepare(x, x, x, lambda s, b, h, q, k: s + table[pick[k].to(torch.int64)])


def test_a_long_search_for_the_bad_read_goes_row_by_row(monkeypatch):
    monkeypatch.setattr("flexref.index_error._POSITIONS", 7)
    pick = torch.zeros(SIZE, dtype=torch.int64)
    x = torch.ones(1, 2, SIZE, 4)

    def mod(score, b, h, q_idx, kv_idx):
        return score + table[pick[kv_idx] + q_idx - 7]

    error = named_index_error(*prepare(x, x, x, mod, mask_mod=lambda b, h, q, k: q >= 2))
    assert error is None
    error = named_index_error(*prepare(x, x, x, mod, mask_mod=lambda b, h, q, k: q >= 0))
    assert "table of shape (5,) is indexed with -7" in str(error)
