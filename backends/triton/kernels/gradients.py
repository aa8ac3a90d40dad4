"""Of one tile, in either orientation: the weights again, and d loss / d score."""
import triton
import triton.language as tl


@triton.jit
def gradients(
    score, upward, top, log_sum, delta, scale, b, h, q_idx, kv_idx, inside, full, errors,
    # hole: parameters
    # hole: accumulators
    CHECKED: tl.constexpr, FOLD: tl.constexpr, FUSED: tl.constexpr, HAS_SCORE: tl.constexpr, HAS_MASK: tl.constexpr,
    CHECK_READS: tl.constexpr, SCATTER: tl.constexpr, STRICT: tl.constexpr,
):
    """From q @ k (`score`) and grad_out @ v (`upward`); top, log_sum and delta are the rows', shaped for the tile.

    What is not seen has a weight of 0. What is not finite there may come into d score, unless it is STRICT: then it shows in
    the result, which is done again with care.
    """
    score = score.to(real)
    if not FOLD:
        score = score * scale
    allowed = tl.broadcast_to(inside, score.shape)
    if CHECKED and HAS_MASK:
        mask, wrong = mask_mod(
            b, h, q_idx, kv_idx, allowed & (full == 0),
            # hole: arguments
        )
        allowed = allowed & (mask | full)
        if CHECK_READS:
            tl.store(errors + tl.zeros_like(wrong).to(tl.int32), 1, mask=wrong)
    modified = score
    if HAS_SCORE:
        modified, wrong = score_mod(
            score, b, h, q_idx, kv_idx, allowed,
            # hole: arguments
        )
        if CHECK_READS:
            tl.store(errors + tl.zeros_like(wrong).to(tl.int32), 1, mask=wrong)
    factor = scale * LOG2E if FOLD else tl.full([], LOG2E, real)
    if FUSED:
        weights = tl.exp2(modified * factor - (top + log_sum))
    elif FOLD:
        weights = tl.exp2((modified - top) * factor - log_sum)
    else:
        weights = tl.exp2(minus(modified, tl.broadcast_to(top, modified.shape)) * factor - log_sum)
    seen = allowed & (modified != float("-inf"))
    if CHECKED:
        weights = tl.where(seen, weights, 0.0)
    grad = weights * (upward.to(real) - delta)
    if STRICT or (CHECKED and HAS_SCORE):
        grad = tl.where(seen, grad, 0.0)
    if HAS_SCORE:
        grad = score_grad(
            score, grad, seen, b, h, q_idx, kv_idx,
            # hole: arguments
            # hole: accumulators
            SCATTER,
        )
    return weights, grad, seen


@triton.jit
def put_rows(base, rows, inside, x, column, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Columns `column` and on of dense rows of WIDTH numbers."""
    columns = column + tl.arange(0, COLUMNS)
    there = inside[:, None] & (columns < WIDTH)[None, :]
    tl.store(base + rows[:, None] * WIDTH + columns[None, :], x.to(base.dtype.element_ty), mask=there)


@triton.jit
def add_rows(base, start, rows, inside, x, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Adds to dense rows of WIDTH numbers, which other programs add to as well."""
    columns = tl.arange(0, COLUMNS)
    there = inside[:, None] & (columns < WIDTH)[None, :]
    tl.atomic_add(base + (start + rows)[:, None] * WIDTH + columns[None, :], x, mask=there, sem="relaxed")
