"""The CuPy engine without a GPU: machine code for each architecture, lane layouts, what the host build must catch."""
from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flexref.arguments import prepare
from flexref.autograd import attend
from flexref.backends import cupy
from flexref.backends.cupy import cache, emitter, host, kernels_for, launch, plan
from flexref.backends.cupy.compile_error import CompileError
from flexref.conformance.cases import Blocks, Case, build
from flexref.conformance.checks import check_case, run_case
from flexref.problem import Capture, Problem
from flexref.program.builder import Builder, Ref
from flexref.program.ops import OPS
from flexref.program.template import fill
from flexref.program.trace import trace

ROOT = Path(__file__).resolve().parent.parent
ALL = ("query", "key", "value", "captured")
NO_COMPILER = host.unavailable()
needs_compiler = pytest.mark.skipif(bool(NO_COMPILER), reason="; ".join(NO_COMPILER))


class Recorder:
    """A machine that launches nothing: the kernels that a call would run, and their shared memory."""

    processors, shared_limit = 132, plan.SHARED_LIMIT

    def __init__(self):
        self.texts: list[tuple[str, str]] = []
        self.shared: dict[str, int] = {}

    def kernel(self, name: str, text: str):
        self.texts.append((name, text))
        return lambda blocks, shared, words: self.shared.update({name: shared})


def kernels_of(case: Case, **more) -> Recorder:
    """What a forward and a backward call of this case would launch."""
    problem, tensors = prepare(**build(case).arguments, **more)
    recorder = Recorder()
    output = launch.forward(problem, tensors, recorder)
    if problem.needs_backward:
        launch.backward(problem, tensors, output, torch.zeros_like(output.out), None, recorder)
    return recorder


CAUSAL = Case(q_len=512, kv_len=512, head_dim=128, value_dim=128, dtype="bfloat16", mask="q_idx >= kv_idx", wants=ALL)
DECODE = CAUSAL.but(q_len=1, kv_len=8192, kv_heads=2, group=4, wants=())
SOFT_CAP = "cap * torch.tanh(score / cap)"
DEFAULTS = {
    "bfloat16 128 causal": CAUSAL,
    "float16 64 soft-cap": CAUSAL.but(dtype="float16", head_dim=64, value_dim=64, score=SOFT_CAP),
    "bfloat16 decode": DECODE,
    "float32 64 causal": CAUSAL.but(dtype="float32", head_dim=64, value_dim=64),
}
ONLY_ON_90 = {
    "bfloat16 128 deterministic": CAUSAL.but(deterministic=True),
    "bfloat16 128 soft-cap": CAUSAL.but(score=SOFT_CAP),
    "bfloat16 128 ALiBi": CAUSAL.but(score="score + slope[h] * (kv_idx - q_idx)"),
    "bfloat16 256 causal": CAUSAL.but(head_dim=256, value_dim=256),
    "bfloat16 80 causal": CAUSAL.but(head_dim=80, value_dim=80),
    "float64 128 causal": CAUSAL.but(dtype="float64"),
}
SHARED = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024, "sm_100a": 227 * 1024}
BUILDS = [(arch, name) for arch in SHARED for name in DEFAULTS] + [("sm_90a", name) for name in ONLY_ON_90]


@pytest.mark.parametrize(("arch", "name"), BUILDS)
def test_kernels_compile_for_each_architecture_and_spill_nothing(arch, name):
    pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC compiles without a GPU: pip install cuda-bindings nvidia-cuda-nvrtc")
    from flexref.backends.cupy import nvrtc

    recorder = kernels_of((DEFAULTS | ONLY_ON_90)[name])
    assert recorder.texts
    for kernel, text in recorder.texts:
        cubin, log = nvrtc.compiled(text, kernel, arch, ("--ptxas-options=-v",))
        assert cubin.startswith(b"\x7fELF") and kernel.encode() in cubin
        found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers", log, re.DOTALL)
        assert found, log
        stores, loads, registers = map(int, found.groups())
        assert (stores, loads) == (0, 0), f"{kernel} for {arch}: {log}"
        assert registers <= 65536 // plan.THREADS
        assert recorder.shared[kernel] <= SHARED[arch], f"{kernel}: {recorder.shared[kernel]} bytes of shared memory"


