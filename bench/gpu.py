"""On a GPU: forward, backward and decoding beside torch.compile(flex_attention) and SDPA's own kernels, in one run.

An engine is timed on a case only after its result there has passed the error budget on sampled rows.
"""
from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask as torch_block_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex

import flexref
from bench import gpu_cases
from bench.cases import Variant
from bench.clock import Timing, geometric_mean, ratio
from flexref.cli.cases import Case
from flexref.cli.judge import judge
from flexref.cli.text import Inputs

FLEX, FA2 = "torch flex", "FlashAttention-2"
# the products of a backward are 2.5 times those of its forward, whatever an engine computes again
FLOPS = {"forward": 4.0, "backward": 10.0}


def gpu_seconds(call: Callable[[], object]) -> float:
    """One call, by the GPU's own clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


@dataclass
class GpuBench:
    """The settings of a run, and what it has found: `cases`, each with seconds, ratios and spreads.

    `clock(call)` gives seconds; `minutes`: no new case is begun after that.
    """

    engine: str
    device: str = "cuda"
    quick: bool = False
    autotuned: bool = False
    minutes: float = 9.0
    rounds: int = 15
    clock: Callable[[Callable[[], object]], float] = gpu_seconds
    say: Callable[[str], None] = print
    cases: list[dict] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def over(self) -> bool:
        """Whether the time is up."""
        return time.perf_counter() - self.began > 60 * self.minutes

    def times(self, calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds of each call in each round, all calls in turn; after two rounds that warm up."""
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for done in range(self.rounds + 2):
            for name in sorted(calls, reverse=bool(done % 2)):
                seconds = self.clock(calls[name])
                if done >= 2:
                    samples[name].append(seconds)
        return samples

    def record(self, what: str, where: dict, samples: dict[str, list[float]], amount: float, unit: str) -> None:
        """Keep one case: `amount` is the work of a call in 1e12 of `unit`'s numerator."""
        ours = Timing.of(samples["ours"])
        found = {"what": what, **where, "engine": self.engine, "seconds": ours._asdict(), unit: amount / ours.median}
        found["ratios"] = {n: ratio(samples["ours"], s)._asdict() for n, s in samples.items() if n != "ours"}
        self.cases.append(found)
        beside = ", ".join(f"{r['median']:.2f} x {name}" for name, r in found["ratios"].items())
        self.say(f"{what:9} {where}: {ours.median * 1e3:.3f} ms, {found[unit]:.4g} {unit}; {beside}")

    def refuse(self, what: str, where: dict, why: str) -> None:
        """Keep a case that was not timed, and why."""
        self.cases.append({"what": what, **where, "engine": self.engine, "refused": why})
        self.say(f"refused   {what} {where}: {why}")


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
    """Both passes of one variant at one size."""
    where = {"variant": variant.name, "dtype": str(dtype).removeprefix("torch."), "D": size[3], "S": size[2], "B": size[0]}
    generator = torch.Generator(bench.device).manual_seed(0)
    query, key, value = (torch.randn(size, generator=generator, device=bench.device).to(dtype) for _ in range(3))
    inputs = tuple(x.requires_grad_() for x in (query, key, value))
    mask = None
    if variant.mask_mod is not None:
        mask = flexref.create_block_mask(variant.mask_mod, None, None, size[2], size[2], device=bench.device)

    def ours() -> Tensor:
        return flexref.flex_attention(*inputs, variant.score_mod, mask, backend=bench.engine)

    why = complaint(variant, inputs, ours)
    if why:
        return bench.refuse("forward", where, why)
    calls = {"ours": ours, **rivals(bench, variant, inputs)}
    work = gpu_cases.density(variant, size[2]) * size[0] * size[1] * size[2] ** 2 * size[3] / 1e12
    bench.record("forward", where, bench.times({n: _plain(c) for n, c in calls.items()}), FLOPS["forward"] * work, "TFLOP/s")
    grad_out = torch.randn(size, generator=generator, device=bench.device).to(dtype)
    backward = {name: _backward(call, inputs, grad_out) for name, call in calls.items()}
    bench.record("backward", where, bench.times(backward), FLOPS["backward"] * work, "TFLOP/s")
    return None


def _plain(call: Callable[[], Tensor]) -> Callable[[], object]:
    def without_gradients() -> object:
        with torch.no_grad():
            return call()

    return without_gradients


def _backward(call: Callable[[], Tensor], inputs, grad_out: Tensor) -> Callable[[], object]:
    out = call()
    return lambda: torch.autograd.grad(out, inputs, grad_out, retain_graph=True)


