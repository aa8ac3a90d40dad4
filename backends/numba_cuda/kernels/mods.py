"""The user's two functions, and the derivative of one, at one position.

`q_at` and `kv_at` are 64-bit; a program computes with q_idx and kv_idx, as wide as they need. A read that is checked and goes
astray reads the first element instead, and sets errors[0] if the position is `concerned`.
"""


@device
def mask_mod(
    b, h, q_at, kv_at, concerned, errors, dims, floats, ints,
    # hole: captured
):
    """Whether the position is allowed; `concerned`: it lies in a partial block."""
    q_idx = INDEX(q_at)
    kv_idx = INDEX(kv_at)
    # hole: mask_mod
    return mask


@device
def score_mod(
    score, b, h, q_at, kv_at, concerned, errors, dims, floats, ints,
    # hole: captured
):
    """The score that the softmax sees; `concerned`: the position is allowed."""
    q_idx = INDEX(q_at)
    kv_idx = INDEX(kv_at)
    # hole: score_mod
    return modified


@device
def grad_mod(
    score, d_weight, row_max, log_sum, delta, b, h, q_at, kv_at, concerned, counted, errors, dims, floats,
    ints,
    # hole: captured
):
    """(weight, d raw score), both exactly 0 where masked, and what is added to elements that the whole tile reads.

    row_max is natural, log_sum is log2 of the row's sum of weights: lse alone is too coarse where scores share a large offset.
    """
    q_idx = INDEX(q_at)
    kv_idx = INDEX(kv_at)
    # hole: score_again
    seen = concerned & (modified != -INF)
    weight = select(seen, exp2(minus(modified, row_max) * LOG2E - log_sum), real(0))
    grad = select(seen, weight * (d_weight - delta), real(0))
    # hole: derivative
    counted = counted & seen
    # hole: d_captured
    return (
        weight, select(seen, d_score, real(0)),
        # hole: shared_parts
    )