def test_the_tensor_cores_are_used_for_halves_and_never_for_float32():
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    for dtype, wanted in (("bfloat16", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"), ("float32", "")):
        for name, text in kernels_of(CAUSAL.but(dtype=dtype)).texts:
            _, program = nvrtc.nvrtcCreateProgram(text.encode(), b"", 0, [], [])
            nvrtc.nvrtcCompileProgram(program, 2, [b"--gpu-architecture=compute_90", b"--std=c++17"])
            ptx = b" " * nvrtc.nvrtcGetPTXSize(program)[1]
            nvrtc.nvrtcGetPTX(program, ptx)
            assert ptx.count(b"fma.rn.f32") or name in ("delta", "combine") or wanted
            assert wanted.encode() in ptx if wanted and name != "delta" else b"mma." not in ptx
            assert b"tf32" not in ptx and (b"cp.async.cg" in ptx or name == "delta")


def test_the_architecture_has_its_own_instructions_where_cupys_own_choice_would_not():
    from flexref.backends.cupy import nvrtc

    assert [nvrtc.architecture(c) for c in ((8, 0), (8, 9), (9, 0), (10, 0))] == ["sm_80", "sm_89", "sm_90a", "sm_100a"]
    pytest.importorskip("cuda.bindings.nvrtc")
    wgmma = 'extern "C" __global__ void f() { asm volatile("wgmma.fence.sync.aligned;"); }'
    assert nvrtc.compiled(wgmma, "f", nvrtc.architecture((9, 0)))[0]
    with pytest.raises(CompileError, match=r"wgmma|sm_90a|ptxas"):
        nvrtc.compiled(wgmma, "f", "sm_90")


@needs_compiler
class TestHostBuild:
    """The same sources through g++; a planted fault in them must fail a case of the suite."""

    def backend(self, machine=None):
        return cupy.emulated(machine or host.Machine())

    FAULTS = {
        "swapped fragment lane": ("mma.cuh", "fa[m], fb[0], fb[1]);", "fa[m], fb[1], fb[0]);"),
        "rows of a fragment swapped": ("mma.cuh", "fa[m][1] = pack(T{}, down[c]", "fa[m][1] = pack(T{}, up[c]"),
        "wrong swizzle": ("mma.cuh", "low((side ^ turn<D>(row)) * 8)", "low((side ^ turn<D>(row + 1)) * 8)"),
        "missing __syncthreads": ("forward.cu", "- 2 : 0)>();\n            barrier();", "- 2 : 0)>();"),
        "missing wait for copies": ("forward.cu", "copy_wait<(STAGES > 2 ? STAGES - 2 : 0)>();", ""),
        "copies overtake their readers": ("forward.cu", "const int next = item + STAGES - 1;", "const int next = item + STAGES;"),
        "tail off by one": ("walk.cuh", "if (c >= tile.count) return -1;", "if (c + 1 >= tile.count) return -1;"),
        "stale maximum": ("forward.cu", "        row_max[r] = top;\n", ""),
        "missing rescale": ("forward.cu", "o[r][j] *= shrink[r];", ";"),
        "careless (R4)": ("forward.cu", "careful < 2; ++careful", "careful < 1; ++careful"),
        "wrong key head": ("forward.cu", "task.h / (int)p.group;", "task.h % (int)p.kv_heads;"),
        "full blocks dropped": ("walk.cuh", "walk.partial_tiles + walk.full_blocks * tiles;", "walk.partial_tiles;"),
        "mask_mod asked in full blocks": ("walk.cuh", "HAS_MASK && item < walk.partial_tiles", "HAS_MASK"),
        "gathered blocks shifted": ("walk.cuh", "tile.blocks[c / block] * block", "tile.blocks[c / block] * block + 1"),
        "a split forgotten": ("combine.cu", "(int i = 0; i < p.splits; ++i) row_sum", "(int i = 1; i < p.splits; ++i) row_sum"),
        "packed heads mixed up": ("forward.cu", "task.h * p.group + at / p.q_len", "task.h * p.group + at % p.group"),
        "delta without d lse": ("delta.cu", "if (p.lse_grad) sum -=", "if (false) sum -="),
        "scale left out of d query": ("backward_query.cu", "dq, p.head_dim, (real)p.scale);\n}", "dq, p.head_dim, (real)1);\n}"),
        "atomics lose a tile": ("backward_key.cu", "if (DQ && !careful) {", "if (DQ && !careful && item > 0) {"),
        "d key of one head of the group": ("backward_key.cu", "turn < batches * p.group", "turn < batches"),
        "careless backward (R4)": ("backward_query.cu", "if (careful)\n", "if (false)\n"),
        "factors kept without a barrier": ("backward_key.cu", "shared.kept);\n            barrier();", "shared.kept);"),
        "next head begun too early": ("backward_key.cu", "++turn) {\n            barrier();", "++turn) {\n"),
        "captured gradient of one warp": ("derivative.cuh", "if ((threadIdx.x & 31) == 0", "if (threadIdx.x == 0"),
    }  # fmt: skip
    PROVOKED_BY = [
        CAUSAL.but(q_len=150, kv_len=170, head_dim=64, value_dim=40, kv_heads=2, group=2),
        CAUSAL.but(q_len=160, kv_len=60, head_dim=32, value_dim=32, kv_heads=2, group=2, mask=None),
        CAUSAL.but(q_len=70, kv_len=90, head_dim=32, value_dim=32, dtype="float16", values="holes", score="score * gain"),
        CAUSAL.but(q_len=97, kv_len=129, head_dim=33, value_dim=64, wants=ALL, mask="(q_idx + kv_idx) % 3 != 0",
                   blocks=Blocks((16, 16), by_hand=True, heads=True), score="score * slope[h]", kv_heads=2),
        CAUSAL.but(q_len=150, kv_len=200, head_dim=32, value_dim=32, mask="(q_idx + kv_idx) % 3 != 0",
                   blocks=Blocks((64, 64), by_hand=True), wants=()),
        Case(q_len=3, kv_len=600, head_dim=64, dtype="bfloat16", kv_heads=2, group=3, values="large", max_scores=True),
        Case(q_len=40, kv_len=37, score="score * gain", loss="lse", deterministic=True, wants=ALL, kv_batch=1, batch=2),
    ]  # fmt: skip

    def test_the_sound_kernels_pass_without_bank_conflicts(self):
        machine = host.Machine()
        for case in self.PROVOKED_BY:
            assert check_case(self.backend(machine), case) is not None
        assert machine.bank_conflicts == 0

    @pytest.mark.parametrize("fault", FAULTS)
    def test_a_planted_fault_is_caught(self, fault, monkeypatch):
        file, right, wrong = self.FAULTS[fault]
        read = kernels_for.read
        assert right in read(file), f"{file} no longer has {right!r}"
        monkeypatch.setattr(kernels_for, "read", lambda name: read(name).replace(right, wrong) if name == file else read(name))
        backend, caught = self.backend(), []
        for case in self.PROVOKED_BY:
            try:
                check_case(backend, case)
            except (AssertionError, host.HostError) as error:
                caught.append(error)
                break
        assert caught, f"{fault} was not noticed"

    def test_a_nan_in_a_query_row_reaches_no_key_that_the_row_does_not_read(self):
        # R7 backward; the suite's own cases have NaN in keys, values and captured tensors
        built = build(CAUSAL.but(q_len=90, kv_len=90, head_dim=32, value_dim=32))
        results = []
        for x in (0.0, float("nan")):
            arguments = {name: built.arguments[name].detach().clone() for name in ("query", "key", "value")}
            arguments["query"][:, :, 40] = x
            leaves = [t.requires_grad_() for t in arguments.values()]
            problem, tensors = prepare(**built.arguments | arguments)
            out = attend(self.backend(host.machine()), problem, tensors).out
            results.append(torch.autograd.grad(out.float().sum(), leaves))
        for zero, strange in zip(*results, strict=True):
            torch.testing.assert_close(zero[:, :, 41:], strange[:, :, 41:], rtol=2e-2, atol=2e-2)
            assert strange[:, :, :41].isnan().any()

    def test_fragments_lie_as_the_manual_says(self):
        # lane l, g = l / 4, t = 2 (l % 4): a {(g, t), (g+8, t), (g, t+8), (g+8, t+8)} and the next column, b {(t, g), (t+8, g)}
        # and the next row, c {(g, t), (g, t+1), (g+8, t), (g+8, t+1)}
        text = kernel_text(
            """
    const int g = (threadIdx.x & 31) / 4, t = 2 * (threadIdx.x % 4);
    const unsigned short* a = (const unsigned short*)p.q.at;
    const unsigned short* b = (const unsigned short*)p.k.at;
    float* c = (float*)p.o.at;
    const auto two = [](const unsigned short* x, int step) { return x[0] | (unsigned)x[step] << 16; };
    const unsigned fa[4] = {two(a + g * 16 + t, 1), two(a + (g + 8) * 16 + t, 1), two(a + g * 16 + t + 8, 1),
                            two(a + (g + 8) * 16 + t + 8, 1)};
    float x[4] = {};
    multiply(Q{}, x[0], x[1], x[2], x[3], fa, two(b + t * 8 + g, 8), two(b + (t + 8) * 8 + g, 8));
    if (threadIdx.x >= 32) return;
    for (int i = 0; i < 4; ++i) c[(g + 8 * (i / 2)) * 8 + t + i % 2] = x[i];
"""
        )
        for dtype in (torch.float16, torch.bfloat16):
            a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.zeros(16, 8)
            run_alone(text(dtype), q=a, k=b, o=c)
            torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-6, atol=1e-5)

    @pytest.mark.parametrize("real", (torch.float32, torch.float64))
    def test_every_operation_means_what_pytorch_means(self, real):
        random = torch.Generator().manual_seed(0)
        n = 400
        special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e30, -1e-30, 0.5, -1.5, 2.5], dtype=real)
        x, y = (torch.cat([3 * torch.randn(n, generator=random).to(real), special.roll(i)]) for i in (0, 3))
        n += len(special)
        i = torch.randint(-(10**6), 10**6, (n,), generator=random)
        j = torch.randint(1, 60, (n,), generator=random)
        flags = torch.rand(2, n, generator=random) < 0.5
        values = {"float": (x, y, x), "int": (i, j, i), "bool": (*flags, flags[0])}
        tensors = [t for group in values.values() for t in group]
        captures = tuple(Capture(f"t{k}", t.dtype, (n,)) for k, t in enumerate(tensors))
        printer = emitter.CudaEmitter(captures, safe=frozenset((k, 0) for k in range(9)))
        body, wanted = [], {}
        for op, number in [(op, number) for op, row in OPS.items() for number in numbers_of(row.signature)]:
            names = {"f": "float", "i": "int", "b": "bool", "n": number, "t": number}
            kinds = [names[letter] for letter in OPS[op].signature[:-1]]
            builder = Builder()
            at = builder.input("kv_idx")
            places = [list(values).index(kind) * 3 + k for k, kind in enumerate(kinds)]
            loads = [Ref(builder.node("load", (at,), kind, place)) for kind, place in zip(kinds, places, strict=True)]
            graph = builder.graph({"out": builder.op(op, *loads).position})
            lines, outputs = printer.emit(graph, f"o{len(wanted)}_", {"kv_idx": "kv_idx"})
            body += ["{", *lines, f"((double*)p.o.at)[{len(wanted)} * p.q_len + kv_idx] = (double){outputs['out']};", "}"]
            wanted[op, number] = OPS[op].meaning(*(tensors[place] for place in places)).to(torch.float64)
        loop = "for (int kv_idx = threadIdx.x; kv_idx < p.q_len; kv_idx += THREADS) {"
        text = kernel_text("\n".join([loop, *body, "}"]), captures)
        found = torch.zeros(len(wanted), n, dtype=torch.float64)
        run_alone(text(real), q_len=n, captures=captures, captured=tensors, o=found)
        for row, ((op, number), right) in zip(found, wanted.items(), strict=True):
            # PyTorch takes a quotient of floats from the rest of the division, and no two agree on what NaN is as an int
            told = torch.isfinite(right) | (op not in ("floor_div", "remainder", "fmod", "trunc_div"))
            told &= (x.abs() < 1e18) if op == "float_to_int" else True
            tolerance = 0 if number == "int" or "b" in OPS[op].signature[-1] else 4e-6 if real == torch.float32 else 1e-13
            torch.testing.assert_close(
                row[told], right[told], rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda text, op=op: f"{op}: {text}"
            )

    @pytest.mark.parametrize("transposed", (False, True))
    def test_matrices_are_read_as_the_manual_says(self, transposed):
        word = "load_matrices" + "_transposed" * transposed
        text = kernel_text(
            f"""
    unsigned short* shared = (unsigned short*)shared_memory();
    if (threadIdx.x == 0)
        for (int i = 0; i < 256; ++i) shared[i] = ((const unsigned short*)p.q.at)[i];
    barrier();
    unsigned x[4];
    {word}(x, shared + (threadIdx.x & 31) * 8);
    if (threadIdx.x >= 32) return;
    for (int i = 0; i < 4; ++i) ((unsigned*)p.o.at)[threadIdx.x * 4 + i] = x[i];
"""
        )
        matrices = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
        found = torch.zeros(32, 4, 2, dtype=torch.int16)
        run_alone(text(torch.float16), shared=512, q=matrices, o=found)
        wanted = matrices.mT if transposed else matrices
        # lane l of matrix i: row l / 4, columns 2 (l % 4) and the next
        assert torch.equal(found, wanted.reshape(4, 32, 2).transpose(0, 1))

    def test_halves_are_rounded_as_pytorch_rounds(self):
        bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
        around = torch.tensor([65519.0, 65520.0, 5.96e-8, 2.98e-8, 2.9802322e-8, 6.1e-5, 0.0, -0.0, 1e-40, 3.4e38, float("inf")])
        x = torch.cat([bits.view(torch.float32), around, -around])
        text = kernel_text(
            """
    for (long long i = threadIdx.x; i < p.q_len; i += THREADS) {
        Q y;
        narrow(y, ((const float*)p.q.at)[i]);
        ((Q*)p.o.at)[i] = y;
        ((float*)p.dq.at)[i] = widen(y);
        const unsigned two = pack(y, ((const float*)p.q.at)[i], 1.0f);
        ((unsigned short*)p.dk.at)[i] = (unsigned short)two;
    }
"""
        )
        for dtype in (torch.float16, torch.bfloat16):
            rounded, packed, back = torch.empty(len(x), dtype=dtype), torch.empty(len(x), dtype=dtype), torch.empty(len(x))
            run_alone(text(dtype), q=x, o=rounded, dk=packed, dq=back, q_len=len(x))
            torch.testing.assert_close(rounded, x.to(dtype), rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(packed, x.to(dtype), rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(back, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize(
        ("body", "what"),
        [
            ("if (threadIdx.x & 1) across(1.0f, 1);", "never come"),
            ("if (threadIdx.x & 1) across(1.0f, 1); else warp_barrier();", "different instructions"),
            ("if (threadIdx.x < 64) barrier();", "never come"),
            ("unsigned x[4]; load_matrices(x, shared_memory() + 8);", "unaligned"),
            ("unsigned x[4]; load_matrices(x, shared_memory() + 512 * (threadIdx.x / 31 % 2));", "outside of shared memory"),
            ("copy_async(shared_memory() + 512, (void*)p.q.at, true);", "outside of shared memory"),
            ("copy_async(shared_memory(), (char*)p.q.at + 2, true);", "no multiple of 16"),
        ],
    )
    def test_what_a_gpu_leaves_undefined_is_an_error(self, body, what):
        text = kernel_text(body)
        with pytest.raises(host.HostError, match=what):
            run_alone(text(torch.float16), shared=512, q=torch.zeros(64, dtype=torch.float16))

    SUMMED = Case(q_len=130, kv_len=150, kv_heads=2, group=2, head_dim=16, wants=ALL, seed=3, captured_dtype="float64").but(
        dtype="float64", score="score * gain + slope[h] * 0.01 * (kv_idx - q_idx) + rel[q_idx - kv_idx]"
    )

    def in_both_orders(self, case: Case) -> set[str]:
        """The results that differ when thread blocks and threads run from the last to the first."""
        machine, both = host.Machine(), []
        # fewer than there are tasks, so that accumulators of their own serve several
        machine.processors = 3
        for machine.backwards in (False, True):
            ran = check_case(self.backend(machine), case)
            assert ran is not None
            both.append(ran.results)
        return {name for name, x in both[0].items() if not torch.equal(x, both[1][name])}

    def test_deterministic_is_the_same_in_any_order_of_threads_and_atomic_is_not(self):
        assert self.in_both_orders(self.SUMMED.but(deterministic=True)) == set()
        summed = {"grad query", "grad gain", "grad slope", "grad rel"}
        assert self.in_both_orders(self.SUMMED) == summed

    @pytest.mark.parametrize(
        ("file", "right"), [("backward_key.cu", "if (SERIAL) barrier();"), ("derivative.cuh", "if (ORDERED) barrier();")]
    )
    def test_additions_in_order_need_their_barriers(self, file, right, monkeypatch):
        read = kernels_for.read
        assert right in read(file)
        monkeypatch.setattr(kernels_for, "read", lambda name: read(name).replace(right, "") if name == file else read(name))
        assert self.in_both_orders(self.SUMMED.but(deterministic=True))

    def test_one_kernel_serves_every_length_batch_and_number(self, monkeypatch, tmp_path):
        monkeypatch.setattr(cache, "folder", lambda: tmp_path)
        machine = host.Machine()
        backend = self.backend(machine)
        # shift is a captured number; reads of length[b] are safe at any batch
        case = Case(mask="(q_idx + shift >= kv_idx) & (kv_idx < length[b])", score="score * 0.5", q_len=20, kv_len=70)
        for i, scale in enumerate((None, 0.3, -1.0, 2.5)):
            assert check_case(backend, case.but(scale=scale, q_len=20 + i, kv_len=70 + 13 * i, batch=1 + i, kv_heads=1 + i % 2))
        q = torch.randn(1, 1, 20, 8)
        for number in (1.5, 2.5, 3.5):
            def soft(score, b, h, q_idx, kv_idx, number=number):
                return score + number * kv_idx

            problem, tensors = prepare(q, q, q, soft)
            backend.forward(problem, tensors)
        # the fibers, a forward kernel of each program; the second program's number is not in its source
        assert machine.builds == 3

    def test_a_compile_error_shows_the_source_and_the_mod(self, monkeypatch):
        monkeypatch.setitem(emitter.CudaEmitter.spell, "tanh", "no_such_function({0})")
        with pytest.raises(CompileError) as caught:
            run_case(self.backend(), Case(score="torch.tanh(score)"))
        shown = r"line \d+, in what came from score_mod:\n(.*\n)*> +\d+ +const real v1 = no_such_function\(score\);"
        assert re.search(shown, str(caught.value))

    def test_processors_without_a_switch_of_their_own_use_the_portable_one(self):
        ran = check_case(self.backend(host.Machine(("-DFLEXREF_UCONTEXT",))), CAUSAL.but(q_len=20, kv_len=40, head_dim=32))
        assert ran is not None

    def test_a_second_machine_finds_what_the_first_compiled(self, monkeypatch, tmp_path):
        monkeypatch.setattr(cache, "folder", lambda: tmp_path)
        first, second = host.Machine(), host.Machine()
        for machine in (first, second):
            run_case(self.backend(machine), Case())
        assert (first.builds, second.builds) == (2, 0)


def numbers_of(signature: str) -> tuple[str, ...]:
    """The types that an operation's free letters stand for."""
    return ("float", "int") if set(signature) & {"n", "t"} else ("float",)


def alone(dtype: torch.dtype, captures: tuple[Capture, ...] = ()) -> Problem:
    """The problem that a kernel of a test's own belongs to."""
    x = torch.zeros(1, 1, 16, 32, dtype=dtype)
    return replace(prepare(x, x, x)[0], captures=captures)


def kernel_text(body: str, captures: tuple[Capture, ...] = ()):
    """A kernel named `alone` with this body, for the given dtype."""

    def of(dtype: torch.dtype) -> str:
        variant = kernels_for.Variant(plan.Tiles(64, 32, 1), 0)
        holes = {"constants": kernels_for._constants(alone(dtype, captures), variant)}
        holes |= {"mask_mod": ["return true;"], "score_mod": ["return score;"]}
        return fill(kernels_for.source("prelude.cuh") + f"KERNEL alone(PARAMETERS) {{\n{body}\n}}\n", holes)

    return of


def run_alone(text: str, shared=0, q_len=0, captures: tuple[Capture, ...] = (), captured=(), **tensors: torch.Tensor) -> None:
    """Run the kernel `alone` with one thread block; tensors by the names of Params, and captured ones."""
    places = kernels_for.parameter_words()
    words = np.zeros(kernels_for.parameter_count(alone(torch.float16, captures)), np.int64)
    words[places["q_len"][0]] = q_len
    for name, tensor in tensors.items():
        words[places[name][0]] = tensor.data_ptr()
    first = sum(count for _, count in places.values())
    for k, tensor in enumerate(captured):
        words[first + 3 * k : first + 3 * k + 3] = (tensor.data_ptr(), tensor.stride(0), len(tensor))
    host.machine().kernel("alone", text)(1, shared, words)


@needs_compiler
class TestEmitter:
    """The exact lines; that they mean the right thing is TestHostBuild's."""

    CAPTURES = (Capture("bias", torch.float32, (4, 6)),)
    INPUTS = {name: name for name in ("score", "b", "h", "q_idx", "kv_idx", "grad")}

    def lines(self, mod, kind="score", **more) -> list[str]:
        return emitter.CudaEmitter(self.CAPTURES, **more).emit(trace(mod, kind).graph, "v", self.INPUTS)[0]

    def test_one_operation_a_line(self):
        assert self.lines(lambda s, b, h, q, k: 5.0 * torch.tanh(s / 5.0)) == [
            "const real v1 = (real)(5.0);",
            "const real v2 = score / v1;",
            "const real v3 = MATH(tanh)(v2);",
            "const real v4 = v3 * v1;",
        ]

    def test_ints_are_narrow_only_where_that_is_proved(self):
        def mod(b, h, q, k):
            return q * q - k < 3

        assert self.lines(mod, "mask") == [
            "const long long v2 = (long long)((unsigned long long)q_idx * (unsigned long long)q_idx);",
            "const long long v3 = (long long)((unsigned long long)v2 - (unsigned long long)kv_idx);",
            "const long long v4 = 3ll;",
            "const bool v5 = (long long)v3 < (long long)v4;",
        ]
        assert self.lines(mod, "mask", small=frozenset({2, 3, 4})) == [
            "const int v2 = (int)(q_idx * q_idx);",
            "const int v3 = (int)(v2 - kv_idx);",
            "const int v4 = (int)(3ll);",
            "const bool v5 = v3 < v4;",
        ]

    def test_a_read_is_checked_or_kept_in_range_or_neither(self):
        bias = torch.zeros(4, 6)

        def mod(s, b, h, q, k):
            return s + bias[h, q]

        checked = self.lines(mod)
        assert "wrong |= v3_1_bad && concerned;" in checked and "if (v3_1_bad) v3_1 = 0;" in checked
        wrapped = self.lines(mod, checked=False)
        assert "long long v3_1 = q_idx < 0 ? q_idx + p.captured[4] : q_idx;" in wrapped
        assert "if (v3_1_bad) v3_1 = 0;" in wrapped and not any("wrong" in line for line in wrapped)
        proved = self.lines(mod, safe=frozenset({(3, 0), (3, 1)}))
        assert proved[:2] == ["const long long v3_0 = h;", "const long long v3_1 = q_idx;"]
        read = "const real v3 = read_float<float>(p.captured[0], v3_0 * p.captured[1] + v3_1 * p.captured[3]);"
        assert all(any(line.startswith(read) for line in lines) for lines in (checked, wrapped, proved))

    @pytest.mark.parametrize(
        ("value", "type", "text"),
        [
            (0.0, "float", "(real)(0.0)"),
            (-0.0, "float", "(real)(-0.0)"),
            (1e-300, "float", "(real)(1e-300)"),
            (math.inf, "float", "(real)INFINITE"),
            (-math.inf, "float", "(real)-INFINITE"),
            (math.nan, "float", "(real)NOT_A_NUMBER"),
            (-(2**63), "int", "(-9223372036854775807ll - 1)"),
            (7, "int", "7ll"),
            (True, "bool", "true"),
        ],
    )
    def test_literals(self, value, type, text):
        assert emitter.CudaEmitter(()).literal(value, type) == text


class Device(contextlib.nullcontext):
    attributes = {"MultiProcessorCount": 132, "MaxSharedMemoryPerBlockOptin": 227 * 1024}


class StandIn:
    """What device.py uses of CuPy; launches are kept instead of made."""

    def __init__(self):
        self.launches: list[tuple] = []
        self.asked_for_shared: list[int] = []
        self.devices: list[int] = []
        self.cuda = SimpleNamespace(Device=self.device, Stream=SimpleNamespace(from_external=lambda x: x.__cuda_stream__()[1]))

    def device(self, index: int):
        self.devices.append(index)
        return Device()

    def RawModule(self, *, path: str):
        assert Path(path).read_bytes().startswith(b"\x7fELF")

        def get_function(name: str):
            assert name.encode() in Path(path).read_bytes()
            kernel = RawKernel()
            kernel.kernel = lambda grid, block, arguments, shared, stream: self.launches.append(
                (name, grid, block, arguments, shared, stream)
            )
            return kernel

        asked = self.asked_for_shared

        class RawKernel:
            kernel: Any

            def __setattr__(self, name, value):
                if name == "max_dynamic_shared_size_bytes":
                    asked.append(value)
                object.__setattr__(self, name, value)

        return SimpleNamespace(get_function=get_function)


def test_a_launch_goes_to_torchs_stream_with_its_parameters_by_value(monkeypatch, tmp_path):
    pytest.importorskip("cuda.bindings.nvrtc")
    cupy_itself = StandIn()
    monkeypatch.setitem(sys.modules, "cupy", cupy_itself)
    # under a name of its own, so that nobody else gets the module with the stand-in
    spec = importlib.util.spec_from_file_location("device_alone", Path(cupy.__file__).parent / "device.py")
    assert spec and spec.loader
    device = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(device)
    monkeypatch.setattr(cache, "folder", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=1000 + index))
    problem, tensors = prepare(**build(CAUSAL.but(wants=())).arguments)
    for machine in (device.Machine(1), device.Machine(1)):
        launch.forward(problem, tensors, machine)
    assert machine.architecture == "sm_90a" and set(cupy_itself.devices) == {1}
    assert len(list(tmp_path.iterdir())) == 1, "the second machine has compiled again"
    tiles = plan.forward_tiles(problem, machine.shared_limit)
    for name, grid, block, arguments, shared, stream in cupy_itself.launches:
        assert (name, grid, block, stream) == ("forward", (4,), (128,), 1001)
        assert shared == plan.forward_bytes(problem, tiles) > 48 * 1024
        (words,) = arguments
        assert words.shape == (1,) and words.nbytes == 8 * kernels_for.parameter_count(problem)
        at, _ = kernels_for.parameter_words()["q"]
        assert words["words"][0, at] == tensors.query.data_ptr()
    assert cupy_itself.asked_for_shared == [shared, shared]


OPTIONS = [
    ("bfloat16", {"q_tile": 32}, "q_tile must be 64 or 128, got 32"),
    ("float32", {"q_tile": 40}, "q_tile must be a multiple of 16 up to 128, got 40"),
    ("bfloat16", {"kv_tile": "64"}, "kv_tile must be a multiple of 32 up to 128, got '64'"),
    ("float16", {"stages": True}, "stages must be 1, 2, 3 or 4, got True"),
    ("float16", {"splits": 0}, "splits must be 1 to 1024, got 0"),
    ("float64", {"q_tile": 128, "kv_tile": 128, "stages": 4}, "more than 166912 bytes of shared memory"),
]


@pytest.mark.parametrize(("dtype", "options", "reason"), OPTIONS)
def test_wrong_options_are_reasons(dtype, options, reason):
    built = build(Case(dtype=dtype, head_dim=64, value_dim=64))
    problem, _ = prepare(**built.arguments, options=options)
    assert any(reason in text for text in cupy.unsupported(problem)), cupy.unsupported(problem)


@needs_compiler
@pytest.mark.parametrize(
    "options", [{"q_tile": 64, "kv_tile": 96, "stages": 3}, {"q_tile": 128, "kv_tile": 64, "stages": 1}, {"splits": 3}]
)
def test_every_tile_gives_the_same_meaning(options):
    from flexref.conformance.compare import expectations

    built = build(CAUSAL.but(q_len=150, kv_len=270, head_dim=64, value_dim=64, wants=(), kv_heads=2))
    problem, tensors = prepare(**built.arguments, options=options)
    backend = cupy.emulated()
    assert backend.unsupported(problem) == []
    output, wanted = backend.forward(problem, tensors), expectations(built.call)
    wanted["out"].judge(output.out)
    wanted["lse"].judge(output.lse)


def test_what_it_refuses_and_what_it_lacks():
    x = torch.zeros(1, 1, 4, 300)
    problem, _ = prepare(x, x, x)
    reasons = cupy.unsupported(problem)
    assert "the tensors are on cpu" in reasons[0] and "at most 256" in reasons[1]
    if not torch.cuda.is_available():
        assert any("GPU" in reason for reason in cupy.unavailable())


def test_atomics_are_noted_where_they_are_used():
    def noted(**changes) -> list[str]:
        return cupy.notes(prepare(**build(CAUSAL.but(**changes)).arguments)[0])

    assert "atomics" in noted()[0] and "atomics" in noted(score="score * gain", wants=("captured",))[0]
    assert noted(deterministic=True) == noted(wants=("query",)) == noted(wants=("key", "value")) == noted(wants=()) == []


OUTSIDE = {
    "no fault": ("", ""),
    "a key past the end": ("p.list_len - tile.first)", "p.list_len - tile.first + 1)"),
    "an output row past the end": ("if (row_of(r) >= task.count) continue;", "if (row_of(r) > task.count) continue;"),
    "shared memory past the end": ("stage.rows[c] = at < 0", "stage.rows[c + 2 * COLS] = at < 0"),
}
# imports take longer than a fault, so each is run in a fork: the sanitizer ends the process that it finds something in
SANITIZED = """
import json, os, sys, tempfile
from flexref.backends import cupy
from flexref.backends.cupy import host, kernels_for
from flexref.conformance.cases import Blocks, Case
from flexref.conformance.checks import run_case

ALL = ("query", "key", "value", "captured")
ragged = Case(q_len=70, kv_len=90, head_dim=40, value_dim=33, dtype="bfloat16", mask="q_idx >= kv_idx", wants=ALL)
cases = (
    Case(q_len=2, kv_len=300, head_dim=16, dtype="float16", kv_heads=2, group=2, wants=("value",)),
    ragged.but(score="score + bias[h, q_idx, kv_idx]"),
    ragged.but(dtype="float16", blocks=Blocks((7, 5), by_hand=True)),
    Case(q_len=40, kv_len=37, head_dim=9, value_dim=3, score="score + row[q_idx] * col[b, kv_idx]", wants=ALL,
         layouts=("offset", "step", "columns"), deterministic=True),
)
read, found = kernels_for.read, {}
for fault, (right, wrong) in json.loads(sys.argv[1]).items():
    kernels_for.read = lambda name: read(name).replace(right, wrong) if right else read(name)
    with tempfile.TemporaryFile() as told:
        child = os.fork()
        if child == 0:
            os.dup2(told.fileno(), 2)
            machine = host.Machine()
            for case in cases:
                run_case(cupy.emulated(machine), case)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        told.seek(0)
        found[fault] = (status, told.read().decode(errors="replace")[:4000])
print(json.dumps(found))
"""


def sanitizer() -> str:
    """The path of g++'s address sanitizer, or nothing."""
    if shutil.which("g++") is None:
        return ""
    path = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    return str(Path(path).resolve()) if os.path.isabs(path) and os.path.exists(path) else ""


@pytest.mark.skipif(not sanitizer(), reason="g++ has no address sanitizer here: install libasan")
def test_no_kernel_reaches_outside_and_one_that_does_is_caught():
    environment = os.environ | {
        "LD_PRELOAD": sanitizer(),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "FLEXREF_CUPY_HOST_FLAGS": "-fsanitize=address",
        "PYTHONPATH": str(ROOT),
        "CXX": "g++",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", SANITIZED, json.dumps(OUTSIDE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == set(OUTSIDE)
    for fault, (status, told) in found.items():
        if fault == "no fault":
            assert status == 0 and "AddressSanitizer" not in told, told
        else:
            assert status != 0 and "AddressSanitizer" in told, f"{fault}: {told}"
