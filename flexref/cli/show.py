"""Prints every stage of a user's mod: its program, its derivative, its source in each language, the verdicts."""
from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import flexref
from flexref.backend import find_backends
from flexref.problem import ACC_DTYPE, Capture
from flexref.program.derive import derive
from flexref.program.emitter import Emitter
from flexref.program.ir import INPUT_TYPES, Graph
from flexref.program.mods import Mod, traced_mod


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE:FUNCTION, and the problem that the backends are asked about."""
    parser.add_argument(
        "mod",
        metavar="FILE:FUNCTION",
        help="a mod, as path/to/file.py:name or package.module:name; a factory with its numbers, 'mods.py:window(256)'",
    )
    parser.add_argument("--shape", default="1,8,1024,64", help="B,H,L,D that the backends are asked about")
    parser.add_argument("--dtype", default="float32", choices=("float16", "bfloat16", "float32", "float64"))
    parser.add_argument("--device", default="cpu")


def run(options: argparse.Namespace) -> int:
    """0; 1 with a message if there is no such mod or it cannot be traced."""
    try:
        mod = load(options.mod)
        kind = kind_of(mod)
        traced = traced_mod(mod, kind, ACC_DTYPE[getattr(torch, options.dtype)])
    except (flexref.FlexrefError, ValueError) as error:
        print(f"show: {error}", file=sys.stderr)
        return 1
    for title, body in sections(mod, kind, traced, options):
        print(f"== {title}\n{body}\n")
    return 0


def sections(mod: Callable, kind: str, traced: Mod, options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Title and text of each stage."""
    yield f"{kind}_mod {getattr(mod, '__name__', mod)}", _source(mod)
    yield "program", _with_captures(traced)
    graphs = {"": traced.graph}
    if kind == "score":
        wanted = tuple(i for i in traced.graph.loads if traced.graph.nodes[i].type == "float")
        graphs["derivative"] = derive(traced.graph, wanted)
        yield "derivative (each output times grad, which is d loss / d out)", str(graphs["derivative"])
    captures = tuple(
        Capture(name, x.dtype, tuple(x.shape)) for name, x in zip(traced.names, traced.captured, strict=True)
    )
    for name, emitter in emitters(captures).items():
        for part, graph in graphs.items():
            yield f"{name}{' ' + part if part else ''}", source(emitter, graph)
    yield "verdicts", _verdicts(mod, kind, options)


def load(place: str) -> Callable:
    """The function at FILE:NAME, MODULE:NAME or FILE:FACTORY(literals). Raises ValueError that says what is missing."""
    where, colon, expression = place.partition(":")
    if not colon or not expression:
        raise ValueError(f"{place!r} is not FILE:FUNCTION, such as mods.py:causal.")
    module = _module(where)
    try:
        tree = ast.parse(expression, mode="eval").body
        call = tree if isinstance(tree, ast.Call) else None
        name = ast.unparse(call.func if call else tree)
        arguments = [ast.literal_eval(x) for x in call.args] if call else []
        named = {str(x.arg): ast.literal_eval(x.value) for x in call.keywords} if call else {}
    except (SyntaxError, ValueError):
        raise ValueError(f"{expression!r} is neither a name nor a factory with literal arguments, such as window(256).") from None
    if not hasattr(module, name):
        raise ValueError(f"{where} has no {name!r}.")
    found = getattr(module, name)
    return found(*arguments, **named) if call else found


def _module(where: str):
    path = Path(where)
    if path.suffix != ".py":
        try:
            return importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise ValueError(f"{where!r} is neither a .py file nor a module: {error}.") from None
    if not path.is_file():
        raise ValueError(f"there is no file {where!r}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    sys.path.insert(0, str(path.parent.resolve()))
    spec.loader.exec_module(module)
    return module


def kind_of(mod: Callable) -> str:
    """"mask" for four positional arguments, "score" for five. Raises ValueError for another number."""
    if not callable(mod):
        raise ValueError(f"{mod!r} is not a function.")
    parameters = inspect.signature(mod).parameters.values()
    count = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters)
    kinds = {4: "mask", 5: "score"}
    if count not in kinds:
        raise ValueError(
            f"{getattr(mod, '__name__', mod)} takes {count} arguments; a mask_mod takes (b, h, q_idx, kv_idx), a score_mod "
            "(score, b, h, q_idx, kv_idx). If it makes a mod, give its arguments: FILE:window(256)."
        )
    return kinds[count]


def emitters(captures: tuple[Capture, ...]) -> dict[str, Emitter]:
    """An emitter of each backend that has one, by the backend's name."""
    found = {}
    for name, backend in find_backends().items():
        place = f"{getattr(backend, '__name__', '')}.emitter"
        try:
            if importlib.util.find_spec(place) is not None:
                found[name] = _made(table_of(importlib.import_module(place)), captures)
        except ModuleNotFoundError:
            continue
        except Exception as error:
            if place.startswith("flexref.backends."):
                raise
            warnings.warn(f"the emitter of {name} cannot be used: {type(error).__name__}: {error}", stacklevel=2)
    return found


def _made(table: type[Emitter], captures: tuple[Capture, ...]) -> Emitter:
    """An emitter is made of the captures; whatever else it may be told is known about a problem, and none is known here."""
    facts = list(inspect.signature(table).parameters)[1:]
    return table(captures, *(frozenset() for _ in facts)) if inspect.signature(table).parameters else table()  # type: ignore[call-arg]


def table_of(module) -> type[Emitter]:
    """The subclass of Emitter that an emitter.py is about."""
    own = [x for x in vars(module).values() if inspect.isclass(x) and issubclass(x, Emitter) and x is not Emitter]
    return next(x for x in own if x.__module__ == module.__name__)


def source(emitter: Emitter, graph: Graph) -> str:
    """The program in the emitter's language, the inputs under their own names."""
    missing = sorted({node.op for node in graph.nodes} & emitter.lacks.keys())
    if missing:
        return "\n".join(f"lacks {op}: {emitter.lacks[op]}" for op in missing)
    lines, outputs = emitter.emit(graph, "t", {name: name for name in INPUT_TYPES})
    return "\n".join([*lines, *(f"{name} = {variable}" for name, variable in outputs.items())])


def _source(mod: Callable) -> str:
    written = mod if inspect.isroutine(mod) else type(mod).__call__
    try:
        return inspect.getsource(written).rstrip()
    except (OSError, TypeError):
        return "(its source is not to be had)"


def _with_captures(traced: Mod) -> str:
    lines = [str(traced.graph)]
    for i, (name, x) in enumerate(zip(traced.names, traced.captured, strict=True)):
        lines.append(f"buffer {i}: {name} {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}")
    lines += [f"scalar {i}: {value}" for i, value in enumerate(traced.scalars)]
    return "\n".join(lines)


def _verdicts(mod: Callable, kind: str, options: argparse.Namespace) -> str:
    shape = [int(n) for n in options.shape.split(",")]
    query = torch.zeros(shape, dtype=getattr(torch, options.dtype), device=options.device, requires_grad=True)
    mods: dict[str, Any] = {f"{kind}_mod": mod}
    try:
        return str(flexref.explain(query, query, query, **mods))
    except (ValueError, TypeError, IndexError) as error:
        return f"none for query {tuple(shape)}: {error}"
