"""Mods from text: what they may capture, and how the text becomes a function over given tensors."""

from __future__ import annotations

import itertools
import linecache
import math
import re
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

# what a mod may capture: the shape from B, H, L, S; "float" ones are score_mod's and may want a gradient
CAPTURES: dict[str, tuple[str, Callable[..., tuple[int, ...]]]] = {
    "gain": ("float", lambda B, H, L, S: ()),
    "slope": ("float", lambda B, H, L, S: (H,)),
    "row": ("float", lambda B, H, L, S: (L,)),
    "col": ("float", lambda B, H, L, S: (B, S)),
    "bias": ("float", lambda B, H, L, S: (H, L, S)),
    "grid": ("float", lambda B, H, L, S: (B, H, L, S)),
    "rel": ("float", lambda B, H, L, S: (L + S,)),
    "window": ("window", lambda B, H, L, S: ()),
    "doc": ("doc", lambda B, H, L, S: (max(L, S),)),
    "length": ("length", lambda B, H, L, S: (B,)),
    "pick": ("index", lambda B, H, L, S: (S,)),
    "wrap": ("negative", lambda B, H, L, S: (S,)),
    "flag": ("bool", lambda B, H, L, S: (S,)),
    "keep": ("bool", lambda B, H, L, S: (H, L, S)),
}
FLOATS = tuple(name for name, (kind, _) in CAPTURES.items() if kind == "float")
NUMBERS = {"cap": 4.5, "shift": 3}
SIGNATURES = {"score": "score, b, h, q_idx, kv_idx", "mask": "b, h, q_idx, kv_idx"}
_serial = itertools.count()


@cache
def make_mod(text: str, kind: str, names: tuple[str, ...]) -> Callable[[dict[str, Tensor]], Callable]:
    """A factory: given the captured tensors by name, a mod whose closure holds them."""
    source = (
        f"def make({', '.join((*names, *NUMBERS))}):\n"
        f"    def {kind}_mod({SIGNATURES[kind]}):\n"
        f"        return {text}\n"
        f"    return {kind}_mod\n"
    )
    # a name of its own, so that tracebacks and the errors of the tracer show the mod's line
    filename = f"<conformance mod {next(_serial)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    scope: dict = {"torch": torch, "F": torch.nn.functional, "inf": math.inf, "nan": math.nan}
    exec(compile(source, filename, "exec"), scope)
    return lambda tensors: scope["make"](**{name: tensors[name] for name in names}, **NUMBERS)


def names_in(text: str | None) -> tuple[str, ...]:
    """The captured tensors that a mod's text reads."""
    return tuple(name for name in CAPTURES if text and re.search(rf"\b{name}\b", text))
