"""python -m bench.gpu_engines warm|training|decode: several engines in one process, beside the same rivals; a step of the day."""
from __future__ import annotations

import argparse
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

from bench import gpu, gpu_cases
from bench.gpu import GpuBench

VARIANTS = ("full", "causal", "document", "soft-cap")
SIZE, SMALL_SIZE = (2, 16, 8192, 128), (1, 2, 192, 64)


def training(bench: GpuBench, names: tuple[str, ...] = VARIANTS) -> None:
    """bfloat16, D 128, S 8192, both passes; emulated, one small case each."""
    size = SMALL_SIZE if bench.emulated else SIZE
    for name, variant in gpu_cases.variants(size[1], size[2], bench.device).items():
        if name in names and not bench.over():
            try:
                gpu.one_case(bench, torch.bfloat16, size, variant)
            except Exception:
                # the other variants are worth their time all the same
                traceback.print_exc()


def decode(bench: GpuBench) -> None:
    """256 MB and 1 GB of keys and values; emulated, one small case."""
    sizes, lengths = ((1 << 20,), (256,)) if bench.emulated else ((256 << 20, 1 << 30), (8192, 65536))
    gpu.decoding(bench, torch.bfloat16, sizes, lengths)


def warm(engines: tuple[str, ...], more: list[str]) -> None:
    """Every kernel of `training` and `decode` once, each in a process of its own, so that compilers run beside one another."""
    command = [sys.executable, "-m", "bench.gpu_engines"]
    jobs = [[*command, "training", "--engines", engine, "--variants", name] for engine in engines for name in VARIANTS]
    jobs += [[*command, "decode", "--engines", engine] for engine in engines]
    running = [subprocess.Popen([*job, *more], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for job in jobs]
    for job, process in zip(jobs, running, strict=True):
        said = process.communicate()[1]
        print(" ".join(job[len(command) :]), "ends with", process.returncode, *said.splitlines()[-1:], flush=True)


def main(argv: list[str] | None = None) -> int:
    """0, unless something raises: what an engine cannot do is in the results."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_engines", description=__doc__)
    parser.add_argument("what", choices=("warm", "training", "decode"))
    parser.add_argument("--engines", nargs="+", required=True)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--emulated", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    if options.what == "warm":
        if not options.emulated:
            warm(tuple(options.engines), ["--rounds", "1"])
        return 0
    how = {"device": "cpu", "emulated": True, "rounds": 2, "clock": _seconds} if options.emulated else {"rounds": options.rounds}
    bench = GpuBench(tuple(options.engines), path=options.json, **how)
    training(bench, tuple(options.variants)) if options.what == "training" else decode(bench)
    bench.write()
    return 0


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
