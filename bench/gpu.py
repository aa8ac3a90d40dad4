"""On a GPU: forward, backward and decoding beside torch.compile(flex_attention) and SDPA's own kernels, in one run.

An engine is timed on a case only after its results there have passed the error budget: every element of a small problem,
gradients too, and sampled rows of the very call that is timed. Every case is in the file as soon as it is there.
"""
from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import flexref
from bench import gpu_cases
from bench.cases import Variant
from bench.check import SMALL, small
from bench.clock import Timing, geometric_mean, ratio
from bench.gpu_rivals import rivals
from flexref.arguments import prepare
from flexref.autograd import attend
from flexref.backend import Backend, find_backends
from flexref.cli.cases import Case
from flexref.cli.judge import judge
from flexref.cli.text import Inputs

# the products of a backward are 2.5 times those of its forward, whatever an engine computes again
FLOPS = {"forward": 4.0, "backward": 10.0}
# cycles of the GPU, about a millisecond: longer than Python needs for a call
_BUSY = 2_000_000


def gpu_seconds(call: Callable[[], object]) -> float:
    """One call, by the GPU's own clock. The GPU is kept busy until the call has been put in its queue."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_BUSY)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


@dataclass
class GpuBench:
    """The settings of a run, and what it has found: `cases`, each with seconds, ratios and spreads.

    `clock(call)` gives seconds; `minutes`: no new case is begun after that; `emulated`: engines without their device.
    """

    engines: tuple[str, ...]
    device: str = "cuda"
    quick: bool = False
    autotuned: bool = False
    emulated: bool = False
    minutes: float = 9.0
    rounds: int = 15
    clock: Callable[[Callable[[], object]], float] = gpu_seconds
    say: Callable[[str], None] = print
    path: Path | None = None
    cases: list[dict] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def over(self) -> bool:
        """Whether the time is up."""
        return time.perf_counter() - self.began > 60 * self.minutes

    def backend(self, engine: str) -> Backend:
        """The engine, or its emulation."""
        found = find_backends()[engine]
        return found.emulated() if self.emulated and hasattr(found, "emulated") else found  # type: ignore[attr-defined]

    def attention(self, engine: str, *arguments: Any, **settings: Any) -> tuple[Tensor, Tensor]:
        """out and lse of what a user would call; emulated, of what that call comes to."""
        if not self.emulated:
            return flexref.flex_attention(*arguments, **settings, return_lse=True, backend=engine)
        output = attend(self.backend(engine), *prepare(*arguments, **settings))
        return output.out, output.lse

    def times(self, calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds of each call in each round, all calls in turn; after two rounds that warm up."""
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for done in range(self.rounds + 2):
            for name in sorted(calls, reverse=bool(done % 2)):
                seconds = self.clock(calls[name])
                if done >= 2:
                    samples[name].append(seconds)
        return samples

    def record(self, engine: str, what: str, where: dict, samples: dict[str, list[float]], amount: float, unit: str) -> dict:
        """Keep one case of one engine: `amount` is the work of a call in 1e12 of `unit`'s numerator. The rest are rivals."""
        ours = Timing.of(samples[engine])
        found = {"what": what, **where, "engine": engine, "seconds": ours._asdict(), unit: amount / ours.median}
        beside = {name: s for name, s in samples.items() if name not in self.engines}
        found["ratios"] = {name: ratio(samples[engine], s)._asdict() for name, s in beside.items()}
        said = [f"{ours.median * 1e3:.3f} ms", f"{found[unit]:.4g} {unit}"]
        said += [f"{r['median']:.2f} x {name}" for name, r in found["ratios"].items()]
        self.say(f"{what:9} {engine} {_words(where)}: {', '.join(said)}")
        return self._keep(found)

    def refuse(self, engine: str, what: str, where: dict, why: str) -> None:
        """Keep a case that was not timed, and why."""
        self.say(f"refused   {what} {engine} {_words(where)}: {why}")
        self._keep({"what": what, **where, "engine": engine, "refused": why})

    def _keep(self, case: dict) -> dict:
        self.cases.append(case)
        self.write()
        return case

    def write(self) -> None:
        """The file as it stands."""
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            found = {engine: targets(self, engine) for engine in self.engines}
            kept = {"machine": machine(self.device), "quick": self.quick, "targets": found, "cases": self.cases}
            self.path.write_text(json.dumps(kept, indent=1) + "\n")


def _words(where: dict) -> str:
    return ", ".join(str(value) if name in ("variant", "dtype") else f"{name} {value}" for name, value in where.items())


