"""python -m bench.gpu_day --minutes 9 --out DIR: everything that a GPU can say of the engines, in order of information.

From a checkout, nothing installed. Each step is a process with a limit of its own and writes what it finds as soon as it is
there; DIR/page.md says at the end what ran, what conforms, how fast it is beside what was measured in the same run, and what
to try next. `--dry-run` goes the same way on the emulated engines, small.
"""
from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

ENGINES = ("triton", "cupy", "numba_cuda")
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Step:
    """A command, given at most `seconds`. `beside`: the steps after it do not wait for it, unless they are to be `alone`."""

    name: str
    command: tuple[str, ...]
    seconds: float
    beside: bool = False
    alone: bool = False


@dataclass
class Running:
    """A step's process, and what came of it."""

    step: Step
    process: subprocess.Popen
    log: Path
    began: float
    code: int | None = None
    took: float = 0.0

    def end(self) -> None:
        """Wait for the end or the limit; then nothing of it runs any more."""
        left = self.step.seconds - (time.perf_counter() - self.began)
        try:
            self.code = self.process.wait(max(left, 0.1))
        except subprocess.TimeoutExpired:
            # an interrupt first: pytest and the benches then say what they have
            for how in (signal.SIGINT, signal.SIGKILL):
                os.killpg(self.process.pid, how)
                try:
                    self.process.wait(5)
                    break
                except subprocess.TimeoutExpired:
                    continue
            self.code = None
        self.took = time.perf_counter() - self.began

    def state(self) -> str:
        """In a word or two."""
        return {None: "cut off", 0: "good"}.get(self.code, f"exit code {self.code}")


@dataclass
class Day:
    """The folder that everything goes to, and what ran until now."""

    out: Path
    minutes: float
    dry: bool = False
    began: float = field(default_factory=time.perf_counter)
    done: list[Running] = field(default_factory=list)

    def left(self) -> float:
        """Seconds until the day is over."""
        return 60 * self.minutes - (time.perf_counter() - self.began)

    def start(self, step: Step) -> Running:
        """Begin a step; what it prints goes to its log."""
        log = self.out / "logs" / f"{step.name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            process = subprocess.Popen(
                step.command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment(self), start_new_session=True
            )
        return Running(step, process, log, time.perf_counter())

    def run(self, steps: list[Step]) -> None:
        """All of them, each within its limit and the day's."""
        beside: list[Running] = []
        for step in steps:
            if self.left() < 5:
                print(f"{step.name}: not begun, the time is up", flush=True)
                continue
            if step.alone:
                self._finish(beside)
            running = self.start(replace(step, seconds=min(step.seconds, self.left())))
            beside.append(running)
            if not step.beside:
                self._finish([running])
            beside = [x for x in beside if x.code is None and x not in self.done]
        self._finish(beside)

    def _finish(self, steps: list[Running]) -> None:
        for running in [x for x in steps if x not in self.done]:
            running.end()
            self.done.append(running)
            print(f"{running.step.name}: {running.state()}, {running.took:.0f} s", flush=True)
            for line in last_lines(running.log, 6):
                print(f"    {line}", flush=True)
            (self.out / "page.md").write_text(page(self))


