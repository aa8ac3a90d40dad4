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


def variants(attention: Attention, device: str, dtype: torch.dtype, dim: int, names: tuple[str, ...] = ()) -> None:
    """Every variant (or those of `names`), every element of out, lse and the three gradients."""
    heads = 2
    like = torch.empty(1, heads, 1, dim, dtype=dtype, device=device)
    for variant in gpu_cases.variants(heads, SMALL, device).values():
        if not names or variant.name in names:
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


def masked_nan(attention: Attention, device: str, dim: int) -> None:
    """A NaN that nobody may see does nothing, forward and backward (R4): as if that key were not there."""
    query, key, value, grad_out = (torch.randn(1, 2, 256, dim, device=device, dtype=torch.bfloat16) for _ in range(4))
    mask = flexref.create_block_mask(lambda b, h, q_idx, kv_idx: kv_idx < 255, None, None, 256, 256, device=device)
    found = []
    for hidden in (torch.nan, 0.0):
        key[:, :, -1], value[:, :, -1] = hidden, hidden
        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        out, lse = attention(*inputs, None, mask)
        found.append([out.detach(), lse.detach(), *torch.autograd.grad(out, inputs, grad_out)])
    for name, dirty, clean in zip(("out", "lse", "d query", "d key", "d value"), *found, strict=True):
        # both round the same numbers, in another order
        off = float((dirty.double() - clean.double()).abs().max())
        assert off < 0.03, f"{name} is off by {off:.2g}"


def lost_sums(attention: Attention, device: str) -> None:
    """Scores so large that one key of a row has all the weight."""
    query, key, value = (torch.randn(1, 2, 256, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    out, _ = attention(query, key, value, scale=1e20)
    best = (query.double() @ key.double().mT).argmax(-1)
    wanted = value.gather(2, best[..., None].expand(-1, -1, -1, 64))
    assert torch.equal(out, wanted), f"{int((out != wanted).sum())} elements are wrong"


def decoding(attention: Attention, device: str) -> None:
    """One query on long keys, grouped heads."""
    query, (key, value) = torch.randn(2, 8, 1, 128, device=device), torch.randn(2, 2, 2, 1024, 128, device=device)
    out, _ = attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), enable_gqa=True)
    query, key, value = (x.bfloat16().double() for x in (query, key, value))
    off = float((out.double() - F.scaled_dot_product_attention(query, key, value, enable_gqa=True)).abs().max())
    assert off < 2e-3, f"off by {off:.2g}"


def main(argv: list[str] | None = None) -> int:
    """0 if every question is answered well, else 1."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_smoke", description=__doc__)
    parser.add_argument("engine")
    parser.add_argument("--emulated", action="store_true", help="on the CPU, and less of it")
    parser.add_argument("--only", nargs="+", help="only the questions whose names begin so")
    options = parser.parse_args(argv)
    device = "cpu" if options.emulated else "cuda"
    attention = partial(GpuBench((options.engine,), device, emulated=options.emulated).attention, options.engine)
    dtypes = (torch.bfloat16,) if options.emulated else (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    sizes = [(dtype, dim) for dtype in dtypes for dim in ((64,) if options.emulated or dtype.itemsize > 2 else (64, 128))]
    questions = {
        "layout (B, S, H, D)": other_layout, "decoding": decoding, "large scores": lost_sums, "bad index": bad_index,
        "captured": captured,
        **{f"masked NaN, D {n}": partial(masked_nan, dim=n) for n in ((64,) if options.emulated else (64, 128))},
        **{f"variants {d}, D {n}": partial(variants, dtype=d, dim=n) for d, n in sizes},
    }  # fmt: skip
    if not options.emulated:
        few = partial(variants, dtype=torch.bfloat16, names=("full", "causal"))
        questions |= {f"heads of {n}": partial(few, dim=n) for n in (16, 32, 96, 256)}
    if options.only:
        questions = {name: f for name, f in questions.items() if name.startswith(tuple(options.only))}
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
