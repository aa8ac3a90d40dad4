"""Faults for test_triton.py: the kernel's file, what it says, what it is made to say, and the case that must notice."""

from __future__ import annotations

from flexref.conformance.cases import Blocks, Case

ALL = ("query", "key", "value", "captured")
CAUSAL = "q_idx >= kv_idx"
FAULTS = {
    "tail mask off by one": ("forward", "(block + 1) * KV_BLOCK, kv_len)", "(block + 1) * KV_BLOCK, kv_len - 1)", {}),
    "missing rescale": ("forward", "acc = acc * shrink[:, None]", "acc = acc * 1.0", dict(values="large", kv_len=150)),
    "stale lse": ("parts", "tl.store(lse + row, top + log_sum", "tl.store(lse + row, top", {}),
    "stale maximum": (
        "forward",
        "return weights, shrink, fresh,",
        "return weights, shrink, row_max,",
        dict(kv_len=150),
    ),
    "wrong kv head": ("forward", "kv_head = h if PACK else h // group", "kv_head = h if PACK else h % kv_heads", {}),
    "dropped block": (
        "forward",
        "(full_count + partial) * TILES",
        "(full_count + partial - 1) * TILES",
        dict(mask=CAUSAL),
    ),
    "swapped indices in mask_mod": (
        "forward",
        "b, h, q_idx, kv_idx, allowed & (full == 0),",
        "b, h, kv_idx, q_idx, allowed & (full == 0),",
        dict(mask=CAUSAL, kv_len=33),
    ),
    "swapped indices in score_mod": (
        "forward",
        "score, b, h, q_idx, kv_idx, allowed,",
        "score, b, h, kv_idx, q_idx, allowed,",
        dict(score="score + 0.1 * (q_idx - 2 * kv_idx)", kv_len=33),
    ),
    "full blocks are asked": (
        "forward",
        "allowed & (mask | full)",
        "allowed & mask",
        dict(mask="q_idx < 0", blocks=Blocks((16, 16), by_hand=True)),
    ),
    "the key head is given to mods": (
        "forward",
        "h_idx = head[:, None] if PACK else h",
        "h_idx = kv_head",
        dict(score="score * slope[h]"),
    ),
    "masked NaN": (
        "forward",
        "tl.store(unsound + program, strange)",
        "tl.store(unsound + program, 0)",
        dict(values="holes", mask=CAUSAL),
    ),
    "shares overlap": ("forward", "(split + 1) // splits", "(split + 2) // splits", dict(q_len=2, kv_len=250)),
    "shares are not weighed": (
        "combine",
        "weight[:, None] * share",
        "share",
        dict(q_len=2, kv_len=250, values="large"),
    ),
    "no row is empty": (
        "parts",
        "tl.where(row_sum == 0, 0.0, divide",
        "tl.where(row_sum < 0, 0.0, divide",
        dict(mask="kv_idx < q_idx - 3"),
    ),
    "delta left out": ("gradients", "(upward.to(real) - delta)", "upward.to(real)", {}),
    "no mask in backward": (
        "gradients",
        "allowed = allowed & (mask | full)",
        "allowed = allowed & (mask | True)",
        dict(mask=CAUSAL),
    ),
    "dk misses the scale": ("backward_kv", "d_k * scale", "d_k", {}),
    "dq misses the scale": ("backward_q", "d_q * scale", "d_q", {}),
    "last block of queries dropped": (
        "backward_kv",
        "(tail + partial) * TILES",
        "(tail + partial - 1) * TILES",
        dict(mask="q_idx + 9 >= kv_idx"),
    ),
    "weights lose the sum": ("gradients", "- log_sum)", ")", {}),
    "masked NaN in backward": (
        "parts",
        "return tl.where(wide - wide == 0, x, tl.zeros_like(x))",
        "return x",
        dict(values="holes", mask=CAUSAL),
    ),
    "captured gradient of one kv": (
        "mods",
        "# hole: d_captured",
        "# hole: d_captured\n        tl.store(a0, 0.0)",
        dict(score="score * gain"),
    ),
}
PLAIN = Case(q_len=37, kv_len=70, batch=2, kv_heads=2, group=2, head_dim=8, value_dim=5, wants=ALL)
