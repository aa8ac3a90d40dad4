"""`python -m flexref.backends.triton.tune --json tiles.json`: times the tiles that fit on this GPU and keeps the best of each.

FLEXREF_TILES=tiles.json then puts them before the table of tiles.py. The key of a tile is kernel/capability/bytes of an
element/padded head size, so one run holds for every mod and mask at those sizes.
"""
from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from flexref.backends.triton import OLDEST, launch, launch_backward, tiles
from flexref.backends.triton.call import Call
from flexref.interrupts import of_a_signal
from flexref.problem import Problem, Tensors

Clock = Callable[[Callable[[], object]], float]
KERNELS = ("forward", "backward_kv", "backward_q", "decode")


def candidates(kernel: str) -> Iterator[tiles.Tile]:
    """The tiles that are worth a try."""
    sides = ((16,), (32, 64, 128)) if kernel == "decode" else ((32, 64, 128), (32, 64, 128))
    for q, kv, warps, stages in itertools.product(*sides, (4, 8), (1, 2, 3, 4)):
        if q * kv <= 128 * 128:
            yield tiles.Tile(q, kv, warps, stages)


def tune(problem: Problem, tensors: Tensors, time_of: Clock, capability: tuple[int, int]) -> dict:
    """The best tile of each kernel for one problem, as a FLEXREF_TILES file has it: {"tiles": {key: {tile, seconds}}}.

    `time_of(call)` gives seconds; a tile that does not fit, or that Triton cannot compile, is left out.
    """
    found: dict[str, dict] = {}
    width = tiles.padded(max(problem.head_dim, problem.value_dim))
    for kernel in KERNELS:
        if (kernel == "decode") != launch.decodes(problem):
            continue
        for tile in candidates(kernel):
            seconds = _seconds(kernel, tile, problem, tensors, time_of)
            key = f"{kernel}/{10 * capability[0] + capability[1]}/{problem.dtype.itemsize}/{width}"
            if seconds is not None and (key not in found or seconds < found[key]["seconds"]):
                found[key] = {"tile": list(tile), "seconds": seconds}
    return {"tiles": found}


def _seconds(kernel: str, tile: tiles.Tile, problem: Problem, tensors: Tensors, time_of) -> float | None:
    """Of one kernel with one tile; the other kernels of its pass keep theirs."""

    class Tuned(Call):
        def run(self, name: str, action) -> None:
            if name == kernel or name in ("delta", "combine"):
                action(self.function("forward" if name == "decode" else name), tile)

    try:
        output = launch.forward(problem, tensors, Tuned(problem, tensors))
        if kernel.startswith("backward"):
            return time_of(
                lambda: launch_backward.backward(problem, tensors, output, output.out, None, Tuned(problem, tensors))
            )
        return time_of(lambda: launch.forward(problem, tensors, Tuned(problem, tensors)))
    except Exception as error:
        if of_a_signal(error):
            raise
        # Triton tells of a tile that cannot be in many ways; a programming error would fail for every tile
        print(f"  {kernel} {tuple(tile)}: {type(error).__name__}", file=sys.stderr)
        return None


def gpu_seconds(call: Callable[[], object]) -> float:
    """The median of seven runs after two, by the GPU's own clock."""
    for _ in range(2):
        call()
    samples = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3)
    return sorted(samples)[3]


def main(argv: list[str] | None = None) -> int:
    """0; 1 where there is no GPU to measure on."""
    parser = argparse.ArgumentParser(prog="python -m flexref.backends.triton.tune", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where to write the tiles; an existing file is added to")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=("float16", "bfloat16", "float32", "float64"))
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=16)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < OLDEST:
        print("tune: there is no CUDA GPU of compute capability 8.0 or later to measure on.", file=sys.stderr)
        return 1
    kept: dict = json.loads(options.json.read_text()) if options.json.exists() else {"tiles": {}}
    kept |= {"gpu": torch.cuda.get_device_name(), "torch": str(torch.__version__)}
    for dtype, dim, length in itertools.product(options.dtype, options.head_dim, (options.length, 1)):
        problem, tensors = plain_problem(getattr(torch, dtype), dim, options.heads, length, options.length, "cuda")
        kept["tiles"] |= tune(problem, tensors, gpu_seconds, torch.cuda.get_device_capability())["tiles"]
        options.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


def plain_problem(
    dtype: torch.dtype, dim: int, heads: int, q_len: int, kv_len: int, device: str
) -> tuple[Problem, Tensors]:
    """Full attention of random numbers, with gradients where the query is long."""
    q, k, v = (torch.randn(1, heads, n, dim, device=device).to(dtype) for n in (q_len, kv_len, kv_len))
    problem = Problem(1, 1, heads, heads, q_len, kv_len, dim, dim, dtype, dtype, dtype, device)
    return replace(problem, needs_grad=(q_len > 1,) * 3), Tensors(q, k, v, dim**-0.5)


if __name__ == "__main__":
    sys.exit(main())