def environment(day: Day) -> dict[str, str]:
    """The caches that lie in the folder, or come there, so that a second day begins warm."""
    found = dict(os.environ)
    found["PYTHONPATH"] = os.pathsep.join([str(ROOT), found.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    found["PYTHONUNBUFFERED"] = "1"
    # many processes at once, each of which would start a thread for every core
    found |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    caches = day.out / "caches"
    for name, folder in (("FLEXREF_CACHE", "flexref"), ("TRITON_CACHE_DIR", "triton"), ("TORCHINDUCTOR_CACHE_DIR", "inductor")):
        found.setdefault(name, str(caches / folder))
    return found


def last_lines(log: Path, count: int) -> list[str]:
    """The end of a log."""
    return [line[:200] for line in log.read_text(errors="replace").splitlines() if line.strip()][-count:]


def steps(day: Day, engines: tuple[str, ...] = ENGINES) -> list[Step]:
    """The plan."""
    python, more = sys.executable, ("--emulated",) if day.dry else ()
    # the machine's own versions may warn of what says nothing about an engine
    pytest = (python, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider")
    workers = str(2 if day.dry else max(2, (os.cpu_count() or 4) - 2))
    small = ("-k", "r06") if day.dry else ("--maxfail", "20")
    results = [str(day.out / f"{name}.json") for name in ("training", "decode")]
    measured = ("--engines", *engines, *more)
    bench = (python, "-m", "bench.gpu_engines")
    plan = [Step("versions", (python, "-m", "flexref", "doctor"), 60)]
    plan += [Step(f"smoke_{e}", (python, "-m", "bench.gpu_smoke", e, *more), 240 if day.dry else 75, True) for e in engines]
    plan += [Step("warm", (*bench, "warm", *measured), 100)]
    plan += [Step("test_gpu", (*pytest, "tests/test_gpu.py", "-n", "4"), 75)]
    plan += [Step("training", (*bench, "training", *measured, "--json", results[0]), 150, alone=True)]
    plan += [Step("decode", (*bench, "decode", *measured, "--json", results[1]), 60, alone=True)]
    for engine in engines:
        where = ("--conformance-json", str(day.out / f"conformance_{engine}.json"))
        command = (*pytest, "conformance", *small, "--backend", engine, "-n", workers, *where)
        plan.append(Step(f"conformance_{engine}", command, 150))
    return plan


def page(day: Day) -> str:
    """What a person reads first."""
    title = "# A GPU day" + (", rehearsed without one" if day.dry else "")
    lines = [title, "", "| step | what came of it | seconds |", "|---|---|---|"]
    for running in day.done:
        last = (last_lines(running.log, 1) or [""])[0].replace("|", "/")
        lines.append(f"| {running.step.name} | {running.state()}: {last} | {running.took:.0f} |")
    found = [case for name in ("training", "decode") for case in _cases(day.out / f"{name}.json")]
    if found:
        lines += ["", "| case | engine | ms | | host µs | times as fast as |", "|---|---|---|---|---|---|"]
        lines += [_row(case) for case in found]
    missed = [f"- {line}" for name in ("training", "decode") for line in _missed(day.out / f"{name}.json")]
    return "\n".join([*lines, "", "## To try next", "", *(missed or ["- nothing was missed of what was measured"])]) + "\n"


def _cases(path: Path) -> list[dict]:
    return json.loads(path.read_text())["cases"] if path.exists() else []


def _row(case: dict) -> str:
    where = f"{case['what']} {case['variant']} {case['dtype']} S {case['S']} B {case['B']}"
    if "refused" in case:
        return f"| {where} | {case['engine']} | refused | {case['refused'].splitlines()[0][:120].replace('|', '/')} | | |"
    unit = next(name for name in ("TFLOP/s", "TB/s") if name in case)
    beside = ", ".join(f"{name} {r['median']:.2f}" for name, r in case["ratios"].items())
    host = f"{case['host']['median'] * 1e6:.0f}" if "host" in case else ""
    return f"| {where} | {case['engine']} | {case['seconds']['median'] * 1e3:.3f} | {case[unit]:.4g} {unit} | {host} | {beside} |"


def _missed(path: Path) -> list[str]:
    if not path.exists():
        return []
    found = json.loads(path.read_text())["targets"]
    return [
        f"{engine}, {name}: {r['value']:.3g} {r['unit']}, asked {r['asked']:g}"
        for engine, targets in found.items()
        for name, r in targets.items()
        if r["value"] is not None and not r["met"]
    ]


def main(argv: list[str] | None = None) -> int:
    """0 if every step that was begun ended well, else 1."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_day", description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no step after that, and cut off the one that runs")
    parser.add_argument("--out", type=Path, required=True, help="the folder for everything that is written")
    parser.add_argument("--dry-run", action="store_true", help="on the emulated engines, small")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--only", nargs="+", help="only the steps whose names begin so")
    options = parser.parse_args(argv)
    day = Day(options.out.resolve(), options.minutes, options.dry_run)
    plan = [s for s in steps(day, tuple(options.engines)) if not options.only or s.name.startswith(tuple(options.only))]
    if not plan:
        parser.error(f"--only {' '.join(options.only)} names no step; steps: {', '.join(s.name for s in steps(day))}")
    day.run(plan)
    print((day.out / "page.md").read_text())
    return 0 if all(running.code == 0 for running in day.done) else 1


if __name__ == "__main__":
    sys.exit(main())
