"""Which engine runs a problem, and every reason why another does not. Pure: what it must know is passed in."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flexref.backend import Backend, said
from flexref.errors import Unsupported
from flexref.problem import Problem


@dataclass(frozen=True)
class Choice:
    """`name` is the engine that runs the problem, or None; `reasons` says of every engine why it cannot ([]: it can)."""

    name: str | None
    reasons: Mapping[str, Sequence[str]]
    wanted: str = "auto"

    def __str__(self) -> str:
        width = max((len(name) for name in self.reasons), default=0)
        lines = [f"  {name:<{width}}  {self._verdict(name, why)}" for name, why in self.reasons.items()]
        return "\n".join(lines)

    def _verdict(self, name: str, why: Sequence[str]) -> str:
        if name == self.name:
            return "chosen"
        if why:
            return "cannot: " + "; ".join(why)
        if self.wanted != "auto":
            return f"can, but {self.wanted!r} was asked for"
        return "can, but is never chosen by itself" if name == REFERENCE else "can, but a faster one was chosen"


REFERENCE = "reference"


def choose(
    problem: Problem,
    backends: Mapping[str, Backend],
    wanted: str = "auto",
    unavailable: Callable[[Backend], Sequence[str]] = lambda backend: said(backend, "unavailable"),
) -> Choice:
    """The engine for `problem` among `backends`, which are ordered by rank, the highest first.

    "auto" takes the first that can run it, never the reference; a name takes that one or none. Raises ValueError
    for a name that is no backend.
    """
    if wanted != "auto" and wanted not in backends:
        raise ValueError(
            f"backend {wanted!r} is unknown{nearest(wanted, ['auto', *backends])}; known: auto, {', '.join(backends)}."
        )
    reasons = {name: [*unavailable(b), *said(b, "unsupported", problem)] for name, b in backends.items()}
    able = [name for name, why in reasons.items() if not why]
    if wanted == "auto":
        name = next((name for name in able if name != REFERENCE), None)
    else:
        name = wanted if wanted in able else None
    return Choice(name, reasons, wanted)


def refusal(problem: Problem, choice: Choice) -> Unsupported:
    """The error for a problem that no engine, or not the one asked for, can run."""
    able = [name for name, why in choice.reasons.items() if not why]
    what = (
        "no backend can run this problem"
        if choice.wanted == "auto"
        else f"backend {choice.wanted!r} cannot run this problem"
    )
    remedy = f"these can: {', '.join(able)}; pass backend={able[0]!r}" if able else "none of them can"
    text = f"{what}.\n  problem  {describe(problem)}\n{choice}\n  {remedy}."
    return Unsupported(text, {name: list(why) for name, why in choice.reasons.items()})


def describe(problem: Problem) -> str:
    """One line: shapes, dtype, device, mods."""
    p = problem
    parts = [
        f"query ({p.batch}, {p.q_heads}, {p.q_len}, {p.head_dim})",
        f"key ({p.kv_batch}, {p.kv_heads}, {p.kv_len}, {p.head_dim})",
        f"value_dim {p.value_dim}",
        f"{str(p.dtype).removeprefix('torch.')} on {p.device}",
        f"score_mod {'yes' if p.score else 'no'}",
        f"mask_mod {'yes' if p.mask else 'no'}",
        f"gradients {'yes' if p.needs_backward else 'no'}",
    ]
    return ", ".join(parts)


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?`, or nothing."""
    close = difflib.get_close_matches(word, list(known), 1, 0.5) or difflib.get_close_matches(
        word.lower(), [k.lower() for k in known], 1, 0.5
    )
    return f"; did you mean {close[0]!r}?" if close else ""
