"""create_block_mask at lengths up to a million, block 128, each row in a process of its own; and a mask in a score_mod.

What is built is compared with brute force before it is timed: the blocks of a few rows, position by position.
"""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

import flexref
from bench.clock import Timing, interleaved, ratio
from bench.fresh import in_new_process, peak, watermark
from flexref import create_block_mask

if TYPE_CHECKING:
    from bench.run import Bench

WINDOW = 4096
# length, the mask, and what is asked: seconds, and megabytes over what the process had before
ROWS: dict[str, tuple[int, str, float, float | None]] = {
    "8,192 causal": (8192, "causal", 0.01, None),
    "32,768 causal": (32768, "causal", 0.02, None),
    "131,072 causal": (131072, "causal", 0.06, None),
    "131,072 causal & documents & window 4,096": (131072, "documents and window", 0.15, None),
    "1,048,576 window 4,096": (1 << 20, "window", 0.3, 150.0),
    "1,048,576 documents & window 4,096": (1 << 20, "documents and window", 1.0, 200.0),
    "1,048,576 causal": (1 << 20, "causal", 1.0, 200.0),
}
# the mask of each step of decoding: heads that differ, the mask, and whether the start is a tensor
_ONE = lambda b, h, q, k: (q >= k) & (q - k < WINDOW)  # noqa: E731
_EACH = lambda b, h, q, k: (q >= k) & (q - k < WINDOW * (h + 1))  # noqa: E731
STEPS: dict[str, tuple[int, Callable, bool]] = {
    "BlockMask.rows of one query, 32,768 window 4,096": (1, _ONE, False),
    "BlockMask.rows of one query, 8 heads with windows of their own": (8, _EACH, False),
    "BlockMask.rows of one query, 8 heads with windows of their own, from a tensor": (8, _EACH, True),
}


def target_names(row: str) -> tuple[str, str]:
    """Of its seconds and of its megabytes."""
    return f"create_block_mask, {row}", f"create_block_mask, {row}: peak memory over the import"


def mask_mod(kind: str, length: int) -> Callable:
    """The mask of a row; documents have about 1,500 tokens."""
    if kind == "causal":
        return lambda b, h, q_idx, kv_idx: q_idx >= kv_idx
    if kind == "window":
        return lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx < WINDOW)
    ids = (torch.rand(length, generator=torch.Generator().manual_seed(0)) < 1 / 1500).long().cumsum(0)
    return lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (ids[q_idx] == ids[kv_idx]) & (q_idx - kv_idx < WINDOW)


def measure(kind: str, length: int) -> dict[str, float]:
    """Seconds of the first and of three later ones, and the growth of the peak; run by bench.fresh."""
    mod = mask_mod(kind, length)
    create_block_mask(lambda b, h, q_idx, kv_idx: q_idx > kv_idx + 3, None, None, 4096, 4096, "cpu")
    before = watermark()
    samples, growth = [], 0.0
    for i in range(4):
        start = time.perf_counter()
        mask = create_block_mask(mod, None, None, length, length, "cpu")
        samples.append(time.perf_counter() - start)
        if i == 0:
            growth = peak() - before
            _judge(mask, mod, length)
        del mask
    return {"first": samples[0], "later": statistics.median(samples[1:]), "peak": growth}


def _judge(mask, mod: Callable, length: int) -> None:
    """Three rows of blocks against every position in them."""
    for row in (0, length // 256, length // 128 - 1):
        q_idx, kv_idx = torch.arange(128)[:, None] + row * 128, torch.arange(length)
        allowed = mod(0, 0, q_idx, kv_idx).unflatten(1, (-1, 128))
        some, every = allowed.any((0, 2)), allowed.all(0).all(1)
        listed = mask[:, :, row].csr
        for got, wanted in ((listed.full_indices, every), (listed.indices, some & ~every)):
            assert torch.equal(got.long(), wanted.nonzero()[:, 0]), f"row {row} lists other blocks than the mask has"


def masks(bench: Bench) -> None:
    """Every row of ROWS, steps of decoding, and causal written as a score_mod beside causal as a mask."""
    for row, (length, kind, _, memory) in ROWS.items():
        seconds, megabytes = target_names(row)
        with TemporaryDirectory() as cache:
            arguments = "mask", cache, "--mask", kind, "--length", str(length)
            runs = [in_new_process(*arguments) for _ in range(1 if bench.quick else 5)]
        bench.cases.append({"what": "create_block_mask", "row": row, "runs": runs})
        took = [run["first"] for run in runs]
        bench.target(seconds, statistics.median(took), spread=Timing.of(took))
        if memory is not None:
            peaks = [run["peak"] / 1e6 for run in runs]
            bench.target(megabytes, statistics.median(peaks), spread=Timing.of(peaks))
    _decoding(bench)
    _score_mod(bench)


def _decoding(bench: Bench) -> None:
    """One row of a mask for 32,768 tokens, as each step takes it."""
    for name, (heads, mod, by_tensor) in STEPS.items():
        mask = create_block_mask(mod, 1, heads, 32768, 32768, "cpu")
        starts = [torch.tensor(at) if by_tensor else at for at in range(20000, 20200)]

        def many(mask=mask, starts=starts) -> None:
            for start in starts:
                mask.rows(start, length=1)

        took = Timing.of([5e3 * s for s in interleaved({"ours": many}, bench.rounds, 5.0)["ours"]])
        bench.target(name, took.median, spread=took)


def _score_mod(bench: Bench) -> None:
    name = "causal as a score_mod / causal as a mask, 17,797 tokens"
    if bench.refused("causal", (name,)):
        return
    query, key, value = bench.inputs(length=17797)
    causal = mask_mod("causal", 0)

    def by_score() -> torch.Tensor:
        mod = lambda s, b, h, q_idx, kv_idx: torch.where(q_idx >= kv_idx, s, -float("inf"))  # noqa: E731
        return flexref.flex_attention(query, key, value, mod, backend=bench.backend)

    def by_mask() -> torch.Tensor:
        return flexref.flex_attention(query, key, value, mask_mod=causal, backend=bench.backend)

    torch.testing.assert_close(by_score(), by_mask())
    samples = interleaved({"ours": by_score, "theirs": by_mask}, 3 if bench.quick else 9, bench.seconds)
    found = ratio(samples["theirs"], samples["ours"])
    bench.target(name, found.median, spread=found)
