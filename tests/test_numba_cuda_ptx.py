"""The CUDA kernels compiled without a GPU, for compute capability 8.0 and 9.0: instructions, arguments, registers, spills.

Numba decides at its first import between a GPU and its simulator, which other tests use; so this file also is a program, which
prints what was compiled and runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexref.arguments import prepare
from flexref.backends.numba_cuda import gpu, launch
from flexref.backends.numba_cuda.geometry import Chip
from flexref.conformance.cases import Case, build

ROOT = Path(__file__).parent.parent
ALL = ("query", "key", "value", "captured")
CAUSAL = "q_idx >= kv_idx"
LONG = Case(q_len=256, kv_len=256, mask=CAUSAL, wants=ALL)
CASES: dict[str, tuple[Case, tuple[int, int], int]] = {
    "bfloat16 of 128": (LONG.but(dtype="bfloat16", head_dim=128, value_dim=128), (9, 0), 1),
    "float16 of 64, captured": (
        LONG.but(dtype="float16", head_dim=64, value_dim=64, score="score * gain + rel[q_idx - kv_idx] + slope[h]"), (8, 0), 1
    ),
    "float32 of 64": (LONG.but(head_dim=64, value_dim=64), (9, 0), 1),
    "float64, keys shared out": (Case(q_len=1, kv_len=4096, dtype="float64", wants=ALL), (8, 0), 132),
}  # fmt: skip
# bytes that a thread may keep in local memory: where a mod reads memory the assembler takes all registers, and a few words more
SPILLED = {"float16 of 64, captured": 128}
KERNELS = {"forward", "backward_query", "backward_key", "delta"}


class Listing(gpu.Gpu):
    """Compiles and lists what would be launched."""

    def __init__(self, cc: tuple[int, int], processors: int):
        super().__init__()
        self.cc, self.processors = cc, processors
        self.found: list[dict] = []

    def chip(self, like) -> Chip:
        return Chip(self.processors, 227 * 1024, True)

    def run(self, source, name, grid, geometry, shared, arguments) -> None:
        ptx = gpu.ptx_of(source, name, tuple(map(gpu.kind_of, arguments)), geometry.threads, self.cc)
        log = gpu.assemble(ptx, self.cc, verbose=True).log
        numbers = {word: int(n) for n, word in re.findall(r"(\d+) (?:bytes )?(registers|stack|spill stores|spill loads)", log)}
        parameters = ptx.partition(".entry")[2].partition(")")[0]
        row = dict(kernel=name, product=geometry.product, target=re.findall(r"\.target (\w+)", ptx)[0], shared=shared, **numbers)
        row["parameters"] = [8 if width == "64" else 4 for width in re.findall(r"\.param \.\w(\d\d)", parameters)]
        row["packed"] = len(gpu.packed(arguments))
        for word in ("mma.sync.aligned.m16n8k16", "ldmatrix", "cp.async.cg", ".local", "ld.shared", "atom"):
            row[word] = ptx.count(word)
        self.found.append(row)


def compiled(name: str) -> list[dict]:
    """What the calls of one case would launch, forward and backward."""
    case, cc, processors = CASES[name]
    problem, tensors = prepare(**build(case).arguments)
    device = Listing(cc, processors)
    output = launch.forward(problem, tensors, device)
    launch.backward(problem, tensors, output, torch.zeros_like(output.out), torch.zeros_like(output.lse), device)
    return device.found


def names_of_machine() -> list[list[str]]:
    """What kernels may call, on a GPU and in the simulator."""
    from flexref.backends.numba_cuda.kernels import machine, maths, simulated, simulated_maths

    return [sorted(name for name in vars(module) if name[0] != "_") for module in (machine, simulated, maths, simulated_maths)]


@pytest.fixture(scope="module")
def listing() -> dict:
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

    for library in ("nvvm", "nvJitLink"):
        try:
            load_nvidia_dynamic_lib(library)
        except DynamicLibNotFoundError:
            pytest.skip(f"{library} is not installed: pip install 'numba-cuda[cu13]'")
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_ENABLE_CUDASIM"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, __file__], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_every_kernel_compiles_and_keeps_its_numbers_in_registers(listing, name):
    rows = listing["cases"][name]
    assert {row["kernel"] for row in rows} == KERNELS | ({"combine"} if "shared out" in name else set())
    major, minor = CASES[name][1]
    for row in rows:
        assert row["target"] == f"sm_{major}{minor}"
        assert row[".local"] == 0 and row["stack"] <= SPILLED.get(name, 0), row
        assert row["registers"] <= 255


@pytest.mark.parametrize("name", CASES)
def test_a_launch_packs_what_the_kernel_takes(listing, name):
    for row in listing["cases"][name]:
        assert row["packed"] == len(row["parameters"]) and set(row["parameters"]) == {8}, row


@pytest.mark.parametrize("name", CASES)
def test_half_types_use_the_tensor_cores_and_others_do_not(listing, name):
    case = CASES[name][0]
    for row in listing["cases"][name]:
        if row["kernel"] in ("delta", "combine"):
            continue
        if case.dtype in ("float16", "bfloat16"):
            assert row["product"] == "mma" and row["ldmatrix"] and row["cp.async.cg"], row
            # a warp's 16 rows: the last product is unrolled, the others are at least one step of 16
            assert row["mma.sync.aligned.m16n8k16"] >= case.head_dim // 8
        else:
            assert row["product"] == "fma" and not row["mma.sync.aligned.m16n8k16"] and row["ld.shared"], row


def test_captured_gradients_are_atomic(listing):
    atomic = {row["kernel"]: row["atom"] for row in listing["cases"]["float16 of 64, captured"]}
    assert atomic["backward_query"] > 0 and not any(count for kernel, count in atomic.items() if kernel != "backward_query")


def test_the_simulator_has_the_names_of_the_machine(listing):
    machine, simulated, maths, simulated_maths = listing["names"]
    ours = {"annotations", "ir", "types", "intrinsic", "cuda", "SHARED", "GLOBAL", "math", "device", "uint64"}
    assert set(machine) - ours <= set(simulated)
    assert set(maths) - ours <= set(simulated_maths)


if __name__ == "__main__":
    print(json.dumps({"cases": {name: compiled(name) for name in CASES}, "names": names_of_machine()}))
