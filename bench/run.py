"""Prints each target as a ratio measured in this very run, with its spread; `--json PATH` keeps them."""
from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.nn.attention.flex_attention import create_block_mask as torch_block_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex

import flexref
from bench.cases import TARGETS, Variant, variants
from bench.check import Inputs, block_mask, complaint
from bench.clock import Timing, geometric_mean, interleaved, ratio
from bench.documents import documents
from bench.fresh import in_new_process
from bench.masks import masks


@dataclass
class Bench:
    """The settings of a run, and what it has found so far: `results` by target, `cases` for each pair that was timed."""

    backend: str = "auto"
    quick: bool = False
    length: int = 2048
    heads: int = 8
    head_dim: int = 64
    results: dict[str, dict] = field(default_factory=dict)
    cases: list[dict] = field(default_factory=list)
    say: Callable[[str], None] = print

    @property
    def rounds(self) -> int:
        return 5 if self.quick else 25

    @property
    def seconds(self) -> float:
        """How long one pair may take."""
        return 3.0 if self.quick else 20.0

    def inputs(self, dtype: torch.dtype = torch.float32, length: int | None = None) -> Inputs:
        """query, key, value (1, H, S, D), the same every time."""
        generator = torch.Generator().manual_seed(0)
        shape = 1, self.heads, length or self.length, self.head_dim
        query, key, value = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
        return query, key, value

    def target(self, name: str, value: float | None, why: str = "", spread: Timing | None = None) -> None:
        """Record a target's value; None, with the reason, where it could not be measured: that is a miss."""
        target = TARGETS[name]
        met = value is not None and target.met(value)
        self.results[name] = {
            "value": value,
            "asked": target.asked,
            "sense": "at most" if target.at_most else "at least",
            "unit": target.unit,
            "met": met,
            "spread": [spread.low, spread.high] if spread else None,
            "why": why,
        }
        shown = why if value is None else f"{value:.3g} {target.unit}"
        self.say(f"{'met ' if met else 'MISS'}  {name}: {shown} (asked {target.asked:g} {target.unit})")

    def refused(self, variant: str, targets: tuple[str, ...], gradients: bool = False) -> bool:
        """Whether flexref fails the comparison on `variant`; then `targets` are missed, with the reason."""
        why = complaint(variants(self.heads, self.length)[variant], self.inputs(), self.backend, gradients)
        for name in targets if why else ():
            self.target(name, None, why)
        return bool(why)

    def pair(self, what: str, variant: Variant, inputs: Inputs, gradients: bool, rival: Callable) -> Timing | None:
        """Times flexref beside `rival` on one variant; None, said and recorded, if flexref fails its comparison."""
        why = complaint(variant, inputs, self.backend, gradients)
        if why:
            self.say(f"refused  {what}, {variant.name}: {why}")
            self.cases.append({"what": what, "variant": variant.name, "refused": why})
            return None
        mask = block_mask(variant, inputs[0].shape[2])

        def ours() -> torch.Tensor:
            return flexref.flex_attention(*inputs, variant.score_mod, mask, backend=self.backend)

        calls: dict[str, Callable[[], object]] = {"ours": ours, "theirs": rival}
        if gradients:
            calls = {"ours": _backward(ours, inputs), "theirs": _backward(rival, inputs)}
        with _requiring(inputs, gradients):
            samples = interleaved(calls, self.rounds, self.seconds)
        found = ratio(samples["ours"], samples["theirs"])
        ours_took, theirs_took = Timing.of(samples["ours"]), Timing.of(samples["theirs"])
        seconds = {"ours": ours_took._asdict(), "theirs": theirs_took._asdict()}
        self.cases.append({"what": what, "variant": variant.name, "ratio": found._asdict(), "seconds": seconds})
        self.say(
            f"      {what}, {variant.name}: {ours_took.median * 1e3:.1f} ms beside {theirs_took.median * 1e3:.1f} ms, "
            f"{found.median:.2f} x ({found.low:.2f} to {found.high:.2f})"
        )
        return found


@contextmanager
def _requiring(inputs: Inputs, gradients: bool) -> Iterator[None]:
    for x in inputs:
        x.requires_grad_(gradients)
    try:
        yield
    finally:
        for x in inputs:
            x.grad = None
            x.requires_grad_(False)


