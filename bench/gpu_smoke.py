"""python -m bench.gpu_smoke ENGINE [--emulated]: does the engine run at all, and is it right? One line a question.

Forward and backward against float64 by the one error budget; the layout (B, S, H, D); a captured tensor with a gradient; a
table that is read at the score; a captured index out of range; a NaN that is masked; decoding; every dtype.
"""
from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

import flexref
from bench import gpu_cases
from bench.check import SMALL, small
from bench.gpu import GpuBench

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def variants(attention: Attention, device: str, dtype: torch.dtype, dim: int, heads: int = 2) -> None:
    """Every variant, every element of out, lse and the three gradients."""
    like = torch.empty(1, heads, 1, dim, dtype=dtype, device=device)
    for variant in gpu_cases.variants(heads, SMALL, device).values():
        small(variant, like, attention, gradients=True)


def other_layout(attention: Attention, device: str) -> None:
    """(B, S, H, D) memory: the stride of a head is below that of a row."""
    query, key, value = (torch.randn(2, 256, 4, 64, device=device).half().transpose(1, 2) for _ in range(3))
    out, _ = attention(query, key, value)
    wanted = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    off = float((out.double() - wanted).abs().max())
    assert off < 2e-3, f"off by {off:.2g}"


def captured(attention: Attention, device: str) -> None:
    """A learned bias, and a table that is read at the score."""
    query, key, value = (torch.randn(1, 2, 128, 64, device=device) for _ in range(3))
    bias = torch.randn(2, 128, device=device, requires_grad=True)
    table = torch.randn(8, device=device)

    def mod(score, b, h, q_idx, kv_idx):
        return score + bias[h, kv_idx] + table[(score * 2).long().clamp(0, 7)]

    def plain(bias):
        score = query.double() @ key.double().mT / 8
        score = score + bias[:, None, :] + table.double()[(score * 2).long().clamp(0, 7)]
        return score.softmax(-1) @ value.double()

    grad_out = torch.randn_like(query)
    out, _ = attention(query, key, value, mod)
    (found,) = torch.autograd.grad(out, bias, grad_out)
    double = bias.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(plain(double), double, grad_out.double())
    # a score beside an integer may be rounded to the other side of it, so single places may differ
    off = float((found.double() - wanted).abs().median() / wanted.abs().median())
    assert off < 1e-5, f"the gradient is off by {off:.2g}"


def bad_index(attention: Attention, device: str) -> None:
    """A captured index out of range is an IndexError."""
    query, key, value = (torch.randn(1, 2, 128, 64, device=device) for _ in range(3))
    table, where = torch.randn(128, device=device), torch.arange(1, 129, device=device)
    try:
        attention(query, key, value, lambda score, b, h, q_idx, kv_idx: score + table[where[kv_idx]])
    except IndexError:
        return
    raise AssertionError("no IndexError")


def masked_nan(attention: Attention, device: str) -> None:
    """A NaN that nobody may see does nothing (R4)."""
    query, key, value = (torch.randn(1, 2, 256, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    key[:, :, -1], value[:, :, -1] = torch.nan, torch.nan
    mask = flexref.create_block_mask(flexref.variants.masks.causal, None, None, 256, 256, device=device)
    out, _ = attention(query, key, value, None, mask)
    assert bool(out[:, :, :-1].isfinite().all()) and bool(out[:, :, -1].isnan().all())


def decoding(attention: Attention, device: str) -> None:
    """One query on long keys, grouped heads."""
    query, (key, value) = torch.randn(2, 8, 1, 128, device=device), torch.randn(2, 2, 2, 1024, 128, device=device)
    out, _ = attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), enable_gqa=True)
    inputs = (x.bfloat16().double() for x in (query, key, value))
    off = float((out.double() - F.scaled_dot_product_attention(*inputs, enable_gqa=True)).abs().max())
    assert off < 2e-3, f"off by {off:.2g}"


def main(argv: list[str] | None = None) -> int:
    """0 if every question is answered well, else 1."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_smoke", description=__doc__)
    parser.add_argument("engine")
    parser.add_argument("--emulated", action="store_true", help="on the CPU, and less of it")
    options = parser.parse_args(argv)
    device = "cpu" if options.emulated else "cuda"
    attention = partial(GpuBench((options.engine,), device, emulated=options.emulated).attention, options.engine)
    dtypes = (torch.bfloat16,) if options.emulated else (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    sizes = [(dtype, dim) for dtype in dtypes for dim in ((64,) if options.emulated or dtype.itemsize > 2 else (64, 128))]
    questions = {
        "layout (B, S, H, D)": other_layout, "decoding": decoding, "masked NaN": masked_nan, "bad index": bad_index,
        "captured": captured, **{f"variants {d}, D {n}": partial(variants, dtype=d, dim=n) for d, n in sizes},
    }  # fmt: skip
    wrong = 0
    for name, question in questions.items():
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            question(attention, device)
            said = "right"
        except Exception as error:
            wrong += 1
            said = f"WRONG {type(error).__name__}: {str(error)[:1500]}"
            if not isinstance(error, AssertionError):
                traceback.print_exc(limit=-6)
        print(f"{options.engine}: {name}: {said} ({time.perf_counter() - start:.1f} s)", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
