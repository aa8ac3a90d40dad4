"""Measurements that need a process of their own: `python -m bench.fresh import | first | memory | mask`; prints JSON.

Nothing is imported above the clock that is to be measured.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def in_new_process(what: str, cache: str | os.PathLike, *arguments: str) -> dict[str, float]:
    """Runs one measurement in a new process with `cache` as its FLEXREF_CACHE. Raises RuntimeError with its errors."""
    environment = {**os.environ, "FLEXREF_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bench.fresh", what, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"bench.fresh {what}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_import() -> dict[str, float]:
    """Seconds of `import torch`, and of `import flexref` after it."""
    start = time.perf_counter()
    import torch  # noqa: F401

    middle = time.perf_counter()
    import flexref  # noqa: F401

    return {"torch": middle - start, "flexref": time.perf_counter() - middle}


def measure_first(backend: str, length: int) -> dict[str, float]:
    """Seconds after the imports: the first forward, one with other mods, a second with the first mods, its backward."""
    import torch

    import flexref

    def score_mod(score, b, h, q_idx, kv_idx):
        return 17.0 * torch.tanh((score + 0.125 * (h + 1) * (kv_idx - q_idx)) / 17.0)

    def mask_mod(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (q_idx - kv_idx < 700)

    def new_score_mod(score, b, h, q_idx, kv_idx):
        return torch.sigmoid(score / 9.0) * 9.0 - 0.25 * (q_idx - kv_idx) * (h + 1)

    def new_mask_mod(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) | (kv_idx < 33)

    query, key, value = (torch.randn(1, 8, length, 64, requires_grad=True) for _ in range(3))

    def forward(score_mod=score_mod, mask_mod=mask_mod) -> tuple[torch.Tensor, float]:
        start = time.perf_counter()
        out = flexref.flex_attention(query, key, value, score_mod, mask_mod=mask_mod, backend=backend)
        return out, time.perf_counter() - start

    with torch.no_grad():
        _, first = forward()
        _, new = forward(new_score_mod, new_mask_mod)
    out, again = forward()
    start = time.perf_counter()
    out.sum().backward()
    return {"first": first, "new": new, "again": again, "backward": time.perf_counter() - start}


def measure_memory(backend: str, length: int) -> dict[str, float]:
    """Bytes: the growth of the peak over a causal forward and backward, and q, k, v, out and their gradients."""
    import torch

    import flexref

    def attend(size: int, watch: bool) -> float:
        query, key, value = (torch.randn(1, 8, size, 64).requires_grad_() for _ in range(3))
        grad_out = torch.randn(1, 8, size, 64)
        before = watermark() if watch else 0.0
        out = flexref.flex_attention(query, key, value, mask_mod=_causal, backend=backend)
        out.backward(grad_out)
        return peak() - before if watch else 0.0

    # compiled code and threads' stacks are not what is measured
    attend(512, watch=False)
    return {"extra": attend(length, watch=True), "tensors": 8 * 8 * length * 64 * 4.0}


def _causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def watermark() -> float:
    """Resets the kernel's record of the peak, and returns the bytes in use now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # the peak so far then hides growth below it
    return _status("VmRSS:")


def peak() -> float:
    return _status("VmHWM:")


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    """One measurement, one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("import", "first", "memory", "mask"))
    parser.add_argument("--mask", default="causal", help="of what to build, a kind of bench.masks")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--length", type=int, default=2048)
    options = parser.parse_args()
    if options.what == "import":
        found = measure_import()
    elif options.what == "first":
        found = measure_first(options.backend, options.length)
    elif options.what == "mask":
        from bench.masks import measure

        found = measure(options.mask, options.length)
    else:
        found = measure_memory(options.backend, options.length)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
