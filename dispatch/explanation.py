"""What `explain` tells of a call: the engine, every other one's reasons, and how the mods will run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from flexref.backend import find_backends, said
from flexref.dispatch.choose import Choice, describe
from flexref.dispatch.hardware import Hardware, probe
from flexref.dispatch.options import ignored
from flexref.problem import Problem, Tensors
from flexref.program.mods import traced_mod


class Explanation(NamedTuple):
    """Which engine a call runs on, and why not on the others; `notes`: what that engine says of how. Print it."""

    problem: Problem
    choice: Choice
    hardware: Hardware
    notes: tuple[str, ...] = ()
    mods: tuple[tuple[str, str | None], ...] = ()

    def __str__(self) -> str:
        lines = [f"problem  {describe(self.problem)}", f"machine  {self.hardware}", str(self.choice)]
        lines += [f"{name:<9}  {f'traced at each call, because {why}' if why else 'kept'}" for name, why in self.mods]
        return "\n".join([*lines, *(f"note     {note}" for note in self.notes)])


def explained(problem: Problem, tensors: Tensors, choice: Choice, options: Mapping[str, Any] | None) -> Explanation:
    """Of a call that is checked and for which an engine is chosen."""
    chosen = find_backends().get(choice.name or "")
    notes = list(said(chosen, "notes", problem)) if chosen is not None and hasattr(chosen, "notes") else []
    notes += ignored(options or {}, choice.name, getattr(chosen, "options", {}))
    if tensors.found and choice.name != "reference":
        notes.append(_sparse(problem, tensors))
    if tensors.sink is not None:
        notes.append(f"{tensors.sink.shape[1]} sinks a head are added to out and lse, whatever the engine")
    if tensors.block_mask is not None and chosen is not None:
        notes.append(_lists(tensors.block_mask, choice.name, getattr(chosen, "lists", "blocks")))
    given = (("score_mod", tensors.score_mod, "score"), ("mask_mod", tensors.mask_mod, "mask"))
    mods = tuple((name, traced_mod(mod, kind, problem.acc_dtype).why) for name, mod, kind in given if mod is not None)
    return Explanation(problem, choice, probe(), tuple(notes), mods)


def _lists(mask: Any, engine: str | None, read: str) -> str:
    """In which form the engine is given the lists of the block mask."""
    lists = mask.walk.lists
    runs, full, partial = len(lists.full_counts), int(lists.full_counts.sum()), len(lists.indices)
    told = f"the block mask lists {partial:,} partial blocks, and {full:,} full ones as {runs:,} runs"
    if read == "none":
        return f"{told}; {engine} makes a dense mask of them"
    return f"{told}; {engine} {'reads runs' if read == 'runs' else 'is handed each block by itself'}"


def _sparse(problem: Problem, tensors: Tensors) -> str:
    """What was found in a score_mod that masks, with a picture."""
    blocks: Any = tensors.block_mask
    score = "the plain score" if problem.score is None else "a score"
    rest = "as it is" if problem.mask is None else f"as a mask and {score}"
    size = " x ".join(map(str, blocks.BLOCK_SIZE))
    told = f"score_mod makes {blocks.sparsity():.2f}% of the positions -inf by whole blocks of {size}: they are left out, and the"
    return f"{told} rest runs {rest}\n{blocks.to_string((8, 16), limit=1)}"
