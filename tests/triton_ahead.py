"""Run by test_triton_ahead.py in processes of their own: what the Triton engine's kernels become for GPUs that are not here.

`triton_ahead.py report ARCH DTYPE DIM [KIND ...]` prints a JSON list of reports; `triton_ahead.py builds masked|whole` counts
builds, with a block mask or without.
"""

from __future__ import annotations

import json
import sys

import torch

from flexref import create_block_mask
from flexref.arguments import prepare
from flexref.backends.triton.ahead import compiled

LENGTH = 1024


def problem(kind: str, dtype: torch.dtype, dim: int, q_len: int = LENGTH, gradients: bool = True):
    """Plain; soft-cap with ALiBi, causal; a mask of documents; or a table that is read at the score."""
    query, key, value = (
        torch.empty(1, 2, n, dim, dtype=dtype, requires_grad=gradients) for n in (q_len, LENGTH, LENGTH)
    )
    slope, document = torch.ones(2), torch.zeros(LENGTH, dtype=torch.int64)

    def capped(score, b, h, q_idx, kv_idx):
        return 20 * torch.tanh((score + slope[h] * (kv_idx - q_idx)) / 20)

    def looked_up(score, b, h, q_idx, kv_idx):
        return score + slope[(score * 3).long().clamp(0, 1)]

    def large(score, b, h, q_idx, kv_idx):
        return score * 1e30

    mods = {
        "large": (large, None),
        "read by score": (looked_up, None),
        "plain": (None, None),
        "soft-cap, ALiBi": (capped, lambda b, h, q_idx, kv_idx: q_idx >= kv_idx),
        "documents": (None, lambda b, h, q_idx, kv_idx: document[q_idx] == document[kv_idx]),
    }
    score_mod, mask_mod = mods[kind]
    mask = mask_mod and create_block_mask(mask_mod, None, None, q_len, LENGTH, device="cpu")
    return prepare(query, key, value, score_mod, mask)


KINDS = ("plain", "soft-cap, ALiBi", "documents")


def report(arch: str, dtype: str, dim: str, *kinds: str) -> list[dict]:
    found = []
    for kind in kinds or KINDS:
        target = int(arch) if arch.isdigit() else arch
        reports = compiled(*problem(kind, getattr(torch, dtype), int(dim)), target, backward=True)
        reports += compiled(*problem(kind, getattr(torch, dtype), int(dim), q_len=1, gradients=False), target)
        for r in reports:
            # 1e30 in the bits of a float32
            words = {"fused": r.count(r"fma\.rn\.f32[^;]*0f7149F2CA"), "rounded": r.count(r"mul\.f32[^;]*0f7149F2CA")}
            words["kept apart"] = r.count(r"sub\.rn\.f32")
            words |= {name: r.count(name) for name in (r"wgmma\.mma_async", r"mma\.sync", r"cp\.async", r"tcgen05\.mma", "mfma")}
            found.append({"kind": kind, "kernel": r.kernel, "tile": r.tile, "registers": r.registers, "stack": r.stack,
                          "shared": r.shared, "narrow": r.narrow,
                          "tensor": r.count(r"cp\.async\.bulk\.tensor"), **words})  # fmt: skip
    return found


def builds(how: str) -> dict[str, int]:
    """How many builds many values of everything that is an argument make, for one mod in each pass."""
    made: dict[str, set[str]] = {}
    texts = 0
    for i, (batch, q_len, kv_len) in enumerate(((1, 1024, 1024), (2, 512, 1536), (3, 1000, 999), (1, 640, 4096), (4, 129, 257))):
        query = torch.empty(batch, 2, q_len, 64, dtype=torch.bfloat16, requires_grad=True)
        key, value = (torch.empty(batch, 2, kv_len, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        window, cap = 64 + 100 * i, 10.0 + i

        def capped(score, b, h, q_idx, kv_idx, cap=cap):
            return cap * torch.tanh(score / cap)

        def near(b, h, q_idx, kv_idx, window=window):
            return (q_idx - kv_idx).abs() < window

        mask = create_block_mask(near, None, None, q_len, kv_len, device="cpu") if how == "masked" else None
        for r in compiled(*prepare(query, key, value, capped, mask, scale=0.1 + 0.01 * i), 90, backward=True):
            made.setdefault(r.kernel, set()).add(r.build)
        texts += 1
    return {"calls": texts, **{kernel: len(found) for kernel, found in made.items()}}


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    print(json.dumps({"report": report, "builds": builds}[command](*arguments)))