def training(bench: GpuBench, dtypes: tuple[torch.dtype, ...], dims: tuple[int, ...], lengths: tuple[int, ...]) -> None:
    """Forward and backward of every variant."""
    for dtype in dtypes:
        for dim in dims:
            for length in lengths:
                size = gpu_cases.shape(length, dim)
                for variant in gpu_cases.variants(size[1], length, bench.device).values():
                    if bench.over():
                        return bench.say("the time is up; the rest was not measured")
                    one_case(bench, dtype, size, variant)
    return None


def one_case(bench: GpuBench, dtype: torch.dtype, size: tuple[int, int, int, int], variant: Variant) -> None:
    """Both passes of one variant at one size, of every engine that is right."""
    where = {"variant": variant.name, "dtype": str(dtype).removeprefix("torch."), "D": size[3], "S": size[2], "B": size[0]}
    generator = torch.Generator(bench.device).manual_seed(0)
    query, key, value = (torch.randn(size, generator=generator, device=bench.device).to(dtype) for _ in range(3))
    inputs = query.requires_grad_(), key.requires_grad_(), value.requires_grad_()
    mask = None
    if variant.mask_mod is not None:
        mask = flexref.create_block_mask(variant.mask_mod, None, None, size[2], size[2], device=bench.device)
    calls: dict[str, Callable[[], Tensor]] = {}
    for engine in bench.engines:
        calls[engine] = lambda e=engine: bench.attention(e, *inputs, variant.score_mod, mask)[0]
        why = complaint(bench, engine, variant, inputs, calls[engine])
        if why:
            bench.refuse(engine, "forward", where, why)
            del calls[engine]
    if not calls:
        return
    right = list(calls)
    calls |= rivals(bench, variant, inputs)
    work = gpu_cases.density(variant, size[2]) * size[0] * size[1] * size[2] ** 2 * size[3] / 1e12
    grad_out = torch.randn(size, generator=generator, device=bench.device).to(dtype)
    passes = {
        "forward": {name: _plain(call) for name, call in calls.items()},
        "backward": {name: _backward(call, inputs, grad_out) for name, call in calls.items()},
    }
    for what, timed in passes.items():
        samples = bench.times(timed)
        for engine in right:
            case = bench.record(engine, what, where, samples, FLOPS[what] * work, "TFLOP/s")
            case["host"] = host_seconds(timed[engine])._asdict()


def host_seconds(call: Callable[[], object]) -> Timing:
    """Seconds until a call returns, its work put in the queue of a GPU that is not waited for."""
    samples = []
    for _ in range(7):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return Timing.of(samples)


def _plain(call: Callable[[], Tensor]) -> Callable[[], object]:
    def without_gradients() -> object:
        with torch.no_grad():
            return call()

    return without_gradients


def _backward(call: Callable[[], Tensor], inputs, grad_out: Tensor) -> Callable[[], object]:
    out = call()
    return lambda: torch.autograd.grad(out, inputs, grad_out, retain_graph=True)


def complaint(bench: GpuBench, engine: str, variant: Variant, inputs, ours: Callable[[], Tensor]) -> str:
    """Why this case may not be timed; "" if a small problem, and sampled rows of the very call, are within the budget."""
    heads = 2
    try:
        like, attention = inputs[0].detach()[:, :heads], partial(bench.attention, engine)
        small(gpu_cases.variants(heads, SMALL, bench.device)[variant.name], like, attention, gradients=True)
        # with gradients on: the kernel that the backward needs is the one that is timed, or it would be built as well
        out = ours().detach()
    except Exception as error:
        # a compiler, a driver and a kernel each have errors of their own
        return f"{type(error).__name__}: {error}"
    # two heads of one batch are enough: float64 on the CPU
    query, key, value = (x.detach()[:1, :heads].cpu() for x in inputs)
    case = Case(variant.name, Inputs(query, key, value, lengths=()), score=variant.score, allowed=variant.allowed)
    return judge(case, out[:1, :heads].cpu()).complaint


def decoding(
    bench: GpuBench,
    dtype: torch.dtype = torch.bfloat16,
    sizes: tuple[int, ...] = gpu_cases.DECODE_BYTES,
    lengths: tuple[int, ...] = gpu_cases.DECODE_LENGTHS,
) -> None:
    """One query against long keys, 32 query heads on 8 key heads, D 128: bytes of keys and values a second, beside a copy."""
    for total in sizes:
        for length in lengths:
            batch = total // (2 * dtype.itemsize * 8 * 128 * length)
            if batch == 0 or bench.over():
                continue
            _one_decoding(bench, dtype, batch, length)


