"""BlockMask.stats against counting the dense mask, block by block; at a million tokens against sums in closed form."""
from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexref.blocks import counts
from flexref.blocks.mask import BlockMask, create_block_mask, create_mask, noop_mask
from flexref.variants import masks
from tests.test_block_mask import allowed, causal, heads_differ, kinds_of, problems

MILLION = 1 << 20


def listed_blocks(mask: BlockMask):
    """(b, h, row, column, height, width) of each."""
    q_len, kv_len = mask.seq_lengths
    q_block, kv_block = mask.BLOCK_SIZE
    for b, h, row, column in mask.to_dense().nonzero().tolist():
        yield b, h, row, column, min(q_block, q_len - row * q_block), min(kv_block, kv_len - column * kv_block)


def uneven(work: torch.Tensor) -> float:
    return float(work.max() / work.double().mean()) if work.sum() else 1.0


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from((1, 3, 512)), st.booleans())
def test_counts_are_those_of_the_dense_mask(problem, tile, separate):
    mod, *shape, size = problem
    mask = create_block_mask(mod, *shape, device="cpu", BLOCK_SIZE=size, separate_full_blocks=separate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counts, "_TILE", tile)
        found = mask.stats(head_dim=8)
    dense, kinds = allowed(mask), kinds_of(allowed(mask), size)
    blocks = list(listed_blocks(mask))
    assert found.shape == mask.shape and found.positions == dense.numel() and found.blocks == kinds.numel()
    assert found.allowed == int(dense.sum())
    assert found.full == (int((kinds == 2).sum()) if separate else 0)
    assert found.full + found.partial == int((kinds > 0).sum())
    assert found.computed == sum(height * width for *_, height, width in blocks)
    work = torch.zeros(kinds.shape, dtype=torch.int64)
    for b, h, row, column, height, width in blocks:
        work[b, h, row, column] = height * width
    assert found.row_imbalance == pytest.approx(uneven(work.sum(3)))
    assert found.column_imbalance == pytest.approx(uneven(work.sum(2)))
    assert found.head_imbalance == pytest.approx(uneven(work.sum((2, 3))))


def test_flops_and_bytes_block_by_block():
    """A walk over the blocks, in words what MaskStats says, with other head sizes for key and value."""
    B, H, Hkv, q_len, kv_len, E, Ev, size, acc = 2, 6, 3, 300, 200, 40, 24, 2, 4
    mask = create_block_mask(masks.sliding_window(70), None, None, q_len, kv_len, device="cpu", BLOCK_SIZE=(64, 32))
    found = mask.stats(E, Ev, torch.float16, batch=B, heads=H, kv_heads=Hkv)
    flops, moved = [0, 0], [0, 0]
    for *_, height, width in itertools.chain.from_iterable(listed_blocks(mask) for _ in range(B * H)):
        flops[0] += 2 * height * width * E + 2 * height * width * Ev
        flops[1] += 3 * (2 * height * width * E) + 2 * (2 * height * width * Ev)
        moved[0] += width * (E + Ev) * size
        moved[1] += height * (E + Ev) * size + 2 * height * acc + 2 * height * E * acc
    queries, keys = B * H * q_len, B * Hkv * kv_len
    moved[0] += queries * E * size + queries * (Ev * size + acc)
    moved[1] += 2 * keys * (E + Ev) * size + queries * (2 * Ev * size + acc) + queries * E * (acc + size)
    assert [found.forward_flops, found.backward_flops] == flops
    assert [found.forward_bytes, found.backward_bytes] == moved
    even = create_block_mask(noop_mask, 1, 1, 256, 256, device="cpu").stats(64, dtype=torch.float64)
    assert (even.forward_flops, even.backward_flops) == (4 * 64 * 256**2, 10 * 64 * 256**2)


def test_a_mask_for_one_serves_every_batch_and_head_of_the_call():
    one = create_block_mask(causal, 1, 1, 500, 500, device="cpu")
    many = create_block_mask(causal, 2, 4, 500, 500, device="cpu")
    assert one.stats(batch=2, heads=4) == many.stats() == many.stats(batch=2, heads=4)
    # heads and batches are alike, and are asked once; where they differ they are not
    differ = create_block_mask(heads_differ, 2, 3, 40, 50, device="cpu", BLOCK_SIZE=16)
    assert differ.stats().allowed == int(create_mask(heads_differ, 2, 3, 40, 50, device="cpu").sum())


def test_lists_that_say_less_than_the_mask_mod_count():
    mask = create_block_mask(causal, 1, 1, 256, 256, device="cpu", BLOCK_SIZE=64)
    less = BlockMask.from_kv_blocks(mask.kv_num_blocks, mask.kv_indices, BLOCK_SIZE=64, mask_mod=causal, seq_lengths=(256, 256))
    assert less.stats().allowed == 4 * 64 * 65 // 2
    # without a mask_mod every position of a listed block is allowed
    bare = BlockMask.from_kv_blocks(mask.kv_num_blocks, mask.kv_indices, BLOCK_SIZE=64, seq_lengths=(256, 256))
    assert bare.stats().allowed == bare.stats().computed == 4 * 64 * 64


