"""BlockMask against the dense mask it stands for, asked position by position; its operations against rebuilding."""
from __future__ import annotations

import copy
import functools
import pickle
import re
import time
import tracemalloc
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.nn.attention import flex_attention as torch_flex

from flexref import flex_attention
from flexref.blocks import build
from flexref.blocks.mask import (
    BlockMask,
    and_masks,
    create_block_mask,
    create_mask,
    noop_mask,
    not_mask,
    or_masks,
    shift_mask,
    xor_masks,
)
from flexref.blocks.nested import create_nested_block_mask
from flexref.program.mod_objects import name_of
from flexref.program.mods import traced_mod
from flexref.variants import masks, score_mods

FEW = settings(max_examples=30, deadline=None)


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def late(b, h, q_idx, kv_idx):
    return kv_idx >= q_idx + 600


def heads_differ(b, h, q_idx, kv_idx):
    return (q_idx + b) % (h + 2) == kv_idx % (h + 2)


def python_bool(b, h, q_idx, kv_idx):
    return False


def branching(b, h, q_idx, kv_idx):
    if q_idx > kv_idx + 3:
        return h == 0
    return abs(q_idx - kv_idx) < 2


@st.composite
def problems(draw):
    """(mask_mod, B, H, q_len, kv_len, block size)."""
    B, H = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    q_len, kv_len = draw(st.integers(0, 21)), draw(st.integers(0, 21))
    size = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    table = torch.rand(B, H, max(q_len, 1), max(kv_len, 1), generator=generator) < draw(st.sampled_from((0.1, 0.5, 0.95)))
    ids = torch.randint(0, 3, (B, 30), generator=generator).sort().values
    simple = [causal, heads_differ, python_bool, noop_mask, masks.sliding_window(draw(st.integers(1, 9)))]
    simple += [masks.from_table(table), masks.document(ids), masks.document(ids[0]), masks.chunked(5), nested(ids)]
    leaf = st.sampled_from(simple)
    combined = st.recursive(
        leaf,
        lambda x: st.builds(lambda op, a, b: op(a, b), st.sampled_from((and_masks, or_masks, xor_masks)), x, x)
        | st.builds(not_mask, x),
        max_leaves=3,
    )
    return draw(combined), B, H, q_len, kv_len, size


def nested(ids: Tensor):
    def mod(b, h, q_idx, kv_idx):
        return ids[b][q_idx] >= ids[b][kv_idx]

    return mod


def brute(mod, B, H, q_len, kv_len) -> Tensor:
    """The dense mask, one Python call for each position."""
    at = [(b, h, q, kv) for b in range(B) for h in range(H) for q in range(q_len) for kv in range(kv_len)]
    return torch.tensor([bool(mod(*x)) for x in at], dtype=torch.bool).reshape(B, H, q_len, kv_len)


