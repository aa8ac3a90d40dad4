"""What a backend is, and where backends are found: by folder, and by the entry-point group `flexref.backends`."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

import torch

from flexref.errors import Unsupported
from flexref.interrupts import of_a_signal
from flexref.problem import Gradients, Output, Problem, Tensors

_PARTS = ("name", "rank", "options", "unavailable", "unsupported", "forward", "backward")


@runtime_checkable
class Backend(Protocol):
    """Two plain functions and two honest answers. A module whose globals are these names is a backend.

    Nothing here is told of autograd, tracing, validation or other backends. `options` maps each known
    kernel option to one line of explanation. `rank`: higher is tried first; the reference is 0.

    A backend of a device that is often absent may also have `emulated() -> Backend`: the very same kernels run on CPU
    tensors, slowly. Only the conformance suite asks for it, where `unavailable()` has reasons. What it returns has two
    attributes more: `how`, one word for the matrix, and `reach`, the longest length worth running, or None.
    And `notes(problem) -> list[str]`: what `explain` adds of how the backend would run a problem. And `lists`, what it reads of
    a block mask: "runs" for `BlockMask.walk.runs`, "blocks" for `csr` and `csc` (so without it), "none" for a dense mask.
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


class Broken:
    """What stands in the list for an engine that cannot be used at all: it is never available, and says why."""

    options: dict[str, str] = {}
    rank = -1

    def __init__(self, name: str, why: str):
        self.name, self.why = name, why

    def unavailable(self) -> list[str]:
        return [self.why]

    def unsupported(self, problem: Problem) -> list[str]:
        return []

    def forward(self, problem: Problem, tensors: Tensors) -> Output:
        raise Unsupported(f"backend {self.name!r} cannot be used: {self.why}.")

    backward: Any = forward


@cache
def find_backends() -> dict[str, Backend]:
    """Every backend by name, the highest rank first; what cannot be used is there as Broken, the last.

    The first of a name has it, and folders come first: a package outside cannot take a built-in engine's place.
    """
    found: dict[str, Backend] = {}
    package = importlib.import_module("flexref.backends")
    for module in pkgutil.iter_modules(package.__path__):
        if module.ispkg:
            path = f"flexref.backends.{module.name}"
            _add(found, module.name, partial(importlib.import_module, path), f"the folder {path}")
    for entry in entry_points(group="flexref.backends"):
        owner = f" of the package {entry.dist.name}" if entry.dist is not None else ""
        _add(found, entry.name, entry.load, f"the entry point {entry.name} = {entry.value}{owner}")
    return dict(sorted(found.items(), key=lambda item: -item[1].rank))


def _add(found: dict[str, Backend], name: str, load: Callable[[], Any], where: str) -> None:
    backend: Any = None
    try:
        backend = load()
        problem = _problem(backend)
    # an import may also end in SystemExit; one that is interrupted is the caller's
    except (Exception, SystemExit) as error:
        if of_a_signal(error):
            raise
        problem = f"its import failed: {_told(error)}"
    if problem is None:
        name = backend.name
        if name in found:
            problem = f"its name {name!r} is that of another engine, which came first"
    if problem is not None:
        name = name if name not in found else f"{name} ({where})"
        backend = Broken(name, f"{problem}; mend or uninstall {where}")
    found[name] = backend


def _problem(backend: Any) -> str | None:
    """In what an object is no Backend, in words."""
    missing = [name for name in _PARTS if not hasattr(backend, name)]
    if missing:
        return f"it is no backend: it has no {', '.join(missing)}"
    rank, name, options = backend.rank, backend.name, backend.options
    if not isinstance(name, str) or not name or name == "auto":
        return f"its name must be a string and not 'auto', got {name!r}"
    if isinstance(rank, bool) or not isinstance(rank, (int, float)) or not math.isfinite(rank):
        return f"its rank must be a number, got {rank!r}"
    if not isinstance(options, Mapping) or not all(isinstance(option, str) for option in options):
        return f"its options must be a dict from names to explanations, got {type(options).__name__}"
    wrong = [part for part in _PARTS[3:] if not callable(getattr(backend, part))]
    return f"it is no backend: {', '.join(wrong)} cannot be called" if wrong else None


def said(backend: Backend, what: str, *args: Any) -> list[str]:
    """The lines that `backend.what(*args)` answers; an exception of it is a line too, since one engine must not end a choice."""
    try:
        lines = getattr(backend, what)(*args)
        if isinstance(lines, str) or not isinstance(lines, Iterable):
            return [f"its {what}() must answer with a list of strings, got {lines!r}"]
        return [str(line) for line in lines]
    except (Exception, SystemExit) as error:
        if of_a_signal(error):
            raise
        return [f"its {what}() failed: {_told(error)}"]


def _told(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
