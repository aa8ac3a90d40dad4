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
from flexref.backends import numba_cuda
from flexref.backends.numba_cuda import compiler, gpu, launch
from flexref.backends.numba_cuda.emitter import NumbaCudaEmitter
from flexref.backends.numba_cuda.geometry import Chip
from flexref.conformance.cases import Case, build
from flexref.problem import Capture
from flexref.program.builder import Builder, Ref
from flexref.program.ops import OPS

ROOT = Path(__file__).parent.parent
ALL = ("query", "key", "value", "captured")
CAUSAL = "q_idx >= kv_idx"
LONG = Case(q_len=256, kv_len=256, mask=CAUSAL, wants=ALL)
CASES: dict[str, tuple[Case, tuple[int, int], int]] = {
    "bfloat16 of 128": (LONG.but(dtype="bfloat16", head_dim=128, value_dim=128), (9, 0), 1),
    "float16 of 64, captured": (
        LONG.but(dtype="float16", head_dim=64, value_dim=64, score="score * gain + rel[q_idx - kv_idx] + slope[h]"), (8, 0), 1
    ),
    # nothing is known of an index that comes from floats, so this one is checked
    "float32 of 64, checked": (LONG.but(head_dim=64, value_dim=64, score="score + rel[row[q_idx].long()]"), (9, 0), 1),
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


DTYPES = {"float": torch.float64, "int": torch.int64, "bool": torch.bool}


def types_of(op: str, number: str) -> list[str]:
    """The types of an operation's arguments and result, its free ones being `number`."""
    names = {"f": "float", "i": "int", "b": "bool", "n": number, "t": number}
    return [names[letter] for letter in OPS[op].signature]


def operations() -> list[tuple[str, str]]:
    """Every operation, with each type of its free arguments."""
    both = [op for op in OPS if set(OPS[op].signature) & {"n", "t"}]
    return [(op, "float") for op in OPS] + [(op, "int") for op in both]


def operation_source(op: str, number: str, real: str, simulated: bool) -> str:
    """A kernel f(c0, c1, ..., out) that does one operation to every element: the emitter's own lines."""
    *arguments, result = types_of(op, number)
    builder = Builder()
    at = builder.node("input", (), "int", "q_idx")
    loads = [Ref(builder.node("load", (at,), type, i)) for i, type in enumerate(arguments)]
    graph = builder.graph({"out": builder.op(op, *loads).position})
    captures = tuple(Capture(f"x{i}", DTYPES[type], (9,)) for i, type in enumerate(arguments))
    lines, out = NumbaCudaEmitter(captures, safe=frozenset((i, 0) for i in graph.loads)).emit(graph, "v", {"q_idx": "q_at"})
    home = "from flexref.backends.numba_cuda.kernels"
    machine = f"{home}.simulated import *\n{home} import simulated_maths as maths\n"
    machine = machine if simulated else f"{home}.machine import *\n{home} import maths\nimport math\n"
    head = f"from numba import cuda\n{machine}real = {real}\nINF = real(math.inf)\n"
    names = "".join(f"c{i}, " for i in range(len(arguments)))
    body = "".join(f"    {line}\n" for line in ["q_at = int64(cuda.threadIdx.x)", *lines, f"out[q_at] = {out['out']}"])
    return f"{head}def f({names}out):\n    dims = {(1, 9) * len(arguments)}\n" + body


def operations_that_compile() -> dict[str, str]:
    """For each operation, in float32 and float64, "" or what is wrong with its PTX."""
    found = {}
    elements = {"float": "float64[]", "int": "int64[]", "bool": "uint8[]"}
    for op, number in operations():
        for real in ("float32", "float64"):
            kinds = tuple(elements[type] for type in types_of(op, number))
            ptx = gpu.ptx_of(operation_source(op, number, real, False), "f", kinds, 32, (8, 0))
            unknown = [line for line in ptx.splitlines() if ".extern .func" in line]
            found[f"{op} {number} {real}"] = "; ".join(unknown)
    return found


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


def test_every_operation_compiles(listing):
    wrong = {name: says for name, says in listing["operations"].items() if says}
    assert len(listing["operations"]) == 2 * len(operations()) and not wrong


SAMPLES = {
    "float": [[0.3, -0.7, 0.95, -0.2, 0.5, 0.1, -0.85, 0.8, -0.4], [0.6, 0.7, -0.3, 0.4, -0.2, 0.9, 0.5, -0.1, 0.25]],
    "int": [[7, -7, 5, -5, 0, 9, -9, 1, 3], [2, 2, -2, -2, 3, 4, 4, 1, 3]],
    "bool": [[x == "1" for x in "101011001"], [x == "1" for x in "110010101"]],
}
# where a function is defined, if not between -1 and 1
MOVED = {"log": 2.0, "log2": 2.0, "sqrt": 2.0, "rsqrt": 2.0, "acosh": 3.0, "pow": 2.0}


@pytest.mark.skipif(bool(numba_cuda.emulated().unavailable()), reason="no simulator")
@pytest.mark.parametrize(("op", "number"), operations())
def test_every_operation_means_in_the_simulator_what_it_means(op, number):
    from flexref.backends.numba_cuda import simulator

    *arguments, result = types_of(op, number)
    counts = dict.fromkeys(SAMPLES, 0)
    given = []
    for type in arguments:
        values = torch.tensor(SAMPLES[type][min(counts[type], 1)], dtype=DTYPES[type])
        given.append(values + MOVED.get(op, 0.0) * (counts[type] == 0) if type == "float" else values)
        counts[type] += 1
    if op.startswith("shift"):
        given[1] = given[1].abs()
    wanted = OPS[op].meaning(*given)
    out = torch.zeros(9, dtype=torch.float64)
    simulator.cuda()
    source = operation_source(op, number, "float64", simulated=True)
    flats = [simulator.Flat((x.to(torch.uint8) if x.dtype == torch.bool else x).numpy()) for x in (*given, out)]
    simulator.run(compiler.function_of(source, "f"), 1, 9, 9, 0, flats)
    torch.testing.assert_close(out, wanted.double(), rtol=1e-12, atol=1e-12)


if __name__ == "__main__":
    result = {"cases": {name: compiled(name) for name in CASES}, "names": names_of_machine()}
    print(json.dumps(result | {"operations": operations_that_compile()}))
