"""Mods at the door: traced once for each thing that tracing could see, merged into programs that share their captures."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from flexref.program.closure import Leaves, leaves_of
from flexref.program.compiled import no_autocast, original
from flexref.program.ir import Graph, Node, differentiable_loads
from flexref.program.recipes import Made, Recipe, make, roots_of
from flexref.program.trace import Traced, trace
from flexref.tensor_gate import check_memory

_LIMIT = 512
_traced: OrderedDict[tuple, tuple[Traced, tuple[int, ...]]] = OrderedDict()
_lock = threading.Lock()


class Mod(NamedTuple):
    """A traced mod with the tensors that it captures now, and what identifies it.

    `why`: because of what it is traced at each call; None, as `key` is not, where its program is kept.
    `roots`: the tensors that the captured ones are, or are computed from in the mod.
    """

    graph: Graph
    captured: tuple[Tensor, ...]
    names: tuple[str, ...]
    scalars: tuple[int | float, ...]
    key: tuple | None
    why: str | None = None
    roots: tuple[Tensor, ...] = ()
    recipes: tuple[Recipe, ...] = ()

    @property
    def learned(self) -> tuple[Tensor, ...]:
        """The roots that a gradient goes back to, by way of a tensor that is made of them in the mod."""
        recipes = (self.recipes[i] for i in differentiable_loads(self.graph))
        places = frozenset().union(*(roots_of(recipe, learned=True) for recipe in recipes if isinstance(recipe, Made)))
        return tuple(self.roots[place] for place in sorted(places))


def traced_mod(fn: Callable, kind: str, acc_dtype: torch.dtype) -> Mod:
    """The program of `fn`, kept as long as nothing that it can reach has another shape, dtype or value of a number.

    Raises TraceError. Safe to call from several threads.
    """
    fn = original(fn)
    leaves = leaves_of(fn)
    if leaves.why:
        return _not_kept(trace(fn, kind, acc_dtype, leaves), leaves.why)
    key = (kind, acc_dtype, leaves.key)
    with _lock:
        known = _traced.get(key)
        if known is not None:
            _traced.move_to_end(key)
    if known is None:
        traced, why = _trace_and_judge(fn, kind, acc_dtype, leaves)
        if why:
            return _not_kept(traced, why)
        known = _located(traced, leaves)
        with _lock:
            _traced[key] = known
            if len(_traced) > _LIMIT:
                _traced.popitem(last=False)
    traced, places = known
    roots = tuple([leaves.tensors[i] for i in places])
    return Mod(traced.graph, _captured(traced.recipes, roots), traced.names, traced.scalars, key, None, roots, traced.recipes)


def _captured(recipes: tuple[Recipe, ...], roots: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if not any(isinstance(recipe, Made) for recipe in recipes):
        return tuple([make(recipe, roots) for recipe in recipes])
    for root in roots:
        check_memory("a captured tensor", root)
    # the caller's autocast is none of the mod's: it was traced without
    with no_autocast():
        return tuple([make(recipe, roots) for recipe in recipes])


def _not_kept(traced: Traced, why: str) -> Mod:
    return Mod(traced.graph, traced.captured, traced.names, traced.scalars, None, why, traced.roots, traced.recipes)


def _trace_and_judge(fn: Callable, kind: str, acc_dtype: torch.dtype, leaves: Leaves) -> tuple[Traced, str | None]:
    """The trace, and why it cannot be kept, judged by what it did; None if it can."""
    traced = trace(fn, kind, acc_dtype, leaves)
    why = traced.why
    if not why and not all(any(root is leaf for leaf in leaves.tensors) for root in traced.roots):
        why = "it reads a tensor that is found in nothing that it reaches"
    if not why and leaves_of(fn).key != leaves.key:
        why = "something that it reaches was changed while it ran"
    return traced, why


def _located(traced: Traced, leaves: Leaves) -> tuple[Traced, tuple[int, ...]]:
    """The trace without its tensors, and where among the leaves each root is."""
    places = (next(i for i, leaf in enumerate(leaves.tensors) if leaf is root) for root in traced.roots)
    return traced._replace(captured=(), roots=()), tuple(places)


@lru_cache(maxsize=1024)
def shifted(graph: Graph, buffers: int, slots: int) -> Graph:
    """`graph` with its loads and scalars moved up, so that it can share captures with another program."""
    by = {"load": buffers, "scalar": slots}
    nodes = [
        Node(n.op, n.args, n.type, n.attr + by[n.op], n.where) if n.op in by else n  # type: ignore[operator]
        for n in graph.nodes
    ]
    return Graph(tuple(nodes), graph.outputs)