def kinds_of(dense: Tensor, size: tuple[int, int]) -> Tensor:
    """0, 1, 2 for each block of a dense mask."""
    rows = [x for x in dense.split(size[0], 2)] if dense.shape[2] else []
    blocks = [[x for x in row.split(size[1], 3)] if dense.shape[3] else [] for row in rows]
    B, H = dense.shape[:2]
    kinds = torch.zeros(B, H, len(blocks), -(-dense.shape[3] // size[1]), dtype=torch.int8)
    for r, row in enumerate(blocks):
        for c, block in enumerate(row):
            flat = block.reshape(B, H, -1)
            kinds[:, :, r, c] = flat.any(-1).to(torch.int8) + flat.all(-1).to(torch.int8)
    return kinds


def allowed(mask: BlockMask) -> Tensor:
    """What a mask means, as R3 says: listed, and (full or mask_mod)."""
    listed, full = mask.listed()
    return listed & (full | brute(mask.mask_mod, *mask.shape))


def always_traced(traced: bool):
    return mock.patch.object(build, "_WORTH_TRACING", 0 if traced else 1 << 60)


@FEW
@given(problems(), st.booleans(), st.sampled_from((7, 64, 1 << 20)))
def test_blocks_are_those_of_the_dense_mask(problem, traced, at_once):
    mod, *shape, size = problem
    with always_traced(traced), mock.patch.object(build, "_POSITIONS", at_once):
        mask = create_block_mask(mod, *shape, device="cpu", BLOCK_SIZE=size)
        assert torch.equal(create_mask(mod, *shape, device="cpu"), brute(mod, *shape))
    dense = brute(mod, *shape)
    assert torch.equal(mask._kinds(), kinds_of(dense, size))
    assert torch.equal(allowed(mask), dense)
    assert torch.equal(mask.to_dense(), (kinds_of(dense, size) > 0).to(torch.int32))
    mask.validate("semantic")
    covered = mask.listed()[0]
    assert mask.sparsity() == pytest.approx(100 * float((~covered).double().mean()) if dense.numel() else 0)


@FEW
@given(problems())
def test_padded_lists_name_the_same_blocks_as_the_compressed_ones(problem):
    mod, *shape, size = problem
    mask = create_block_mask(mod, *shape, device="cpu", BLOCK_SIZE=size)
    kinds = kinds_of(brute(mod, *shape), size)
    lists: Any = (
        (mask.kv_num_blocks, mask.kv_indices, kinds == 1),
        (mask.full_kv_num_blocks, mask.full_kv_indices, kinds == 2),
        (mask.q_num_blocks, mask.q_indices, (kinds == 1).mT),
        (mask.full_q_num_blocks, mask.full_q_indices, (kinds == 2).mT),
    )
    for counts, indices, wanted in lists:
        assert counts.dtype == indices.dtype == torch.int32
        assert counts.shape == wanted.shape[:3] and indices.shape == wanted.shape
        assert torch.equal(counts, wanted.sum(-1))
        used = torch.arange(wanted.shape[3]) < counts[..., None]
        assert torch.equal(wanted.gather(-1, indices.long()), used)
        assert torch.equal(indices.sort(-1).values, torch.arange(wanted.shape[3]).expand(wanted.shape))


@FEW
@given(problems(), st.booleans())
def test_operations_are_those_of_the_masks(problem, separate):
    mod, *shape, size = problem

    def made(m):
        return create_block_mask(m, *shape, device="cpu", BLOCK_SIZE=size, separate_full_blocks=separate)

    mask, other = made(mod), made(heads_differ)
    for found, wanted in (
        (mask & other, and_masks(mod, heads_differ)),
        (mask | other, or_masks(mod, heads_differ)),
        (~mask, not_mask(mod)),
    ):
        assert found == made(wanted)


@FEW
@given(st.data())
def test_resize_is_rebuild(data):
    first, second = (data.draw(st.tuples(st.integers(0, 30), st.integers(0, 30))) for _ in range(2))
    mod, size = data.draw(st.sampled_from((causal, heads_differ, masks.sliding_window(4)))), data.draw(st.integers(1, 9))
    mask = create_block_mask(mod, 2, 2, *first, device="cpu", BLOCK_SIZE=size)
    assert mask.resize(*second) == create_block_mask(mod, 2, 2, *second, device="cpu", BLOCK_SIZE=size)


def chosen(n: int, index) -> list[int]:
    return np.arange(n)[index.numpy() if isinstance(index, Tensor) else index].reshape(-1).tolist()


@FEW
@given(problems(), st.data())
def test_slices_mean_what_they_were_cut_from(problem, data):
    mod, B, H, q_len, kv_len, size = problem
    mask = create_block_mask(mod, B, H, q_len, kv_len, "cpu", size)
    dense, rows = brute(mod, B, H, q_len, kv_len), mask.grid.rows

    def index(n):
        some = st.slices(n) if n else st.just(slice(None))
        ints = st.integers(-n, n - 1) if n else some
        many = st.lists(st.integers(0, n - 1), min_size=1, max_size=3) if n else some
        return data.draw(st.one_of(some, ints, many, many.map(torch.tensor) if n else some))

    at = index(B), index(H), index(rows)
    row = chosen(rows, at[2])
    if rows and q_len % size[0] and rows - 1 in row[:-1]:
        with pytest.raises(ValueError, match="can only be the last row"):
            mask[at]
        return
    cut = mask[at]
    q = [i for r in row for i in range(r * size[0], min((r + 1) * size[0], q_len))]
    wanted = dense
    for dim, kept in enumerate((chosen(B, at[0]), chosen(H, at[1]), q)):
        wanted = wanted.index_select(dim, torch.tensor(kept, dtype=torch.int64))
    assert cut.shape == tuple(wanted.shape)
    assert torch.equal(allowed(cut), wanted)
    cut.validate("semantic")
    with always_traced(True):
        assert create_block_mask(cut.mask_mod, *cut.shape, "cpu", size) == cut


def test_an_integer_index_keeps_its_dimension_and_serves_every_batch():
    mask = create_block_mask(heads_differ, 3, 2, 40, 40, "cpu", 8)
    one = mask[2, 1, 1]
    assert one.shape == (1, 1, 8, 40)
    assert torch.equal(brute(one.mask_mod, 4, 4, 8, 40), brute(heads_differ, 3, 2, 40, 40)[2:, 1:, 8:16].expand(4, 4, 8, 40))
    with pytest.raises(IndexError, match="index 3 of batches is out of range: there are 3"):
        mask[3]
    with pytest.raises(TypeError, match="index of heads must be an int, a slice or ints, got str"):
        mask[:, "x"]
    with pytest.raises(IndexError, match="3 indices"):
        mask[0, 0, 0, 0]


@FEW
@given(problems(), st.data())
def test_rows_of_any_length_are_those_queries(problem, data):
    mod, B, H, q_len, kv_len, size = problem
    start = data.draw(st.integers(0, q_len))
    stop = data.draw(st.integers(start, q_len))
    mask = create_block_mask(mod, B, H, q_len, kv_len, "cpu", size).rows(start, stop)
    assert torch.equal(allowed(mask), brute(mod, B, H, q_len, kv_len)[:, :, start:stop])


def by_hand(**changes: Any) -> BlockMask:
    """Row 0 lists block 1 full; row 1 lists block 0 to be asked, and not block 1."""
    counts, indices = torch.tensor([[[0, 1]]]), torch.tensor([[[[9], [0]]]])
    full = dict(full_kv_num_blocks=torch.tensor([[[1, 0]]]), full_kv_indices=torch.tensor([[[[1], [7]]]]))
    given: dict[str, Any] = dict(kv_num_blocks=counts, kv_indices=indices, seq_lengths=(7, 6), **full)
    given |= dict(BLOCK_SIZE=4, mask_mod=causal)
    return BlockMask.from_kv_blocks(**{**given, **changes})


def test_compact_lists_are_accepted_and_keep_their_meaning():
    mask = by_hand()
    dense = brute(causal, 1, 1, 7, 6)
    dense[:, :, :4, :4], dense[:, :, :4, 4:], dense[:, :, 4:, 4:] = False, True, False
    assert torch.equal(allowed(mask), dense)
    with pytest.raises(ValueError, match=r"block \(b=0, h=0\) row 0, column 0 is not listed, but mask_mod causal allows"):
        mask.validate("semantic")
    other = create_block_mask(masks.sliding_window(3), None, None, 7, 6, "cpu", 4)
    assert torch.equal(allowed(mask & other), dense & allowed(other))
    assert torch.equal(allowed(mask | other), dense | allowed(other))
    assert torch.equal(allowed(~mask), ~dense)
    assert torch.equal(allowed(mask[:, :, 1]), dense[:, :, 4:])
    assert torch.equal(allowed(mask.rows(2, 5)), dense[:, :, 2:5])
    assert torch.equal(allowed(mask.resize(5, 3)), dense[:, :, :5, :3])
    with pytest.raises(ValueError, match="nothing is known of positions beyond"):
        mask.resize(9, 6)
    agreeing = BlockMask.from_kv_blocks(ONE, TWO, BLOCK_SIZE=4, mask_mod=causal)
    assert agreeing.seq_lengths == (8, 8)
    assert torch.equal(allowed(agreeing.resize(11, 11)), brute(causal, 1, 1, 11, 11))


ONE = torch.tensor([[[1, 2]]])
TWO = torch.tensor([[[[0, 1], [0, 1]]]])
MALFORMED = {
    "column too large": (
        dict(kv_indices=torch.tensor([[[[9], [2]]]])),
        ValueError,
        "row 1 names column 2; columns are 0 to 1",
    ),
    "column negative": (dict(kv_indices=torch.tensor([[[[9], [-1]]]])), ValueError, "names column -1"),
    "count too large": (
        dict(kv_num_blocks=torch.tensor([[[0, 2]]])),
        ValueError,
        "counts 2 blocks in a row; kv_indices holds 0 to 1",
    ),
    "count negative": (dict(full_kv_num_blocks=torch.tensor([[[-1, 0]]])), ValueError, "full_kv_num_blocks counts -1"),
    "twice": (
        dict(kv_num_blocks=ONE, kv_indices=TWO * 0),
        ValueError,
        "row 1 has column 0 after 0; columns must ascend",
    ),
    "full and partial": (
        dict(kv_num_blocks=ONE, kv_indices=1 - TWO),
        ValueError,
        r"row 0, column 1 is listed both partial and full",
    ),
    "floats": (
        dict(kv_num_blocks=torch.tensor([[[0.0, 1.0]]])),
        TypeError,
        "kv_num_blocks must be a tensor of integers, got torch.float32",
    ),
    "a list": (dict(kv_indices=[[0]]), TypeError, "kv_indices must be a tensor of integers, got list"),
    "half of the full": (dict(full_kv_indices=None), ValueError, "go together"),
    "shapes": (
        dict(kv_num_blocks=torch.tensor([[[0, 1, 1]]])),
        ValueError,
        r"kv_indices \(B, H, rows, width\), got \(1, 1, 3\)",
    ),
    "full of other rows": (
        dict(full_kv_num_blocks=ONE[..., :1], full_kv_indices=TWO[..., :1, :]),
        ValueError,
        "must be alike",
    ),
    "lengths": (dict(seq_lengths=(9, 6)), ValueError, "has 2 rows, but 9 queries in blocks of 4 make 3"),
    "no length": (dict(seq_lengths=(7.5, 6)), TypeError, r"seq_lengths\[0\] must be an int, got float"),
    "block size": (dict(BLOCK_SIZE=0), ValueError, "BLOCK_SIZE must be at least 1, got 0"),
    "block sizes": (dict(BLOCK_SIZE=(4, 4, 4)), ValueError, "BLOCK_SIZE must be an int or a pair"),
    "score_mod": (dict(mask_mod=lambda s, b, h, q, k: s), TypeError, "takes 5 arguments, as a score_mod does"),
    "unknown": (dict(colour=3), TypeError, "unexpected keyword argument 'colour'"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_lists_are_refused(what):
    changes, error, text = MALFORMED[what]
    with pytest.raises(error, match=text):
        by_hand(**changes)


def test_validate_finds_what_was_done_to_a_mask():
    mask = create_block_mask(causal, None, None, 8, 8, "cpu", 4)
    mask.walk.runs.full_starts[0] = 1
    with pytest.raises(ValueError, match=r"\(b=0, h=0\) row 1, column 1 is listed both"):
        mask.validate()
    with pytest.raises(ValueError, match='level must be "structure" or "semantic"'):
        mask.validate("deep")
    mask = create_block_mask(causal, None, None, 8, 8, "cpu", 4)
    lists = mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices
    mask = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=4, mask_mod=masks.sliding_window(2), seq_lengths=(8, 8))
    mask.validate()
    with pytest.raises(ValueError, match=r"row 1, column 0 is listed full, but mask_mod sliding_window\(size=2\) masks"):
        mask.validate("semantic")


class Silent:
    def __call__(self, b, h, q_idx, kv_idx):
        pass


WRONG = {
    "no function": (3, TypeError, r"mask_mod must be a function mask_mod\(b, h, q_idx, kv_idx\), got int"),
    "three arguments": (
        lambda b, h, q: q > 0,
        TypeError,
        r"has the arguments \(b, h, q\); expected mask_mod\(b, h, q_idx, kv_idx\)",
    ),
    "score_mod": (lambda s, b, h, q, k: s, TypeError, "takes 5 arguments, as a score_mod does"),
    "float": (
        lambda b, h, q, k: (q - k) * 1.0,
        TypeError,
        "must return a bool or a bool tensor, got torch.float32; return a comparison",
    ),
    "int": (lambda b, h, q, k: 1, TypeError, "must return a bool or a bool tensor, got int"),
    "and of ints": (
        and_masks(causal, lambda b, h, q, k: q),
        TypeError,
        r"and_masks\(causal, <lambda>\) must return .* got torch.int64",
    ),
    "not of an int": (not_mask(lambda b, h, q, k: 1), TypeError, "must return a bool or a bool tensor, got int"),
    "nothing": (Silent(), TypeError, "got NoneType; does it miss a return"),
    "a row": (
        lambda b, h, q, k: torch.arange(5) > k,
        ValueError,
        r"one position, got a tensor of shape \(5,\); index every",
    ),
    "out of range": (
        masks.document(torch.zeros(9, dtype=torch.int64)),
        IndexError,
        "reads a captured tensor out of range: .*9",
    ),
    "random": (lambda b, h, q, k: torch.rand(()) > q, ValueError, "draws random numbers"),
    "device": (
        masks.document(torch.zeros(99, dtype=torch.int64, device="meta")),
        ValueError,
        "captures a tensor on meta, but is asked on cpu; move the tensor",
    ),
    "its own error": (lambda b, h, q, k: q.nonsense, AttributeError, "nonsense"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("traced", (False, True))
def test_wrong_mask_mods_are_explained(what, traced):
    mod, error, text = WRONG[what]
    with pytest.raises(error, match=text), always_traced(traced):
        create_block_mask(mod, None, None, 20, 20, "cpu", 8)


def test_an_error_inside_a_mod_says_which_mod_and_where():
    with pytest.raises(AttributeError) as caught:
        create_block_mask(lambda b, h, q, k: q.nonsense, None, None, 20, 20, "cpu")
    assert re.search(r"mask_mod <lambda> \(.*test_block_mask.py:\d+\) at \(b, h, q_idx, kv_idx\)", caught.value.__notes__[0])


SIZES = {
    "B": ((-1, 1, 8, 8), ValueError, "B must be at least 0, got -1"),
    "H": ((1, 1.0, 8, 8), TypeError, "H must be an int, got float"),
    "Q_LEN": ((1, 1, True, 8), TypeError, "Q_LEN must be an int, got bool"),
    "KV_LEN": ((1, 1, 8, -8), ValueError, "KV_LEN must be at least 0, got -8"),
}


@pytest.mark.parametrize("what", SIZES)
def test_wrong_sizes_are_named(what):
    shape, error, text = SIZES[what]
    for make in (create_block_mask, create_mask):
        with pytest.raises(error, match=text):
            make(causal, *shape, device="cpu")


def test_combining_unlike_masks_is_refused():
    mask = create_block_mask(causal, None, 2, 8, 8, "cpu", 4)
    for other, text in (
        (create_block_mask(causal, None, 3, 8, 8, "cpu", 4), "whose H is 2 and 3: it must be equal, or 1 in one of them"),
        (create_block_mask(causal, None, 2, 9, 8, "cpu", 4), "whose q_len is 8 and 9: it must be equal"),
        (create_block_mask(causal, None, 2, 8, 8, "cpu", 2), "whose q_block is 4 and 2"),
    ):
        with pytest.raises(ValueError, match=text):
            _ = mask & other
    with pytest.raises(TypeError):
        _ = mask & causal  # type: ignore[operator]
    with pytest.raises(TypeError, match="and_masks: argument 1 must be a mask_mod"):
        and_masks(causal, 3)  # type: ignore[arg-type]
    by_batch = lambda b, h, q, k: (q + b) % 2 == k % 2  # noqa: E731
    wide = create_block_mask(by_batch, 2, 1, 8, 8, "cpu", 4) | mask
    assert wide == create_block_mask(or_masks(by_batch, causal), 2, 2, 8, 8, "cpu", 4)


def test_mods_that_only_work_on_numbers_are_asked_one_by_one():
    assert torch.equal(create_mask(branching, 1, 2, 9, 9, "cpu"), brute(branching, 1, 2, 9, 9))
    assert create_block_mask(branching, 1, 2, 9, 9, "cpu", 4).sparsity() > 0

    def on_tensors(b, h, q_idx, kv_idx):
        return True if torch.abs(q_idx - kv_idx) < 3 else torch.tensor(False)

    assert torch.equal(create_mask(on_tensors, 1, 1, 6, 6, "cpu"), brute(masks.window(2, 2), 1, 1, 6, 6))


def test_reads_that_broadcasting_would_mix_up_are_right():
    # with broadcast indices t[h][0] would be a row, and would fit the key positions by accident
    t = torch.arange(12).reshape(4, 3) % 2

    def mod(b, h, q_idx, kv_idx):
        return t[h][0] > 0

    assert torch.equal(create_mask(mod, 1, 4, 3, 3, "cpu"), brute(mod, 1, 4, 3, 3))


def test_create_mask_of_a_score_mod_masks_what_is_minus_infinity():
    def score_mod(score, b, h, q_idx, kv_idx):
        return torch.where(q_idx >= kv_idx, score + h, -float("inf"))

    assert torch.equal(create_mask(score_mod, None, 2, 5, 4, "cpu"), brute(causal, 1, 2, 5, 4))
    with pytest.raises(TypeError, match=r"mod_fn .* expected mask_mod\(.*\) or score_mod\(score"):
        create_mask(lambda q, k: q, 1, 1, 4, 4, "cpu")


def test_a_default_argument_does_not_make_a_score_mod():
    assert create_mask(lambda b, h, q, k, size=2: q - k < size, 1, 1, 4, 4, "cpu").sum() == 13


def test_lengths_zero_and_blocks_larger_than_the_mask():
    for shape in ((1, 1, 0, 5), (1, 1, 5, 0), (0, 2, 5, 5), (2, 2, 0, 0)):
        mask = create_block_mask(causal, *shape, device="cpu")
        assert mask.shape == shape and mask.sparsity() == 0 and mask.to_dense().sum() == 0
        assert str(mask) and repr(mask) and mask == pickle.loads(pickle.dumps(mask)) and ~(~mask) == mask
    mask: Any = create_block_mask(noop_mask, None, None, 10, 12, "cpu")
    assert mask.sparsity() == 0.0 and mask.full_kv_num_blocks.tolist() == [[[1]]]
    assert create_block_mask(causal, None, None, 10, 12, "cpu", 1 << 30).BLOCK_SIZE == (1 << 30, 1 << 30)
    large: Any = create_block_mask(causal, None, None, 3000, 3000, "cpu", 2999)
    assert large.kv_num_blocks.tolist() == [[[1, 0]]] and large.full_kv_num_blocks.tolist() == [[[0, 2]]]


def test_torch_names_and_signatures_are_kept():
    mask = create_block_mask(causal, None, None, 384, 256, device="cpu", _compile=True, compute_dq_write_order=False)
    theirs = torch_flex.create_block_mask(causal, None, None, 384, 256, device="cpu")
    ours: Any = mask.as_tuple()
    other: Any = theirs.as_tuple()
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(ours, other, strict=False))
    assert mask.as_tuple(False)[0] == (384, 256) and mask.shape == theirs.shape and mask.numel() == theirs.numel()
    assert torch.equal(mask.to_dense(), theirs.to_dense()) and mask.sparsity() == pytest.approx(theirs.sparsity())
    names = [name for name in dir(theirs) if not name.startswith("_") and not name.startswith("dq_")]
    assert all(hasattr(mask, name) for name in names)
    whole = create_block_mask(causal, None, None, 384, 256, "cpu", separate_full_blocks=False)
    assert whole.full_kv_num_blocks is None and whole.full_q_indices is None
    assert torch.equal(whole.to_dense(), mask.to_dense())
    fields = {n: getattr(theirs, n) for n in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")}
    assert BlockMask((384, 256), **fields, BLOCK_SIZE=(128, 128), mask_mod=causal, dq_write_order=None) == mask


@settings(max_examples=10, deadline=None)
@given(problems())
def test_to_torch_and_back_is_the_same_mask(problem):
    mod, B, H, q_len, kv_len, size = problem
    mask = create_block_mask(mod, B, H, q_len, kv_len, "cpu", size)
    if mask.grid.columns and mask.grid.rows:
        assert BlockMask.from_torch(mask.to_torch()) == mask


def test_from_torch():
    theirs = torch_flex.create_block_mask(causal, 1, 2, 384, 256, device="cpu")
    assert BlockMask.from_torch(theirs) == create_block_mask(causal, 1, 2, 384, 256, "cpu")
    # torch counts what lies behind the end as masked, so its last blocks are never full
    ragged = torch_flex.create_block_mask(causal, 1, 1, 30, 20, device="cpu", BLOCK_SIZE=8)
    assert torch.equal(allowed(BlockMask.from_torch(ragged)), brute(causal, 1, 1, 30, 20))
    with pytest.raises(ValueError, match="is a slice, which has lost its mask_mod"):
        BlockMask.from_torch(theirs[:, 0])
    nothing = torch_flex.create_block_mask(torch_flex.noop_mask, None, None, 30, 20, device="cpu")
    assert BlockMask.from_torch(nothing).mask_mod is noop_mask
    assert BlockMask.from_torch(nothing).to_torch().mask_mod is torch_flex.noop_mask


def test_torch_runs_our_masks():
    query = torch.randn(1, 2, 50, 16)
    mod = and_masks(masks.sliding_window(9), masks.document(masks.document_ids([20, 30])))
    mask = create_block_mask(mod, None, None, 50, 50, "cpu", 16)
    with mock.patch.object(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True):
        out = torch_flex.flex_attention(query, query, query, block_mask=mask.to_torch())
    dense = create_mask(mod, 1, 1, 50, 50, "cpu")
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(query, query, query, dense))


def test_equality_and_pickling():
    window = and_masks(causal, masks.sliding_window(5), not_mask(masks.document(torch.arange(20) // 7)))
    mask = create_block_mask(window, None, None, 20, 20, "cpu", 4)
    for same in (mask, pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask), mask.to("cpu")):
        assert same == mask and hash(same) == hash(mask) and same.mask_mod == window
    cut = mask[:, :, torch.tensor([3, 1])]
    assert pickle.loads(pickle.dumps(cut)) == cut and cut != mask
    assert mask != create_block_mask(causal, None, None, 20, 20, "cpu", 4)
    assert mask != create_block_mask(window, None, None, 20, 20, "cpu", 5)
    assert create_block_mask(lambda *at: causal(*at), 1, 1, 9, 9, "cpu") != create_block_mask(causal, 1, 1, 9, 9, "cpu")
    assert (mask == 3) is False
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(create_block_mask(lambda b, h, q, k: q > k, 1, 1, 9, 9, "cpu"))


def test_to_another_device_takes_along_what_the_mod_holds():
    ids = torch.arange(20) // 7

    def closure(b, h, q_idx, kv_idx):
        return ids[q_idx] == ids[kv_idx]

    mask = create_block_mask(and_masks(closure, masks.document(ids), causal), None, None, 20, 20, "cpu", 4)
    moved = mask.to("meta")
    assert moved.device.type == "meta" and all(x.device.type == "meta" for x in moved.runs)
    held = moved.mask_mod.mods  # type: ignore[attr-defined]
    assert held[0].__closure__[0].cell_contents.is_meta and held[1].ids.is_meta and held[2] is causal
    assert ids.device.type == "cpu" and mask.to("cpu").mask_mod.mods[0] is closure  # type: ignore[attr-defined]


def test_pictures():
    mask = create_block_mask(causal, None, None, 1000, 1000, "cpu", 100)
    lines = mask.to_string().splitlines()
    assert lines[0] == "(0, 0)" and lines[1] == "░░" + "  " * 9 and lines[10] == "██" * 9 + "░░"
    assert mask.to_string((5, 5)).splitlines()[1:3] == ["░░" + "  " * 4, "██░░" + "  " * 3]
    assert len(mask.to_string(-1).splitlines()) == 11 and len(mask.to_string((3, 3)).splitlines()) == 4
    many = create_block_mask(heads_differ, 2, 4, 20, 20, "cpu", 10)
    assert many.to_string(limit=3).endswith("... and 5 more") and many.to_string(limit=3).count("(") == 3
    with pytest.raises(ValueError, match="grid_size must be a positive int, -1, or a pair"):
        mask.to_string(0)
    assert str(mask).startswith("BlockMask(shape=(1, 1, 1000, 1000), sparsity=45.00%,")
    assert "blocks=(partial=10, full=45, of=100)" in repr(mask) and "mask_mod=causal" in repr(mask)


def test_shifted_masks_are_steps_of_decoding():
    offset = torch.tensor(7)
    for by in (7, offset):
        step = create_block_mask(shift_mask(causal, q_offset=by), None, None, 1, 20, "cpu", 4)
        assert torch.equal(allowed(step), brute(causal, 1, 1, 20, 20)[:, :, 7:8])


def test_torch_s_adjust_no_longer_crashes():
    mask = create_block_mask(late, None, None, 1024, 1024, "cpu")
    assert mask._adjust(512, 512) == create_block_mask(late, None, None, 512, 512, "cpu")


@pytest.mark.parametrize("traced", (False, True))
def test_building_is_quick(traced):
    with always_traced(traced):
        create_block_mask(causal, None, None, 2048, 2048, "cpu")
        before = time.process_time()
        mask = create_block_mask(causal, None, None, 8192, 8192, "cpu")
    assert time.process_time() - before < (1 if traced else 2)
    assert mask.sparsity() == pytest.approx(100 * (1 - (64 * 65 / 2) / 64**2))


def test_a_long_mask_is_never_held_dense():
    created = []

    class Largest(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and not is_batchedtensor(result):
                created.append(result.untyped_storage().nbytes())
            return result

    tracemalloc.start()
    with Largest():
        mask = create_block_mask(masks.sliding_window(1000), None, 2, 65536, 65536, "cpu")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(created) < 32 << 20 and peak < 32 << 20  # dense it is 8 GiB
    held = sum(x.numel() * x.element_size() for x in mask.csr)
    assert held < 64 << 10
    assert len(mask.csr.indices) + len(mask.csr.full_indices) == 2 * sum(min(r, 8) + 1 for r in range(512))


def test_rows_and_columns_are_ordered_by_work():
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 48, 64, device="cpu", BLOCK_SIZE=16)
    assert mask.walk.row_order.tolist() == [2, 1, 0] and mask.walk.row_order.dtype == torch.int32
    assert mask.walk.column_order.tolist() == [0, 1, 2, 3]
    upside_down = create_block_mask(lambda b, h, q, k: (q >= k) ^ (h == 1), None, 2, 48, 48, device="cpu", BLOCK_SIZE=16)
    counts = (upside_down.csr.offsets.diff() + upside_down.csr.full_offsets.diff())[upside_down.walk.row_order.long()]
    assert (counts.diff() <= 0).all() and sorted(upside_down.walk.row_order.tolist()) == list(range(6))


def sliced_mod():
    return create_block_mask(heads_differ, 2, 2, 20, 20, "cpu", 4)[1, 0].mask_mod


MADE = {
    "and_masks": lambda: and_masks(causal, masks.sliding_window(3)),
    "or_masks": lambda: or_masks(causal, masks.document(torch.arange(20) // 7)),
    "xor_masks": lambda: xor_masks(causal, noop_mask),
    "not_mask": lambda: not_mask(causal),
    "shift_mask": lambda: shift_mask(causal, 3),
    "slice": sliced_mod,
    "rows": lambda: create_block_mask(causal, 1, 1, 20, 20, "cpu", 4).rows(3, 9).mask_mod,
    "listed": lambda: by_hand()._agreeing().mask_mod,
    "window": lambda: masks.sliding_window(3),
    "soft_cap": lambda: score_mods.soft_cap(3.0),
    "compose": lambda: score_mods.compose(score_mods.soft_cap(3.0), score_mods.relative_position),
}


@pytest.mark.parametrize("what", MADE)
def test_a_name_is_set_as_on_a_function_and_is_no_part_of_what_a_mod_is(what):
    def local(b, h, q_idx, kv_idx):
        """Says something."""

    plain, named, wrapping = (MADE[what]() for _ in range(3))
    text = repr(plain)
    assert plain.__name__ == text
    named.__name__ = "mine"
    functools.update_wrapper(wrapping, local)
    wrapping.__qualname__ = "outer.local"
    assert repr(named) == f"<mine: {text}>" and name_of(named) == "mine"
    assert (wrapping.__name__, wrapping.__doc__, wrapping.__wrapped__) == ("local", "Says something.", local)
    assert (wrapping.__module__, wrapping.__qualname__) == (__name__, "outer.local")
    for other in (named, wrapping):
        assert other == plain and plain == other and hash(other) == hash(plain) and {plain: 1}[other] == 1
        for same in (copy.copy(other), copy.deepcopy(other), pickle.loads(pickle.dumps(other)), other.to("cpu")):
            assert same == plain and same.__name__ == other.__name__ and same.__doc__ == other.__doc__
        mask_or_score = "score" if isinstance(plain, (score_mods.soft_cap, score_mods.compose)) else "mask"
        kinds = [traced_mod(x, mask_or_score, torch.float32) for x in (plain, other)]
        assert kinds[0].graph == kinds[1].graph and kinds[0].names == kinds[1].names
    with pytest.raises(TypeError, match="__name__ of a mod must be a str, as of a function, got int"):
        plain.__name__ = 3  # type: ignore[assignment]


def test_a_set_name_is_in_messages_and_prints():
    mod = and_masks(causal, lambda b, h, q, k: q)
    mod.__name__ = "mine"  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="mask_mod mine must return a bool"):
        create_block_mask(mod, None, None, 20, 20, "cpu")
    named = not_mask(causal)
    named.__name__ = "late"  # type: ignore[attr-defined]
    mask, same = (create_block_mask(m, None, None, 20, 20, "cpu", 4) for m in (named, not_mask(causal)))
    assert "mask_mod=late" in repr(mask) and mask == same and repr(and_masks(named, causal)) == "and_masks(late, causal)"


def test_attributes_that_a_mod_may_read_are_part_of_what_it_is():
    class Mine(masks.MaskMod):
        def __init__(self, values):
            self.values = values

        def __call__(self, b, h, q_idx, kv_idx):
            return q_idx >= self.values[0]

    assert Mine([1]) == Mine([1]) != Mine([2])
    for make in (lambda: [torch.arange(3)], lambda: {"a": torch.arange(3)}, lambda: (torch.arange(3), [torch.ones(2)])):
        assert Mine(make()) == Mine(make())
    assert Mine({"a": torch.arange(3)}) != Mine({"a": torch.arange(4)}) and Mine(np.arange(3)) != Mine(np.arange(3))
    other = Mine([1])
    other.note = "read by nobody, but who knows"  # type: ignore[attr-defined]
    assert other != Mine([1])


def test_what_a_mod_wraps_does_not_say_how_it_is_called():
    @functools.wraps(causal)
    def score_mod(score, b, h, q_idx, kv_idx):
        return torch.where(causal(b, h, q_idx, kv_idx), score, -float("inf"))

    @functools.wraps(score_mod.__wrapped__)
    def passed_on(*at):
        return causal(*at)

    for mod in (score_mod, passed_on, causal):
        assert torch.equal(create_mask(mod, 1, 1, 5, 5, "cpu"), brute(causal, 1, 1, 5, 5))
    with pytest.raises(TypeError, match="takes 5 arguments, as a score_mod does"):
        create_block_mask(score_mod, 1, 1, 5, 5, "cpu")


def jagged(lengths, heads=2, width=8):
    parts = [torch.randn(n, heads, width) for n in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)


def by_sequence(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & (kv_idx >= b - h)


@pytest.mark.parametrize("kv_lengths", (None, (3, 8, 1, 4)))
def test_a_nested_mask_is_each_sequence_s_own(kv_lengths):
    lengths = (5, 9, 0, 3)
    q_nt = jagged(lengths)
    kv_nt = None if kv_lengths is None else jagged(kv_lengths)
    mask = create_nested_block_mask(by_sequence, None, 2, q_nt, kv_nt, BLOCK_SIZE=4, _compile=True)
    wanted = torch.zeros(1, 2, sum(lengths), sum(kv_lengths or lengths), dtype=torch.bool)
    q_start = kv_start = 0
    for i, (n, m) in enumerate(zip(lengths, kv_lengths or lengths, strict=True)):
        for h in range(2):
            for q in range(n):
                for kv in range(m):
                    wanted[0, h, q_start + q, kv_start + kv] = by_sequence(i, h, q, kv)
        q_start, kv_start = q_start + n, kv_start + m
    assert torch.equal(allowed(mask), wanted) and pickle.loads(pickle.dumps(mask)) == mask
    mask.validate("semantic")


def test_packed_attention_is_that_of_each_sequence():
    lengths = (5, 9, 3)
    query, key, value = (jagged(lengths) for _ in range(3))
    table, starts = torch.ones(17), torch.tensor([0, 5, 14])
    # a place that only a longer sequence has would be read out of range for the last one
    mod = and_masks(causal, lambda b, h, q, k: table[starts[b] + k] > 0)
    mask = create_nested_block_mask(mod, 1, 1, query, BLOCK_SIZE=4)
    out = flex_attention(*(x.values()[None] for x in (query, key, value)), block_mask=mask)
    nested = torch.nested.nested_tensor_from_jagged(out[0], query.offsets(), jagged_dim=2)  # type: ignore[attr-defined]
    for i, parts in enumerate(zip(nested.unbind(), query.unbind(), key.unbind(), value.unbind(), strict=True)):
        found, *one = parts
        dense = create_mask(causal, 1, 1, lengths[i], lengths[i], "cpu")
        torch.testing.assert_close(found[None], torch.nn.functional.scaled_dot_product_attention(*(x[None] for x in one), dense))


def test_what_is_not_nested_is_told_what_to_use():
    dense, nested = torch.randn(3, 2, 5, 8), jagged((5, 9))
    holes = torch.nested.narrow(torch.randn(2, 9, 8), 1, torch.tensor([0, 3]), torch.tensor([4, 5]), torch.jagged)
    for wrong, error, text in (
        ((dense,), TypeError, "q_nt must be a nested tensor of layout torch.jagged, got layout torch.strided.*masks.document"),
        (([5, 9],), TypeError, "q_nt must be a nested tensor of layout torch.jagged, got list"),
        ((nested, dense), TypeError, "kv_nt must be a nested tensor"),
        ((nested, jagged((5, 9, 1))), ValueError, "q_nt has 2 sequences on cpu, kv_nt 3 on cpu"),
        ((holes,), ValueError, "q_nt has holes between its sequences"),
    ):
        with pytest.raises(error, match=text):
            create_nested_block_mask(causal, 1, 1, *wrong)  # type: ignore[arg-type]