def _backward(forward: Callable[[], torch.Tensor], inputs: Inputs) -> Callable[[], None]:
    grad_out = torch.ones_like(inputs[0])

    def call() -> None:
        torch.autograd.grad(forward(), inputs, grad_out)

    return call


def against_flex(bench: Bench) -> None:
    """Forward beside torch.compile(flex_attention), float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        inputs = bench.inputs(dtype)
        ratios = []
        for variant in variants(bench.heads, bench.length).values():
            torch._dynamo.reset()
            compiled = torch.compile(torch_flex, dynamic=False)
            mask = None
            if variant.mask_mod is not None:
                mask = torch_block_mask(variant.mask_mod, None, None, bench.length, bench.length, device="cpu")
            found = bench.pair(
                f"forward {kind} / torch flex",
                variant,
                inputs,
                False,
                lambda c=compiled, v=variant, m=mask: c(*inputs, score_mod=v.score_mod, block_mask=m),  # noqa: B023
            )
            ratios.append(found.median if found else None)
        good = [r for r in ratios if r is not None]
        why = "" if len(good) == len(ratios) else "a variant was refused"
        bench.target(f"forward {kind} / torch flex: geometric mean", None if why else geometric_mean(good), why)
        if dtype == torch.float32:
            bench.target(f"forward {kind} / torch flex: least variant", None if why else min(good), why)


def against_sdpa(bench: Bench) -> None:
    """Forward, and forward with backward, beside torch's scaled_dot_product_attention."""
    inputs = bench.inputs()
    known = variants(bench.heads, bench.length)
    at = torch.arange(bench.length)
    window = known["window 256"]
    assert window.allowed is not None
    dense = window.allowed(0, 0, at[:, None], at[None, :])
    arguments: dict[str, dict] = {"full": {}, "causal": {"is_causal": True}, "window 256": {"attn_mask": dense}}
    wanted = [("forward", False, name) for name in arguments]
    wanted += [("forward + backward", True, name) for name in ("causal", "window 256")]
    for what, gradients, name in wanted:
        rival = "SDPA with a dense mask" if name == "window 256" else "SDPA"

        def sdpa(more: dict = arguments[name]) -> torch.Tensor:
            return F.scaled_dot_product_attention(*inputs, **more)

        found = bench.pair(f"{what} / {rival}", known[name], inputs, gradients, sdpa)
        why = "" if found else "refused"
        bench.target(f"{what} / {rival}: {name}", found.median if found else None, why, found)


def starting(bench: Bench) -> None:
    """A new mod's first call, the first of all with an empty cache, one from a filled cache; the cost of the import."""
    names = (
        "first call of a new mod",
        "first call with an empty cache, drivers and all",
        "first call from the disk cache in a new process, over the import",
        "import flexref over import torch",
    )
    if bench.refused("ALiBi + causal", names, gradients=True):
        return
    news, firsts, cached, imports = [], [], [], []
    for _ in range(1 if bench.quick else 5):
        with TemporaryDirectory() as cache:
            arguments = "--backend", bench.backend, "--length", str(bench.length)
            empty = in_new_process("first", cache, *arguments)
            news.append(empty["new"])
            firsts.append(empty["first"])
            cached.append(in_new_process("first", cache, *arguments)["first"])
            imports.append(in_new_process("import", cache)["flexref"])
    for name, samples in zip(names, (news, firsts, cached, imports), strict=True):
        bench.target(name, statistics.median(samples), spread=Timing.of(samples))


def fixed_cost(bench: Bench) -> None:
    """Microseconds of a tiny call: the worse of one with nothing and one with both mods."""
    inputs = bench.inputs(length=16)
    known = variants(bench.heads, 16)
    worst: Timing | None = None
    for variant in (known["full"], known["ALiBi + causal"]):
        why = complaint(variant, inputs, bench.backend, False)
        if why:
            bench.target("fixed cost of a call, L = S = 16", None, why)
            return
        mask = block_mask(variant, 16)

        def many(score_mod=variant.score_mod, mask=mask) -> None:
            for _ in range(100):
                flexref.flex_attention(*inputs, score_mod, mask, backend=bench.backend)

        samples = [1e4 * s for s in interleaved({"ours": many}, bench.rounds, 5.0)["ours"]]
        timing = Timing.of(samples)
        worst = timing if worst is None or timing.median > worst.median else worst
    assert worst is not None
    bench.target("fixed cost of a call, L = S = 16", worst.median, spread=worst)


