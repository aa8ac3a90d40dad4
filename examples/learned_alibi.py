"""A learned ALiBi in a sliding window, forward and backward, and why the engine that ran it was chosen."""
from __future__ import annotations

import torch

import flexref

WINDOW = 256
slopes = torch.full((8,), -0.02, requires_grad=True)


def score_mod(score, b, h, q_idx, kv_idx):
    """Captures `slopes`, which gets a gradient."""
    return score + slopes[h] * (q_idx - kv_idx)


def mask_mod(b, h, q_idx, kv_idx):
    """Causal, the last WINDOW keys."""
    return (kv_idx <= q_idx) & (q_idx - kv_idx < WINDOW)


def main() -> None:
    """Prints the gradient of the slopes and the explanation of the choice."""
    query, key, value = (torch.randn(1, 8, 2048, 64, requires_grad=True) for _ in range(3))
    out = flexref.flex_attention(query, key, value, score_mod, mask_mod=mask_mod)
    out.square().mean().backward()
    print(slopes.grad)
    print(flexref.explain(query, key, value, score_mod, mask_mod=mask_mod))


if __name__ == "__main__":
    main()
