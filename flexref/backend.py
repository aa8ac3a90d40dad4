"""What a backend is, and where backends are found: by folder, and by the entry-point group `flexref.backends`."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

import torch

from flexref.problem import Gradients, Output, Problem, Tensors


@runtime_checkable
class Backend(Protocol):
    """Two plain functions and two honest answers. A module whose globals are these names is a backend.

    Nothing here is told of autograd, tracing, validation or other backends. `options` maps each known
    kernel option to one line of explanation. `rank`: higher is tried first; the reference is 0.

    A backend of a device that is often absent may also have `emulated() -> Backend`: the very same kernels run on CPU
    tensors, slowly. Only the conformance suite asks for it, where `unavailable()` has reasons. What it returns has two
    attributes more: `how`, one word for the matrix, and `reach`, the longest length worth running, or None.
    And `notes(problem) -> list[str]`: what `explain` adds of how the backend would run a problem.
    """

    name: str
    rank: int
    options: dict[str, str]

    def unavailable(self) -> list[str]:
        """Why this machine cannot run it, each with what would mend it; [] means that it can."""
        ...

    def unsupported(self, problem: Problem) -> list[str]:
        """Why this problem cannot be run; pure, needs no device; [] means that it can."""
        ...

    def forward(self, problem: Problem, tensors: Tensors) -> Output: ...

    def backward(
        self,
        problem: Problem,
        tensors: Tensors,
        output: Output,
        grad_out: torch.Tensor,
        grad_lse: torch.Tensor | None,
    ) -> Gradients: ...


@cache
def find_backends() -> dict[str, Backend]:
    """Every backend by name, the highest rank first."""
    package = importlib.import_module("flexref.backends")
    found: list[Any] = [
        importlib.import_module(f"flexref.backends.{module.name}")
        for module in pkgutil.iter_modules(package.__path__)
        if module.ispkg
    ]
    found += [entry.load() for entry in entry_points(group="flexref.backends")]
    return {backend.name: backend for backend in sorted(found, key=lambda b: -b.rank)}
