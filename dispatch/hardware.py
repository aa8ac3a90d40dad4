"""What this machine has, as far as the choice of an engine depends on it; one value, so that tests can put another there."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Hardware:
    """`gpus` holds (name, compute capability) of each CUDA device."""

    cpu: str
    threads: int
    gpus: tuple[tuple[str, tuple[int, int]], ...] = ()

    def __str__(self) -> str:
        gpus = ", ".join(f"{name} (cc {major}.{minor})" for name, (major, minor) in self.gpus) or "no CUDA GPU"
        return f"{self.cpu}, {self.threads} threads, {gpus}"


@cache
def probe() -> Hardware:
    """Ask the machine, once in a process."""
    gpus = ()
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        gpus = tuple((torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in devices)
    return Hardware(
        platform.machine() or "unknown CPU",
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        gpus,
    )