def _one_decoding(bench: GpuBench, dtype: torch.dtype, batch: int, length: int) -> None:
    generator = torch.Generator(bench.device).manual_seed(0)
    query = torch.randn(batch, 32, 1, 128, generator=generator, device=bench.device).to(dtype)
    size = batch, 8, length, 128
    key, value = (torch.randn(size, generator=generator, device=bench.device).to(dtype) for _ in range(2))
    inputs = query, key, value
    first = [x[:1].double() for x in inputs]
    wanted = F.scaled_dot_product_attention(first[0], first[1], first[2], enable_gqa=True)
    where = {"variant": "decode", "dtype": str(dtype).removeprefix("torch."), "S": length, "B": batch}
    where["bytes"] = (key.numel() + value.numel()) * key.itemsize
    calls: dict[str, Callable[[], object]] = {}
    for engine in bench.engines:
        ours = lambda e=engine: bench.attention(e, *inputs, enable_gqa=True)[0]  # noqa: E731
        try:
            off = float((ours()[:1].double() - wanted).abs().max())
            why = "" if off < 0.01 else f"off by {off:.2g}"
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        if why:
            bench.refuse(engine, "decode", where, why)
        else:
            calls[engine] = ours
    right = list(calls)
    # half of the bytes are read and half are written: as many cross the memory's bus as decoding reads
    half, target = torch.empty_like(key), torch.empty_like(key)
    calls["copy"] = lambda: target.copy_(half)
    calls["SDPA"] = lambda: F.scaled_dot_product_attention(*inputs, enable_gqa=True)
    samples = bench.times(calls)
    for engine in right:
        case = bench.record(engine, "decode", where, samples, where["bytes"] / 1e12, "TB/s")
        case["host"] = host_seconds(calls[engine])._asdict()


def targets(bench: GpuBench, engine: str) -> dict[str, dict]:
    """Each target of the engine with its value in this run, or None where nothing was measured for it."""
    timed = [case for case in bench.cases if "seconds" in case and case["engine"] == engine]
    found = {}
    for target in gpu_cases.TARGETS.get(engine, ()):
        values = _values(target.name, timed)
        value = geometric_mean(values) if values else None
        met = value is not None and target.met(value)
        found[target.name] = {"value": value, "asked": target.asked, "unit": target.unit, "met": met, "cases": len(values)}
    return found


def _values(name: str, timed: list[dict]) -> list[float]:
    what, _, rest = name.partition(" / ")
    if rest:
        rival, _, which = rest.partition(": ")
        least = gpu_cases.COLD_BYTES if what == "decode" else 0
        return [
            case["ratios"][rival]["median"]
            for case in timed
            if case["what"] == what and rival in case["ratios"] and case.get("bytes", least) >= least
            and which in ("geometric mean", case["variant"])
        ]  # fmt: skip
    what, dim, variant = name.split(", ")
    wide = what.endswith("float32")
    what = what.removesuffix(" float32")
    return [
        case["TFLOP/s"]
        for case in timed
        if case["what"] == what and f"D {case['D']}" == dim and case["variant"] == variant
        and (case["dtype"] == "float32") == wide and case["S"] >= 8192
    ]  # fmt: skip


def machine(device: str) -> dict[str, str]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"gpu": name, "python": platform.python_version(), "torch": torch.__version__, "flexref": flexref.__version__}


def run(bench: GpuBench, only: tuple[str, ...]) -> int:
    """0 if every target of the engines is met, else 1."""
    halves = (torch.bfloat16,) if bench.quick else (torch.bfloat16, torch.float16)
    dims = (64, 128) if bench.quick else gpu_cases.DIMS
    lengths = (2048, 8192) if bench.quick else gpu_cases.LENGTHS
    if "decode" in only:
        decoding(bench)
    if "training" in only:
        training(bench, halves, dims, lengths)
    if "float32" in only:
        training(bench, (torch.float32,), (128,), (8192,))
    bench.write()
    met = True
    for engine in bench.engines:
        for name, r in targets(bench, engine).items():
            value = "not measured" if r["value"] is None else f"{r['value']:.3g} {r['unit']}"
            bench.say(f"{'met ' if r['met'] else 'MISS'}  {engine}, {name}: {value} (asked {r['asked']:g} {r['unit']})")
            met &= r["met"]
    return 0 if met else 1
