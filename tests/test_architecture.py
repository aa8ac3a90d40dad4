"""The shape of the code: which way imports point, how long files are, what an import loads, that tables are complete."""
from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flexref.cli.show import table_of
from flexref.program.ops import OPS, TYPES

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("backends", "dispatch", "conformance")

# a part of flexref, and the parts it may import beside itself
BELOW = {
    "errors": "",
    "interrupts": "",
    "recent": "",
    "index_error": "errors problem program",
    "index_proof": "recent problem program",
    "one_float": "",
    "taken": "",
    "reference": "one_float taken",
    "tensor_gate": "",
    "uncompiled": "",
    "torch_names": "",
    "contents": "",
    "cache_folder": "interrupts",
    "arrays": "tensor_gate",
    "argument_shapes": "blocks",
    "program": "errors interrupts one_float recent tensor_gate",
    "blocks": "errors interrupts one_float recent program tensor_gate uncompiled",
    "variants": "errors program blocks",
    "problem": "errors program blocks",
    "backend": "errors interrupts problem program blocks",
    "first_derivatives": "",
    "sinks": "first_derivatives problem tensor_gate",
    "arguments": "errors recent argument_shapes tensor_gate arrays contents sinks problem program blocks",
    "autograd": "errors first_derivatives recent backend sinks problem program blocks",
    "dispatch": "errors recent uncompiled torch_names arrays contents tensor_gate autograd arguments backend problem program "
    "blocks",
    "backends": "errors interrupts cache_folder index_error index_proof recent problem program blocks",
    "visualize": "reference uncompiled arguments problem blocks",
    "conformance": "errors recent reference taken autograd arguments backend problem program blocks variants",
}
# lines of a file and of a function without its docstring; the suite, which is data in large part, may be longer
CORE, SUITE = (260, 45), (300, 55)


def sources(*folders: str) -> Iterator[tuple[str, Path]]:
    """Dotted module name and path of every source file of flexref, each once, by its real place."""
    for home in ("flexref", *LINKED):
        for path in sorted((ROOT / home).rglob("*.py")):
            inside = path.relative_to(ROOT).with_suffix("").parts
            if home == "flexref" and len(inside) > 1 and inside[1] in LINKED:
                continue
            parts = inside if home == "flexref" else ("flexref", *inside)
            yield ".".join(part for part in parts if part != "__init__"), path


SOURCES = dict(sources())


def imported(path: Path) -> set[str]:
    """The modules of flexref that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: a relative import; write the full name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("flexref", *LINKED)}


def part_of(module: str) -> str:
    """The key of BELOW that a dotted name belongs to."""
    return (module.split(".") + ["flexref"])[1]


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_one_way(module):
    part = part_of(module)
    if part in ("flexref", "cli", "__main__"):
        return  # the top may import everything
    assert part in BELOW, f"{module} is new: say in BELOW what it may import"
    allowed = {part, *BELOW[part].split()}
    if module.startswith("flexref.backends.reference"):
        allowed |= {"reference", "one_float"}
    wrong = {name for name in imported(SOURCES[module]) if part_of(name) not in allowed}
    assert not wrong, f"{module} imports {sorted(wrong)}"


@pytest.mark.parametrize("module", [name for name in SOURCES if name.count(".") >= 2 and ".backends." in name])
def test_backends_do_not_know_one_another(module):
    own = module.split(".")[2]
    others = {name for name in imported(SOURCES[module]) if name.startswith("flexref.backends.")}
    assert all(name.split(".")[2] == own for name in others), f"{module} imports {sorted(others)}"


@pytest.mark.parametrize("module", [name for name in SOURCES if ".kernels" not in name])
def test_files_and_functions_are_short(module):
    text = SOURCES[module].read_text()
    file_lines, function_lines = SUITE if part_of(module) == "conformance" else CORE
    assert len(text.splitlines()) <= file_lines, f"{module} has too many lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            first = node.body[0]
            documented = ast.get_docstring(node) is not None
            lines = (node.end_lineno or 0) - (first.end_lineno or 0 if documented else first.lineno - 1)
            assert lines <= function_lines, f"{module}.{node.name} has {lines} lines"


def loaded_by(code: str) -> set[str]:
    """The modules that `code` adds, in a fresh process, to those of `import torch`."""
    program = f"import sys, json, torch; before = set(sys.modules)\n{code}\nprint(json.dumps(sorted(set(sys.modules) - before)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_flexref_loads_no_optional_library():
    modules = loaded_by("import flexref, flexref.variants")
    loaded = {name.split(".")[0] for name in modules}
    assert not loaded & {"triton", "cupy", "numba", "numba_cuda", "rich", "matplotlib", "scipy", "hypothesis", "pytest"}
    assert not loaded & {"backends", "dispatch", "conformance"}, "a module was loaded under its short name"
    assert "flexref.cli" not in modules


def test_variants_are_there_without_their_import():
    assert "flexref.variants.masks" in loaded_by("import flexref; flexref.variants.masks.causal")


def test_a_call_loads_nothing_of_torchs_compiler():
    call = """
import flexref
query = torch.randn(1, 2, 40, 16)
flexref.flex_attention(query, query, query, lambda s, b, h, i, j: s + torch.tanh(s), mask_mod=lambda b, h, i, j: j <= i)
"""
    modules = loaded_by(call)
    heavy = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch.fx.experimental.proxy_tensor", "sympy")
    assert not {name for name in modules if name.startswith(heavy)}


EMITTERS = sorted(path.parent.name for path in (ROOT / "backends").glob("*/emitter.py"))


@pytest.mark.parametrize("backend", EMITTERS)
def test_every_emitter_has_a_row_for_each_operation(backend):
    table = table_of(importlib.import_module(f"flexref.backends.{backend}.emitter"))
    rows = set(table.spell) | set(table.lacks)
    assert not set(OPS) - rows, f"{backend}: neither spelled nor lacking: {sorted(set(OPS) - rows)}"
    assert not rows - set(OPS), f"{backend}: no operations: {sorted(rows - set(OPS))}"
    assert not set(table.spell) & set(table.lacks)
    for op, row in table.spell.items():
        if isinstance(row, dict) and OPS[op].signature[0] == "n":
            assert set(row) >= {"int", "float"}, f"{backend}: {op} is spelled for {sorted(row)} only"


@pytest.mark.parametrize("op", OPS)
def test_an_operations_meaning_has_its_type(op):
    samples = {"f": torch.tensor([0.5, 2.0]), "i": torch.tensor([1, 2]), "b": torch.tensor([True, False])}
    kinds = {"f": "float", "i": "int", "b": "bool"}
    *arguments, result = OPS[op].signature
    for n in "if" if "n" in arguments else "f":
        given = {**samples, "n": samples[n], "t": samples["f"]}
        out = OPS[op].meaning(*(given[a] for a in arguments))
        wanted = {**kinds, "n": kinds[n], "t": "float"}[result]
        got = "bool" if out.dtype == torch.bool else "float" if out.is_floating_point() else "int"
        assert got == wanted in TYPES, f"{op}({arguments}) is {got}, not {wanted}"
