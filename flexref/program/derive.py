"""The derivative of a program, as a program: by PyTorch's own autograd, so that there is no table of rules to keep.

Every load and captured number becomes an argument, which leaves a pure pointwise function; autograd runs over the
Values of tape.py and so writes the derivative in the same operators that trace.py reads. Only what a branch that was not
taken contributes, which is nothing, is put right afterwards (branches.py).
"""

from __future__ import annotations

from functools import lru_cache

import torch

from flexref.program.branches import TakenBranches, masked_conditions
from flexref.program.builder import Builder, Ref
from flexref.program.interpret import dtype_of, evaluate
from flexref.program.ir import INPUT_TYPES, Graph
from flexref.program.tape import Value, returned

_INPUTS = ("score", "b", "h", "q_idx", "kv_idx", "grad")


@lru_cache(maxsize=1024)
def derive(graph: Graph, wanted_loads: tuple[int, ...] = ()) -> Graph:
    """d out/d score and d out/d load, each times the input `grad` (d loss/d out).

    `wanted_loads` are positions of float loads in `graph`. Outputs: "score", and "load<position>" for each wanted
    load, the position being that of the same load in the graph returned, where its indices stand too.
    """
    builder = Builder()
    places = builder.copy(graph)
    forward = len(builder.nodes)
    score, *loads = by_autograd(builder, places, graph, wanted_loads)
    masked = frozenset((places[i], value) for i, value in masked_conditions(graph))
    taken = TakenBranches(builder.nodes, forward, masked)
    # a load is no part of a gradient, so it has only moved
    moved = tuple(taken.places[places[i]] for i in wanted_loads)
    outputs = {f"load{at}": taken.settled(ref) for at, ref in zip(moved, loads, strict=True)}
    return taken.builder.graph({"score": taken.settled(score), **outputs}, kept=moved)


def by_autograd(builder: Builder, places: list[int], graph: Graph, wanted_loads: tuple[int, ...]) -> list[int]:
    """Adds the derivative to `builder`, where the nodes of `graph` are at `places`: those by score and by each wanted load."""
    # constants must keep all their bits; the program's float is whatever the kernel's is
    acc = torch.float64
    inputs = {name: Value(builder, Ref(builder.input(name)), dtype_of(INPUT_TYPES[name], acc)) for name in _INPUTS}
    free = {
        i: Value(builder, Ref(places[i]), dtype_of(node.type, acc))
        for i, node in enumerate(graph.nodes)
        if node.op in ("load", "scalar")
    }
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        varied = [inputs["score"].requires_grad_(), *(free[i].requires_grad_() for i in wanted_loads)]
        nodes = evaluate(graph, inputs, lambda i, *_: free[i], lambda i, *_: free[i], acc)
        out = nodes[dict(graph.outputs)["out"]]
        if out.requires_grad:
            results = torch.autograd.grad(out, varied, inputs["grad"], allow_unused=True)
        else:
            results = [None] * len(varied)
    return [builder.const(0.0) if x is None else returned(builder, x, "float") for x in results]