def complaint(variant: Variant, inputs, ours: Callable[[], Tensor]) -> str:
    """Why this case may not be timed; "" if sampled rows of the very call are within the error budget."""
    try:
        with torch.no_grad():
            out = ours()
    except (flexref.FlexrefError, ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    # two heads of one batch are enough: float64 on the CPU
    query, key, value = (x.detach()[:1, :2].cpu() for x in inputs)
    case = Case(variant.name, Inputs(query, key, value, lengths=()), score=variant.score, allowed=variant.allowed)
    return judge(case, out[:1, :2].cpu()).complaint


def rivals(bench: GpuBench, variant: Variant, inputs) -> dict[str, Callable[[], Tensor]]:
    """What the engine is timed beside: flex always, SDPA's kernels where they have the variant."""
    length = inputs[0].shape[2]
    mask = None
    if variant.mask_mod is not None:
        mask = torch_block_mask(variant.mask_mod, None, None, length, length, device=bench.device)
    modes = ("default", "max-autotune-no-cudagraphs") if bench.autotuned else ("default",)
    found: dict[str, Callable[[], Tensor]] = {}
    for mode in modes:
        torch._dynamo.reset()
        compiled = torch.compile(torch_flex, dynamic=False, mode=mode)
        name = FLEX if mode == "default" else f"{FLEX}, autotuned"
        found[name] = lambda c=compiled: c(*inputs, score_mod=variant.score_mod, block_mask=mask)
    if variant.name in ("full", "causal"):
        for name, kernel in ((FA2, SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
            found[name] = lambda k=kernel: _sdpa(inputs, variant.name == "causal", k)
    return {name: call for name, call in found.items() if _runs(bench, name, call)}


def _sdpa(inputs, causal: bool, kernel: SDPBackend) -> Tensor:
    with sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(*inputs, is_causal=causal)


def _runs(bench: GpuBench, name: str, call: Callable[[], Tensor]) -> bool:
    try:
        call()
        return True
    except RuntimeError as error:
        bench.say(f"          {name} does not run this: {str(error).splitlines()[0][:100]}")
        return False


def decoding(
    bench: GpuBench,
    dtype: torch.dtype = torch.bfloat16,
    sizes: tuple[int, ...] = gpu_cases.DECODE_BYTES,
    lengths: tuple[int, ...] = gpu_cases.DECODE_LENGTHS,
) -> None:
    """One query against long keys, 32 query heads on 8 key heads, D 128: bytes of keys and values a second."""
    for total in sizes:
        for length in lengths:
            batch = total // (2 * 2 * 8 * 128 * length)
            if batch == 0 or bench.over():
                continue
            generator = torch.Generator(bench.device).manual_seed(0)
            query = torch.randn(batch, 32, 1, 128, generator=generator, device=bench.device).to(dtype)
            size = batch, 8, length, 128
            key, value = (torch.randn(size, generator=generator, device=bench.device).to(dtype) for _ in range(2))
            inputs = query, key, value

            def ours(inputs=inputs) -> Tensor:
                return flexref.flex_attention(*inputs, enable_gqa=True, backend=bench.engine)

            first = [x[:1].double() for x in inputs]
            wanted = F.scaled_dot_product_attention(first[0], first[1], first[2], enable_gqa=True)
            where = {"variant": "decode", "dtype": str(dtype).removeprefix("torch."), "S": length, "B": batch}
            where["bytes"] = (key.numel() + value.numel()) * key.itemsize
            off = float((ours()[:1].double() - wanted).abs().max())
            if not off < 0.01:
                bench.refuse("decode", where, f"off by {off:.2g}")
                continue
            calls = {"ours": ours, "SDPA": lambda i=inputs: F.scaled_dot_product_attention(*i, enable_gqa=True)}
            bench.record("decode", where, bench.times(calls), where["bytes"] / 1e12, "TB/s")


def targets(bench: GpuBench) -> dict[str, dict]:
    """Each target of the engine with its value in this run, or None where nothing was measured for it."""
    timed = [case for case in bench.cases if "seconds" in case]
    found = {}
    for target in gpu_cases.TARGETS.get(bench.engine, ()):
        values = _values(target.name, timed)
        value = geometric_mean(values) if values else None
        met = value is not None and target.met(value)
        found[target.name] = {"value": value, "asked": target.asked, "unit": target.unit, "met": met, "cases": len(values)}
    return found


def _values(name: str, timed: list[dict]) -> list[float]:
    what, _, rest = name.partition(" / ")
    if rest:
        rival = rest.partition(":")[0]
        return [case["ratios"][rival]["median"] for case in timed if case["what"] == what and rival in case["ratios"]]
    if name.startswith("decode"):
        return [c["TB/s"] for c in timed if c["what"] == "decode" and c["bytes"] >= gpu_cases.COLD_BYTES]
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


def run(bench: GpuBench, only: tuple[str, ...], path: Path | None) -> int:
    """0 if every target of the engine is met, else 1."""
    halves = (torch.bfloat16,) if bench.quick else (torch.bfloat16, torch.float16)
    dims = (64, 128) if bench.quick else gpu_cases.DIMS
    lengths = (2048, 8192) if bench.quick else gpu_cases.LENGTHS
    if "decode" in only:
        decoding(bench)
    if "training" in only:
        training(bench, halves, dims, lengths)
    if "float32" in only:
        training(bench, (torch.float32,), (128,), (8192,))
    found = targets(bench)
    for name, r in found.items():
        value = "not measured" if r["value"] is None else f"{r['value']:.3g} {r['unit']}"
        bench.say(f"{'met ' if r['met'] else 'MISS'}  {name}: {value} (asked {r['asked']:g} {r['unit']})")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"machine": machine(bench.device), "quick": bench.quick, "targets": found, "cases": bench.cases}
        path.write_text(json.dumps(kept, indent=1) + "\n")
    return 0 if all(r["met"] for r in found.values()) else 1
