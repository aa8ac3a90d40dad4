"""The faults of fused kernels, each with a case that provokes it: the suite must catch every one.

A fault is planted in tiled.py, which without a fault is a sound backend.
"""

from __future__ import annotations

from flexref.conformance.cases import Blocks, Case

ALL = ("query", "key", "value", "captured")
_plain = Case(q_len=33, kv_len=37, batch=2, kv_heads=2, group=2, head_dim=8, value_dim=5, wants=ALL)


_causal = _plain.but(mask="q_idx >= kv_idx")
_bias = _plain.but(score="score + bias[h, q_idx, kv_idx]")
_slopes = _plain.but(score="score * slope[h]", q_len=65, kv_len=257, batch=1)
_listed = _plain.but(mask="(q_idx + kv_idx) % 3 != 0", blocks=Blocks((16, 16), by_hand=True, heads=True))

FAULTS: dict[str, Case] = {
    "tail mask off by one": _plain,
    "missing rescale": _plain.but(values="large"),
    "stale lse": _plain,
    "lse in base 2": _plain,
    "wrong key head": _plain,
    "dropped full block": _listed,
    "mask_mod asked in full blocks": _listed,
    "mask_mod not asked in partial blocks": _listed,
    "row's last block dropped": _listed,
    "swapped q_idx and kv_idx in mask_mod": _causal,
    "swapped q_idx and kv_idx in score_mod": _plain.but(score="score + 0.1 * (q_idx - 2 * kv_idx)"),
    "key head given to score_mod": _plain.but(score="score * slope[h]"),
    "ignored scale": _plain.but(scale=0.3),
    "scale applied after score_mod": _plain.but(score="score + bias[h, q_idx, kv_idx]"),
    "score rounded to the inputs' type": _plain.but(dtype="bfloat16", head_dim=64),
    "accumulator in the inputs' type": _plain.but(dtype="bfloat16", kv_len=2011, q_len=3, values="positive"),
    "out off by 2e-5": _plain,
    "lse off by 1e-5": _plain.but(dtype="bfloat16"),
    "empty row is NaN": _plain.but(mask="kv_idx < q_idx - 3"),
    "empty row averages": _plain.but(mask="kv_idx < q_idx - 3"),
    "last row not written": _plain,
    "NaN leaks from masked values": _plain.but(mask="q_idx >= kv_idx", values="holes"),
    "max_scores before score_mod": _plain.but(score="score * 2.0", max_scores=True),
    "key's batch taken modulo": _plain.but(kv_batch=1, batch=2),
    "writes to query": _plain.but(scale=0.3),
    "no mask in backward": _plain.but(mask="q_idx >= kv_idx", score="score + bias[h, q_idx, kv_idx]"),
    "slope of score_mod left out": _plain.but(score="cap * torch.tanh(score / cap)"),
    "a branch that was not taken is multiplied by 0": _plain.but(
        score="torch.where(score < 1000.0, score, torch.exp(gain + score * score * 1e9))"
    ),
    "dq misses the scale": _plain,
    "dk of one query head of the group": _plain,
    "dv of one query head of the group": _plain,
    "delta left out": _plain,
    "lse has no gradient": _plain,
    "lse's gradient has the wrong sign": _plain,
    "captured gradient of the first batch only": _bias,
    "captured gradient of the last tile only": _plain.but(score="score + slope[h] * (kv_idx - q_idx)"),
    "captured gradient times 1 + 1e-3": _bias,
    # 1 % is three steps of bfloat16
    **{
        f"captured gradient 1 % off, {dtype}": _bias.but(dtype=dtype, captured_dtype=dtype)
        for dtype in ("bfloat16", "float16", "float32", "float64")
    },
    "captured gradient 1 % off, float16 slopes of long rows": _slopes.but(dtype="float16", captured_dtype="float16"),
    "out rounded twice through half": _plain.but(dtype="float32"),
}