def memory(bench: Bench) -> None:
    """Peak extra memory at two lengths; a process each."""
    name = "peak extra memory, causal forward + backward, over q, k, v, out and gradients"
    growth = "growth of peak extra memory when S doubles"
    if bench.refused("causal", (name, growth), gradients=True):
        return
    long = 8192 if bench.quick else 32768
    found = {}
    with TemporaryDirectory() as cache:
        for length in (long // 2, long):
            measured = in_new_process("memory", cache, "--backend", bench.backend, "--length", str(length))
            found[length] = measured
            bench.cases.append({"what": "memory", "length": length, **measured})
    bench.target(name, found[long]["extra"] / found[long]["tensors"])
    bench.target(growth, found[long]["extra"] / found[long // 2]["extra"])


def threads(bench: Bench) -> None:
    """The same forward with two threads and with one."""
    if bench.refused("full", ("two threads over one",)):
        return
    inputs = bench.inputs()

    def with_threads(count: int) -> Callable[[], None]:
        def call() -> None:
            torch.set_num_threads(count)
            flexref.flex_attention(*inputs, backend=bench.backend)

        return call

    before = torch.get_num_threads()
    try:
        samples = interleaved({"ours": with_threads(2), "theirs": with_threads(1)}, bench.rounds, bench.seconds)
    finally:
        torch.set_num_threads(before)
    found = ratio(samples["ours"], samples["theirs"])
    bench.target("two threads over one", found.median, spread=found)


SECTIONS = {
    "flex": against_flex,
    "sdpa": against_sdpa,
    "start": starting,
    "fixed": fixed_cost,
    "memory": memory,
    "threads": threads,
    "masks": masks,
    "documents": documents,
}


GPU_SECTIONS = ("decode", "training", "float32")


def machine() -> dict[str, str | int]:
    """What the figures were measured on; no names of hosts, users or folders."""
    cpu = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((x.partition(":")[2].strip() for x in info.read_text().splitlines() if x.startswith("model name")), cpu)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "flexref": flexref.__version__}
    return {"cpu": cpu, "threads": torch.get_num_threads(), **versions}


def report(bench: Bench) -> Table:
    """Every target that was run, with what was asked and whether it was met."""
    table = Table("target", "asked", "measured", "spread", "")
    for name, r in bench.results.items():
        value = "-" if r["value"] is None else f"{r['value']:.3g} {r['unit']}"
        spread = f"{r['spread'][0]:.3g} to {r['spread'][1]:.3g}" if r["spread"] else ""
        table.add_row(name, f"{r['sense']} {r['asked']:g} {r['unit']}", value, spread, "met" if r["met"] else "[red]MISS[/red]")
    return table


def _on_gpu(parser: argparse.ArgumentParser, options: argparse.Namespace, only: tuple[str, ...], console: Console) -> int:
    if not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA GPU that PyTorch can use")
    from bench import gpu

    engine = "triton" if options.backend == "auto" else options.backend
    bench = gpu.GpuBench((engine,), quick=options.quick, autotuned=options.autotuned, minutes=options.minutes, path=options.json)
    bench.say = lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)
    return gpu.run(bench, only)


def main(argv: list[str] | None = None) -> int:
    """0 if every target that was run is met, else 1."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="few rounds and a shorter memory case: for a look, not for figures")
    parser.add_argument(
        "--only", choices=[*SECTIONS, *GPU_SECTIONS], nargs="+", help="sections; the last three are those of a GPU"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="on a GPU: begin no case after that")
    parser.add_argument("--autotuned", action="store_true", help="on a GPU: also beside flex compiled with max-autotune")
    options = parser.parse_args(argv)
    known = GPU_SECTIONS if options.device == "cuda" else tuple(SECTIONS)
    only = tuple(options.only or known)
    if wrong := [name for name in only if name not in known]:
        parser.error(f"--only {wrong[0]} is no section of --device {options.device}; known: {', '.join(known)}")
    console = Console()
    if options.device == "cuda":
        return _on_gpu(parser, options, only, console)
    bench = Bench(options.backend, options.quick, say=lambda text: console.print(text, highlight=False, markup=False))
    start = time.perf_counter()
    for name in only:
        SECTIONS[name](bench)
    console.print(report(bench))
    if options.json:
        kept = {"machine": machine(), "quick": options.quick, "minutes": (time.perf_counter() - start) / 60}
        kept |= {"targets": bench.results, "cases": bench.cases}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 0 if all(r["met"] for r in bench.results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
