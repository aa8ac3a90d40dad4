"""Compiles ahead of time, for a GPU that need not be there, just what a call would launch on it, and reads what came out."""
from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from flexref.backends.triton import launch, launch_backward
from flexref.backends.triton.call import Call
from flexref.backends.triton.tiles import Tile
from flexref.problem import Problem, Tensors


class Report(NamedTuple):
    """One kernel: registers of a thread, bytes of local memory that they spilled to, bytes of shared memory, its assembly.

    `build`: the same for the same machine code. `narrow`: layouts of tiles of half types in rows of less than 128 bytes.
    """

    kernel: str
    tile: Tile
    registers: int
    stack: int
    shared: int
    assembly: str
    build: str
    narrow: int = 0

    def count(self, pattern: str) -> int:
        """How often a pattern is in the assembly."""
        return len(re.findall(pattern, self.assembly))


class _Ahead(Call):
    """A call that compiles for `target` where it would launch. Its tensors may be anywhere; none is read."""

    def __init__(self, problem: Problem, tensors: Tensors, target: Any, reports: list[Report]):
        super().__init__(problem, tensors)
        self.emulated, self.target, self.reports = False, target, reports
        self.capability = (target.arch // 10, target.arch % 10) if target.backend == "cuda" else (8, 0)

    def run(self, kernel: str, launch: Any) -> None:
        from flexref.backends.triton.tiles import tile_for

        self.tile = tile_for(kernel, self.problem, self.capability)
        function = self.function("forward" if kernel == "decode" else kernel)
        launch(_Compiler(self, kernel, function), self.tile)


class _Compiler:
    def __init__(self, call: _Ahead, kernel: str, function: Any):
        self.call, self.kernel, self.function = call, kernel, function

    def __getitem__(self, grid: tuple[int, ...]):
        def compile(**arguments: Any) -> None:
            made = self.function.warmup(grid=grid, **arguments)
            name = self.kernel + (", careful" if arguments.get("CAREFUL") else "")
            self.call.reports.append(_report(name, self.call.tile, made, self.call.target))

        return compile


def compiled(problem: Problem, tensors: Tensors, arch: int | str, backward: bool = False) -> list[Report]:
    """The kernels of a forward, and with `backward` of its backward, for compute capability `arch` (90), or for gfx942.

    Changes Triton's active driver, so it belongs into a process of its own.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
    driver.set_active(_Driver(target))  # type: ignore[arg-type]
    reports: list[Report] = []
    call = _Ahead(problem, tensors, target, reports)
    output = launch.forward(problem, tensors, call)
    if backward:
        launch_backward.backward(problem, tensors, output, output.out, None, call)
    return reports


class _Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, target: Any):
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _report(kernel: str, tile: Tile, made: Any, target: Any) -> Report:
    if target.backend != "cuda":
        return Report(kernel, tile, 0, 0, made.metadata.shared, made.asm["amdgcn"], made.hash)
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(made.asm["cubin"])
        tool = knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", str(path)], capture_output=True, text=True, check=True).stdout
    narrow = len(re.findall(r"nvmma_shared<{swizzlingByteWidth = (?:32|64), [^>]*elementBitWidth = 16", made.asm["ttgir"]))
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    stack = found["STACK"] + found["LOCAL"]
    return Report(kernel, tile, found["REG"], stack, made.metadata.shared, made.asm["ptx"], made.hash, narrow)
