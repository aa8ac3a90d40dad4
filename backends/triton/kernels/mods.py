"""The user's mods and the derivative, as functions of a tile; each also returns where a read went out of range (R13).

`concerned` are the positions at which the result counts. The arguments behind it are the captured tensors, with their
strides and sizes, and the captured numbers.
"""
import triton
import triton.language as tl


@triton.jit
def mask_mod(
    b, h, q_idx, kv_idx, concerned,
    # hole: parameters
):
    """Whether mask_mod allows each position."""
    wrong = concerned & False
    # hole: mask_mod
    return tl.broadcast_to(mask, concerned.shape), wrong


@triton.jit
def score_mod(
    score, b, h, q_idx, kv_idx, concerned,
    # hole: parameters
):
    """What score_mod makes of each score."""
    wrong = concerned & False
    # hole: score_mod
    return tl.broadcast_to(modified, score.shape).to(real), wrong


@triton.jit
def score_grad(
    score, grad, seen, b, h, q_idx, kv_idx,
    # hole: parameters
    # hole: accumulators
    SCATTER: tl.constexpr,
):
    """d loss / d score from grad, which is d loss / d modified score; adds what captured tensors get.

    A tile is (kv, q) here: q_idx (1, q), kv_idx (kv, 1).
    """
    wrong, concerned = seen & False, seen
    # hole: derivative
    if SCATTER:
        # hole: d_captured
        pass
    return tl.where(seen, tl.broadcast_to(d_score, score.shape), 0.0).to(real)


@triton.jit
def int_floor_div(a, b):
    b = tl.where(b == 0, 1, b)
    quotient = a // b
    return quotient - ((a % b != 0) & ((a < 0) ^ (b < 0))).to(tl.int32)


@triton.jit
def int_remainder(a, b):
    b = tl.where(b == 0, 1, b)
    rest = a % b
    return tl.where((rest != 0) & ((rest < 0) ^ (b < 0)), rest + b, rest)


@triton.jit
def float_remainder(a, b):
    rest = libdevice.fmod(a, b)
    return tl.where((rest != 0) & ((rest < 0) ^ (b < 0)), rest + b, rest)


@triton.jit
def float_floor_div(a, b):
    """As PyTorch: from the remainder, because a rounded a / b may already be the next whole number."""
    rest = libdevice.fmod(a, b)
    quotient = divide(a - rest, b)
    quotient = tl.where((rest != 0) & ((rest < 0) ^ (b < 0)), quotient - 1.0, quotient)
    below = tl.floor(quotient)
    below = tl.where(quotient - below > 0.5, below + 1.0, below)
    return tl.where(b == 0, divide(a, b), below)
