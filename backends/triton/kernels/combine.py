"""Joins the shares of a split forward: each row's parts, weighed by how far their maxima lie below the greatest."""
import triton
import triton.language as tl


@triton.jit(do_not_specialize=("count", "splits"))
def combine(
    shares, part, out, lse, max_scores, saved_max, saved_sum, scale: "fp64", count, splits,
    BLOCK_M: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_COLUMNS: tl.constexpr, FOLD: tl.constexpr, FUSED: tl.constexpr,
    SAVE: tl.constexpr, MAX_SCORES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < count
    columns = tl.arange(0, VALUE_COLUMNS)
    there = inside[:, None] & (columns < VALUE_DIM)[None, :]
    scale = tl.full([], scale, real)
    factor = scale * LOG2E if FOLD else tl.full([], LOG2E, real)
    row_max = tl.full([BLOCK_M], float("-inf"), real)
    for split in range(splits):
        top = tl.load(part + 2 * (row * splits + split), mask=inside, other=float("-inf"))
        row_max = tl.maximum(row_max, top)
    safe = tl.where(row_max == float("-inf"), 0.0, row_max)
    acc, row_sum = tl.zeros([BLOCK_M, VALUE_COLUMNS], real), tl.zeros([BLOCK_M], real)
    for split in range(splits):
        at = row * splits + split
        top = tl.load(part + 2 * at, mask=inside, other=float("-inf"))
        weight = tl.exp2(top - safe if FUSED else (top - safe) * factor)
        row_sum += weight * tl.load(part + 2 * at + 1, mask=inside, other=0.0)
        share = tl.load(shares + at[:, None] * VALUE_DIM + columns[None, :], mask=there, other=0.0)
        # an infinite value stays infinite however small its weight
        acc += tl.where(tl.abs(share) == float("inf"), share, weight[:, None] * share)
    write(
        acc, row_max, row_sum, row, inside, out, lse, max_scores, saved_max, saved_sum, row * VALUE_DIM, scale, 0, part, 0,
        splits, FOLD, FUSED, False, VALUE_COLUMNS, VALUE_DIM, SAVE, MAX_SCORES,
    )