@pytest.mark.parametrize("separate", [True, False])
def test_a_million_tokens_exactly(separate):
    n, window = MILLION, 4096
    mask = create_block_mask(masks.sliding_window(window), 1, 1, n, n, device="cpu", separate_full_blocks=separate)
    found = mask.stats()
    assert found.allowed == window * (window + 1) // 2 + (n - window) * window
    rows, whole = n // 128, window // 128
    listed = whole * (whole + 1) // 2 + (rows - whole) * (whole + 1)
    assert found.full + found.partial == listed and found.computed == listed * 128 * 128


def test_causal_of_a_million_tokens():
    found = create_block_mask(masks.causal, 1, 1, MILLION, MILLION, device="cpu").stats()
    assert found.allowed == MILLION * (MILLION + 1) // 2
    assert found.partial == MILLION // 128 and found.row_imbalance == pytest.approx(2, rel=1e-3)


def test_no_tensor_is_larger_than_the_tiles_and_the_lists():
    sizes = []

    class Largest(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, torch.Tensor))
            return result

    mask = create_block_mask(masks.causal, 1, 1, MILLION // 16, MILLION // 16, device="cpu")
    with Largest():
        mask.stats()
    assert len(sizes) > 50 and max(sizes) <= max(len(mask.csr.full_indices), counts._POSITIONS)


def test_it_can_be_read():
    text = str(create_block_mask(causal, 1, 8, 4096, 4096, device="cpu").stats())
    assert text.splitlines() == [
        "BlockMask (1, 8, 4096, 4096) in blocks of 128 x 128",
        "blocks     8,192: 3,968 full, 256 partial, 3,968 empty",
        "positions  134,217,728: 67,125,248 allowed (50.01 %), 69,206,016 computed (51.56 %)",
        "forward    17.7 GFLOP, 147 MB moved",
        "backward   44.3 GFLOP, 457 MB moved",
        "           for head_dim 64, bfloat16",
        "imbalance  rows 1.94, columns 1.94, heads 1.00 (most over mean; 1 is even)",
    ]
    asked = []

    def counted(b, h, q_idx, kv_idx):
        asked.append(q_idx)
        return q_idx >= kv_idx

    mask = create_block_mask(counted, 1, 1, 300, 300, device="cpu")
    asked.clear()
    found = mask.stats(count_allowed=False, value_dim=32)
    assert found.allowed is None and not asked
    assert "90,000: allowed not counted, " in str(found) and "head_dim 64, value_dim 32, bfloat16" in str(found)


@pytest.mark.parametrize("lengths", [(0, 0), (0, 7), (7, 0), (1, 1)])
def test_nothing_is_even(lengths):
    found = create_block_mask(causal, 1, 1, *lengths, device="cpu").stats()
    assert (found.row_imbalance, found.column_imbalance, found.head_imbalance) == (1, 1, 1)
    assert found.allowed == found.computed == lengths[0] * lengths[1] and "BlockMask" in str(found)


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"head_dim": 0}, ValueError, "head_dim must be at least 1, got 0"),
        ({"head_dim": 2.5}, TypeError, "head_dim must be an int, got float"),
        ({"dtype": torch.int32}, TypeError, "dtype must be float16, bfloat16, float32 or float64, got torch.int32"),
        ({"batch": 3}, ValueError, "batch is 3, but the mask is for 2; only a mask for 1 serves any number"),
        ({"heads": 8}, ValueError, "heads is 8, but the mask is for 4; only a mask for 1 serves any number"),
        ({"kv_heads": 3}, ValueError, "kv_heads must divide the 4 heads of the query, got 3"),
    ],
)
def test_wrong_arguments(arguments, error, text):
    mask = create_block_mask(causal, 2, 4, 40, 40, device="cpu")
    with pytest.raises(error, match=text):
        mask.stats(**arguments)


def test_what_the_mask_mod_raises_is_raised():
    table = torch.zeros(10, dtype=torch.bool)
    mask = create_block_mask(causal, 1, 1, 40, 40, device="cpu", BLOCK_SIZE=16)
    wrong = BlockMask.from_kv_blocks(
        mask.kv_num_blocks, mask.kv_indices, BLOCK_SIZE=16, mask_mod=lambda b, h, q, kv: table[q], seq_lengths=(40, 40)
    )
    with pytest.raises(IndexError, match="reads a captured tensor out of range"):
        wrong.stats()
    assert wrong.stats(count_allowed=False).partial == 3
